"""quantize_attention: 8-bit operands of sparse and refresh attention, and dense attention on our kernel."""

from __future__ import annotations

import pytest
import torch

import qs_compiler
from qs_compiler import _compat
from qs_compiler.ops.formats import FORMATS
from qs_compiler.passes import Phase, quantize_attention
from qs_compiler.passes.quantize_attention import QuantizeAttention
from qs_compiler.passes.sparsify_attention import SparsifyAttention
from qs_compiler.passes.trim_padding_mask import TrimPaddingMask
from tests.backend.models import RECIPE as MODEL_RECIPE
from tests.backend.models import clip, make
from tests.passes.conftest import targets
from tests.passes.test_sparsify_attention import RECIPE, Attention, Masked, X

quantsparse = torch.ops.quantsparse
# Of the model's output. Its scores reach 10 by design, and int8 codes hold them to 1/250 of that: weights are off by up
# to 4 %. float8 weights and values add 1/16 each at most, of either sign. float8 q and k err by 2.6 % each, root mean
# square, so the largest scores by 0.37 and their weights by more than a third; few are as large, hence half of that.
RELATIVE_ATTENTION_ERROR = {"int8": 0.04, "int8-fp8": 0.06, "fp8": 0.2}


def run(context, phase: Phase, module=None, args=(X,), **recipe: object):
    ctx = context(module or Attention(), args, recipe={**RECIPE, "correction": "none", **recipe}, phase=phase)
    graph = ctx.capture.module.graph
    for one in (TrimPaddingMask(), SparsifyAttention()):
        one.run(graph, ctx)
    result = QuantizeAttention().run(graph, ctx)
    graph.lint()
    return targets(graph), result, ctx


@pytest.fixture
def of_any_length(monkeypatch):
    """Take dense attentions here too, of any length."""
    monkeypatch.setattr(quantize_attention, "LEAST_TOKENS", 1)
    monkeypatch.setattr(quantize_attention, "LIBRARY_DEVICES", ())


@pytest.fixture
def on_any_device(monkeypatch, of_any_length):
    """The same, with heads of any width."""
    monkeypatch.setattr(quantize_attention, "HEADS", dict.fromkeys(quantize_attention.HEADS, range(1, 129)))


@pytest.mark.parametrize("phase", (Phase.REFRESH, Phase.SPARSE))
@pytest.mark.parametrize(("attention", "qk"), (("int8", "int8"), ("int8-fp8", "int8"), ("fp8", "fp8")))
def test_both_phases_of_a_site_get_the_same_operands(context, phase, attention, qk) -> None:
    ops, result, ctx = run(context, phase, attention=attention)
    assert result.matched == 1
    for op in ("quantize_rows", "quantize_keys"):
        assert ops.count(f"quantsparse.{op}.default") == 1
    assert ops.count("quantsparse.pack_values.default") == (attention != "int8")
    target = quantsparse.sparse_attention if phase is Phase.SPARSE else quantsparse.refresh_attention
    (node,) = ctx.capture.module.graph.find_nodes(op="call_function", target=target.default)
    dtypes = [x.meta["val"].dtype for x in node.args[:3]]
    assert dtypes[:2] == [FORMATS[qk].dtype] * 2
    assert dtypes[2] == (torch.float32 if attention == "int8" else torch.uint8)
    assert [s is None for s in node.args[3:6]] == [False, False, attention == "int8"]


def test_block_scores_read_what_was_there(context) -> None:
    _, _, ctx = run(context, Phase.REFRESH, attention="int8-fp8")
    (node,) = ctx.capture.module.graph.find_nodes(op="call_function", target=quantsparse.block_scores.default)
    assert all(x.meta["val"].dtype == torch.float32 for x in node.args[:2])


@pytest.mark.parametrize("correction", ("none", "complement"))
def test_log_sum_exps_of_another_step_are_those_of_whole_keys(context, correction) -> None:
    _, _, ctx = run(context, Phase.REFRESH, attention="int8", mask="mass", correction=correction)
    graph = ctx.capture.module.graph
    (refresh,) = graph.find_nodes(op="call_function", target=quantsparse.refresh_attention.default)
    taken = refresh.args[9]
    assert taken.target is torch.ops.aten.sub.Tensor and "lse_prev_0" in str(taken.args[0].args)
    (copy,) = [n for n in graph.nodes if n.target is torch.ops.aten.copy_.default and n.args[0].name == "lse_prev_0"]
    given = copy.args[1]
    assert given.target is torch.ops.aten.add.Tensor and given.args[0].args == (refresh, 1)
    assert given.args[1] is taken.args[1], "one shift, taken from what comes and added to what goes"
    _, _, ctx = run(context, Phase.SPARSE, attention="int8", mask="mass", correction="none")
    (sparse,) = ctx.capture.module.graph.find_nodes(op="call_function", target=quantsparse.sparse_attention.default)
    assert sparse.args[9] is None and "qs_lse_shift" not in sparse.meta


def test_16_bit_leaves_everything(context) -> None:
    for phase in Phase:
        ops, result, _ = run(context, phase)
        assert not any(op in str(ops) for op in ("quantize_keys", "pack_values")) and result.matched == 0


def test_a_dense_attention_lists_every_block(context, on_any_device) -> None:
    ops, result, ctx = run(context, Phase.DENSE, attention="int8-fp8")
    assert result.matched == 1 and "aten.scaled_dot_product_attention.default" not in ops
    graph = ctx.capture.module.graph
    (node,) = graph.find_nodes(op="call_function", target=quantsparse.sparse_attention.default)
    blocks = -(-X.shape[1] // RECIPE["block_size"])
    assert node.args[7].meta["val"].shape == (1, 1, blocks, blocks)


def test_padding_is_not_computed_by_a_dense_attention(context, on_any_device) -> None:
    ops, result, ctx = run(context, Phase.DENSE, Masked("less"), (X, torch.tensor([200])))
    assert "aten.scaled_dot_product_attention.default" not in ops
    assert result.matched == 1, "16-bit operands too, since the library would compute what the mask hides"
    (node,) = ctx.capture.module.graph.find_nodes(op="call_function", target=quantsparse.sparse_attention.default)
    assert node.args[8] is not None and node.args[3:6] == (None, None, None)


@pytest.mark.parametrize(("attention", "ours"), (("int8", 0), ("int8-fp8", 1), ("fp8", 1)))
def test_heads_of_64_stay_the_librarys_unless_values_are_float8(context, of_any_length, attention, ours) -> None:
    _, result, _ = run(context, Phase.DENSE, Attention(width=64), attention=attention)
    reasons = [] if ours else ["dense attention of head width 64 is the library's"]
    assert result.matched == ours and [r for _, r in result.skipped] == reasons


@pytest.mark.parametrize(
    ("sdpa", "reason"),
    (({"is_causal": True}, "causal attention"), ({}, "dense attention on cpu is the library's")),
)
def test_what_stays_the_librarys_is_said(context, sdpa, reason) -> None:
    ops, result, _ = run(context, Phase.DENSE, Attention(**sdpa), attention="int8")
    assert result.matched == 0 and "aten.scaled_dot_product_attention.default" in ops
    assert [r for _, r in result.skipped] == [reason]


@pytest.mark.parametrize("attention", RELATIVE_ATTENTION_ERROR)
def test_compiled_phases_stay_near_16_bit(attention, on_any_device) -> None:
    """Over a run of a small model: dense, refresh and sparse steps, each near the same step with 16-bit operands."""
    inputs = clip(0, 6)
    runs = {}
    for name in ("16bit", attention):
        torch._dynamo.reset()
        model = make()
        recipe = {**MODEL_RECIPE, "format": "off", "warmup": 0.3, "attention": name}
        fast = torch.compile(model, backend="quantsparse", options={"recipe": recipe})
        with torch.no_grad(), qs_compiler.denoising(model, len(inputs)) as steps:
            outputs = []
            for i, step in enumerate(inputs):
                steps.step(i)
                outputs.append(fast(**step))
        assert qs_compiler.reports()[-1].calls == {"dense": 2, "refresh": 1, "sparse": 3}
        runs[name] = outputs
    for found, wanted in zip(runs[attention], runs["16bit"], strict=True):
        error = (found - wanted).norm() / wanted.norm()
        assert 0 < error < RELATIVE_ATTENTION_ERROR[attention]


def test_a_complement_is_joined_as_with_16_bit_operands(monkeypatch) -> None:
    """Keys with a large bias: their mean, which 8-bit keys lose, moves the log-sum-exp of each step."""
    monkeypatch.setattr(_compat, "compile_graph", lambda module, inputs, patches, own_context: module.forward)
    inputs, runs = clip(0, 3), {}
    for name in ("16bit", "int8", "without"):
        torch._dynamo.reset()
        model = make(blocks=1)
        model.blocks[0].qkv.bias.data[32:64] = 12 * torch.randn(32, generator=torch.Generator().manual_seed(1))
        if name == "without":
            monkeypatch.setattr(quantize_attention, "_lse_shift", lambda codes, scales, *_: 0 * scales)
        attention = "16bit" if name == "16bit" else "int8"
        recipe = {**MODEL_RECIPE, "format": "off", "correction": "complement", "attention": attention}
        fast = torch.compile(model, backend="quantsparse", options={"recipe": recipe})
        with torch.no_grad(), qs_compiler.denoising(model, len(inputs)) as steps:
            for i, step in enumerate(inputs):
                steps.step(i)
                runs[name] = fast(**step)
        assert qs_compiler.reports()[-1].calls["sparse"] == 2
    error, without = ((runs[n] - runs["16bit"]).norm() / runs["16bit"].norm() for n in ("int8", "without"))
    assert 0 < error < RELATIVE_ATTENTION_ERROR["int8"] and without > 3 * error
