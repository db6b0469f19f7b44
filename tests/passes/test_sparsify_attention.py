"""sparsify_attention and reparameterize_residual: the graph of each phase and every reason to skip."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qs_compiler.passes import Phase
from qs_compiler.passes.choose_blocks import _by_mass
from qs_compiler.passes.reparameterize_residual import ReparameterizeResidual
from qs_compiler.passes.sparsify_attention import SparsifyAttention
from qs_compiler.passes.trim_padding_mask import TrimPaddingMask
from tests.passes.conftest import targets

RECIPE = {"density": 0.4, "block_size": 64, "correction": "first_order"}
X = torch.randn(1, 320, 32)
qs = torch.ops.quantsparse


class Attention(nn.Module):
    def __init__(self, width: int = 16, **sdpa: object) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 6 * width)
        self.width, self.sdpa = width, sdpa

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, self.width)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        if keys is not None:
            k = v = keys
        return F.scaled_dot_product_attention(q, k, v, **self.sdpa).transpose(1, 2).flatten(2)


def run(context, phase: Phase, **recipe: object):
    ctx = context(Attention(), (X,), recipe={**RECIPE, **recipe}, phase=phase)
    graph = ctx.capture.module.graph
    sparsified = SparsifyAttention().run(graph, ctx)
    corrected = ReparameterizeResidual().run(graph, ctx)
    graph.lint()
    names = [n.name for n in ctx.capture.placeholders[len(ctx.capture.inputs) :]]
    return targets(graph), names, sparsified, corrected, ctx


def test_dense_finds_the_sites_and_rewrites_nothing(context) -> None:
    ops, names, sparsified, corrected, ctx = run(context, Phase.DENSE)
    assert "aten.scaled_dot_product_attention.default" in ops
    assert names == [] and (sparsified.matched, corrected.matched) == (1, 0)
    (site,) = ctx.sites
    assert (site.budget, site.kv_blocks, site.ordinal) == (2, 5, 0)
    assert ctx.capture.inputs[site.anchor].name == "qkv.weight"


def test_refresh_renews_the_lists_and_the_residual(context) -> None:
    ops, names, sparsified, corrected, _ = run(context, Phase.REFRESH)
    assert (sparsified.matched, corrected.matched) == (1, 1)
    assert ops.count("quantsparse.refresh_attention.default") == ops.count("quantsparse.select_blocks.default") == 1
    assert "aten.scaled_dot_product_attention.default" not in ops
    assert names == ["kv_num_blocks_0", "kv_indices_0", "budgets_0", "residual_0"]
    assert ops.count("aten.copy_.default") == 3
    ops, names, *_, ctx = run(context, Phase.REFRESH, budgets="uniform")
    assert names == ["kv_num_blocks_0", "kv_indices_0", "residual_0"]
    (selected,) = ctx.capture.module.graph.find_nodes(op="call_function", target=qs.select_blocks.default)
    assert len(selected.args) == 3


def test_sparse_reads_them(context) -> None:
    ops, names, *_ = run(context, Phase.SPARSE)
    assert ops.count("quantsparse.sparse_attention.default") == ops.count("quantsparse.add_residual.default") == 1
    assert names == ["kv_num_blocks_0", "kv_indices_0", "residual_0"]
    assert "aten.copy_.default" not in ops


def test_second_order_keeps_one_mask_a_video(context) -> None:
    ops, names, *_ = run(context, Phase.REFRESH, correction="second_order", cache_format="int8")
    assert names == [
        "kv_num_blocks_0", "kv_indices_0", "new_video_0", "budgets_0", "residual_0", "residual_scale_0", "left_0",
        "right_0",
    ]  # fmt: skip
    assert ops.count("quantsparse.low_rank.default") == 1
    assert ops.count("aten.copy_.default") == 6
    assert ops.count("aten.where.self") == 2, "the choice of blocks and the difference wait for a second refresh"
    assert run(context, Phase.REFRESH, correction="second_order", cache_format="int8", mask="mass")[1] == names
    ops, names, *_ = run(context, Phase.SPARSE, correction="second_order")
    assert "gain_0" in names


def test_mixture_weighs_the_sparse_output(context) -> None:
    ops, names, *_ = run(context, Phase.REFRESH, correction="mixture", cache_format="int8")
    lists = ["kv_num_blocks_0", "kv_indices_0"]
    assert names == [*lists, "budgets_0", "gains_0", "residual_0", "residual_scale_0", "mixture_weight_0"]
    assert ops.count("aten.copy_.default") == 5
    ops, names, *_, ctx = run(context, Phase.SPARSE, correction="mixture")
    assert names == [*lists, "residual_0", "mixture_weight_0"], "the gains are in the caches by now"
    graph = ctx.capture.module.graph
    (sparse,) = graph.find_nodes(op="call_function", target=qs.sparse_attention.default)
    (added,) = graph.find_nodes(op="call_function", target=qs.add_residual.default)
    chain = [added]
    while chain[-1] is not sparse:
        chain.append(chain[-1].args[0])
    assert [str(n.target).split(".")[-2] for n in chain[1:-2]] == ["to", "mul", "to"], chain


def test_complement_resumes_the_softmax(context) -> None:
    ops, names, *_, ctx = run(context, Phase.SPARSE, correction="complement")
    assert names == ["kv_num_blocks_0", "kv_indices_0", "residual_0", "state_lse_0"]
    assert "quantsparse.add_residual.default" not in ops
    graph = ctx.capture.module.graph
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.quantsparse.sparse_attention.default)
    assert node.args[9] is not None and node.args[10].name == "state_lse_0"
    ops, *_ = run(context, Phase.REFRESH, correction="complement")
    assert ops.count("aten.copy_.default") == 4


def test_the_mask_may_follow_the_measured_mass(context) -> None:
    ops, names, *_, ctx = run(context, Phase.REFRESH, mask="mass")
    lists = ["kv_num_blocks_0", "kv_indices_0"]
    assert names == [*lists, "block_mass_0", "lse_prev_0", "new_video_0", "budgets_0", "residual_0"]
    assert ops.count("aten.copy_.default") == 5 and ops.count("aten.where.self") == 1
    graph = ctx.capture.module.graph
    (refresh,) = graph.find_nodes(op="call_function", target=qs.refresh_attention.default)
    (select,) = graph.find_nodes(op="call_function", target=qs.select_blocks.default)
    (where,) = graph.find_nodes(op="call_function", target=torch.ops.aten.where.self)
    assert select.args[0] is where and where.args[2].target is qs.block_scores.default
    before = refresh.args[9]
    assert before.target is torch.ops.aten.masked_fill.Scalar
    assert [str(a) for a in before.args] == ["lse_prev_0", "new_video_0", "-inf"]
    copies = {n.args[0].name: n.args[1] for n in graph.nodes if n.target is torch.ops.aten.copy_.default}
    assert copies["lse_prev_0"].args == (refresh, 1)
    stored = copies["block_mass_0"]
    assert stored.meta["val"].dtype == torch.bfloat16 and stored.args[0].args == (refresh, 4)
    ops, names, *_ = run(context, Phase.SPARSE, mask="mass")
    assert names == [*lists, "residual_0"], "a sparse step has no use for them"
    ops, names, *_, ctx = run(context, Phase.REFRESH)
    (refresh,) = ctx.capture.module.graph.find_nodes(op="call_function", target=qs.refresh_attention.default)
    assert "lse_prev_0" not in names and refresh.args[9] is None


def test_blocks_are_ranked_by_mass_only_where_there_is_some() -> None:
    pooled, mass = torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4).bfloat16()
    mass[0, 0, 1], mass[0, 0, 2, 3] = 0, float("nan")
    ranked = _by_mass(torch.tensor(False), pooled, mass)
    for row, wanted in enumerate((mass, pooled, pooled, mass)):
        assert torch.equal(ranked[0, 0, row], wanted[0, 0, row].float())
    assert torch.equal(_by_mass(torch.tensor(True), pooled, mass), pooled)


@pytest.mark.parametrize(
    ("model", "args", "recipe", "reason"),
    [
        (Attention(is_causal=True), (X,), {}, "causal attention"),
        (Attention(dropout_p=0.5), (X,), {}, "attention dropout"),
        (Attention(attn_mask=torch.zeros(320, 320)), (X,), {}, "an attention mask that is not a prefix"),
        (Attention(), (X, torch.randn(1, 2, 40, 16)), {}, "cross-attention"),
        (Attention(), (X[:, :192],), {}, "192 tokens are fewer than 4 blocks of 64"),
        (Attention(), (X,), {"density": 0.95}, "density 0.95 keeps all 5 blocks"),
    ],
)
def test_reasons_to_skip(context, model: nn.Module, args: tuple, recipe: dict, reason: str) -> None:
    ctx = context(model, args, recipe={**RECIPE, **recipe})
    result = SparsifyAttention().run(ctx.capture.module.graph, ctx)
    assert (result.matched, [r for _, r in result.skipped]) == (0, [reason])


def test_attention_without_a_weight_upstream(context) -> None:
    class Bare(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    ctx = context(Bare(), (torch.randn(1, 2, 320, 16),), recipe=RECIPE)
    result = SparsifyAttention().run(ctx.capture.module.graph, ctx)
    assert [r for _, r in result.skipped] == ["no weight of the graph says which layer this is"]


class Masked(nn.Module):
    """As HunyuanVideo masks its padded text, in one of several spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.qkv, self.spelling = nn.Linear(32, 96), spelling

    def forward(self, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        batch, tokens = x.shape[:2]
        positions = torch.arange(tokens).unsqueeze(0)
        hidden = positions >= length.unsqueeze(1)
        if self.spelling == "masked_fill":
            mask = torch.ones(batch, tokens, dtype=torch.bool).masked_fill(hidden, False)
        elif self.spelling == "less":
            mask = positions < length.unsqueeze(1)
        elif self.spelling == "suffix":
            mask = positions >= length.unsqueeze(1)
        elif self.spelling == "shifted":
            mask = torch.arange(1, tokens + 1).unsqueeze(0) < length.unsqueeze(1)
        else:
            mask = torch.ones(batch, tokens, dtype=torch.bool).masked_fill(hidden, True)
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1).unsqueeze(1))


@pytest.mark.parametrize(
    ("spelling", "proved"),
    [("masked_fill", True), ("less", True), ("suffix", False), ("shifted", False), ("filled with True", False)],
)
def test_only_a_proved_prefix_loses_its_mask(context, spelling: str, proved: bool) -> None:
    ctx = context(Masked(spelling), (X, torch.tensor([300])), recipe=RECIPE, phase=Phase.SPARSE)
    graph = ctx.capture.module.graph
    trimmed = TrimPaddingMask().run(graph, ctx)
    result = SparsifyAttention().run(graph, ctx)
    assert (trimmed.matched, result.matched) == (int(proved), int(proved))
    if proved:
        (node,) = graph.find_nodes(op="call_function", target=torch.ops.quantsparse.sparse_attention.default)
        assert node.args[8].name == "length" or node.args[8].op == "placeholder"
