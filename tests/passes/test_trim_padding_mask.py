"""trim_padding_mask: a mask that is an argument counts as a prefix where the runtime can check it, and nowhere else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qs_compiler.options import Recipe
from qs_compiler.passes import Phase
from qs_compiler.passes.order_tokens import OrderTokens
from qs_compiler.passes.sparsify_attention import SparsifyAttention
from qs_compiler.passes.trim_padding_mask import TrimPaddingMask
from tests.passes.conftest import targets

SPARSE = {"density": 0.4, "block_size": 64, "correction": "none"}
TOKENS = 320
X = torch.randn(2, TOKENS, 32)
MASK = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
aten = torch.ops.aten


class Attention(nn.Module):
    """One or more attentions under the mask that `views` makes of an argument, or of what the module owns."""

    def __init__(self, views=lambda mask: mask, owned: torch.Tensor | None = None, layers: int = 1) -> None:
        super().__init__()
        self.qkv, self.views, self.layers = nn.Linear(32, 96), views, layers
        self.register_buffer("owned", owned)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, keys: int = TOKENS) -> torch.Tensor:
        for _ in range(self.layers):
            q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
            given = self.views(self.owned if mask is None else mask)
            x = F.scaled_dot_product_attention(q, k[:, :, :keys], v[:, :, :keys], given).transpose(1, 2).flatten(2)
        return x


def run(context, model: nn.Module, *args: object, recipe: object = SPARSE, **fields: object):
    ctx = context(model, (X, *args), recipe=recipe)
    for name, value in fields.items():
        setattr(ctx, name, value)
    graph = ctx.capture.module.graph
    before = targets(graph)
    result = TrimPaddingMask().run(graph, ctx)
    graph.lint()
    return result, ctx, before


def lengths(ctx) -> list:
    return ctx.capture.module.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)


def position(ctx, name: str) -> int:
    return [i.name for i in ctx.capture.inputs].index(name)


@pytest.mark.parametrize(
    ("views", "mask"),
    [
        (lambda mask: mask, MASK),
        (lambda mask: mask[:, None, None], MASK[:, 0, 0]),
        (lambda mask: mask.view(2, 1, 1, TOKENS), MASK[:, 0, 0]),
        (lambda mask: mask[None, None, None].expand(2, 1, 1, TOKENS), MASK[0, 0, 0]),
    ],
    ids=["as it is", "unsqueeze", "view", "expand"],
)
def test_its_length_is_counted_in_the_graph(context, views, mask) -> None:
    result, ctx, before = run(context, Attention(views), mask)
    assert (result.matched, result.skipped) == (1, [])
    assert ctx.prefix_inputs == {position(ctx, "mask"): 0}
    graph = ctx.capture.module.graph
    (length,) = lengths(ctx)
    assert sorted(targets(graph)) == sorted([*before, "aten.sum.dim_IntList"])
    (node,) = graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert node.meta["kv_len"] is length and node.args[3] is length.args[0], "the dense form keeps its mask"
    value = length.meta["val"]
    assert tuple(value.shape) == (2,) and value.dtype == torch.int64
    ctx.phase = Phase.SPARSE
    assert SparsifyAttention().run(graph, ctx).matched == 1
    (sparse,) = graph.find_nodes(op="call_function", target=torch.ops.quantsparse.sparse_attention.default)
    assert sparse.args[8] is length


def test_attentions_under_one_mask_share_its_length(context) -> None:
    result, ctx, _ = run(context, Attention(layers=3), MASK)
    assert result.matched == 3 and len(lengths(ctx)) == 1


def written(mask: torch.Tensor) -> torch.Tensor:
    mask[..., 0] = True
    return mask


FULL = MASK.clone()


@pytest.mark.parametrize(
    ("model", "args", "fields"),
    [
        (Attention(), (MASK,), {"exported": True}),
        (Attention(), (MASK,), {"trust_mask_inputs": False}),
        (Attention(), (MASK,), {"recipe": Recipe.parse("w8a8")}),
        (Attention(), (torch.zeros(2, 1, 1, TOKENS),), {}),
        (Attention(), (MASK.expand(2, 1, TOKENS, TOKENS),), {}),
        (Attention(), (MASK[..., :200], 200), {}),
        (Attention(owned=MASK), (), {}),
        (Attention(lambda mask: mask.logical_not()), (~MASK,), {}),
        (Attention(lambda mask: mask.view(2, 1, 1, TOKENS)), (MASK.view(TOKENS, 2),), {}),
        (Attention(written), (FULL,), {}),
    ],
    ids=[
        "exported", "not trusted", "no use for it", "float", "a mask for each query", "cross-attention", "a buffer",
        "computed", "rows that are not the argument's", "written into",
    ],
)  # fmt: skip
def test_what_stays_a_mask(context, model: nn.Module, args: tuple, fields: dict) -> None:
    result, ctx, before = run(context, model, *args, **fields)
    assert result.matched == 0 and ctx.prefix_inputs == {} and targets(ctx.capture.module.graph) == before
    assert [reason for _, reason in result.skipped] == ["the graph does not prove that the mask is a prefix"]


def test_quantised_attention_is_a_use(context) -> None:
    assert run(context, Attention(), MASK, recipe={"attention": "int8"})[0].matched == 1


@pytest.mark.parametrize(("phase", "least"), [(Phase.DENSE, 0), (Phase.SPARSE, TOKENS)])
def test_tiles_need_a_mask_that_keeps_the_video(context, phase: Phase, least: int) -> None:
    result, ctx, _ = run(context, Attention(), MASK, recipe={**SPARSE, "token_order": "tiles"}, phase=phase)
    ctx.options = dataclasses.replace(ctx.options, grid=(5, 8, 8))
    ordered = OrderTokens().run(ctx.capture.module.graph, ctx)
    assert (result.matched, ordered.matched, ordered.skipped) == (1, 1, [])
    assert ctx.prefix_inputs == {position(ctx, "mask"): least}


def square(mask: torch.Tensor, text: int = 22) -> torch.Tensor:
    """Of the last tokens' mask (B, T), what HunyuanVideo 1.5 makes: padding neither asks nor is asked."""
    keys = F.pad(mask, (TOKENS - text, 0), value=True).bool().view(-1, 1, 1, TOKENS).repeat(1, 1, TOKENS, 1)
    return (keys & keys.transpose(2, 3)).bool()


TEXT = torch.arange(22) < torch.tensor([[9], [22]])


def test_padding_hidden_from_queries_too(context) -> None:
    model = Attention(square)
    result, ctx, before = run(context, model, TEXT)
    assert (result.matched, result.skipped) == (1, [])
    assert ctx.prefix_inputs == {position(ctx, "mask"): 0}
    graph = ctx.capture.module.graph
    (length,) = lengths(ctx)
    assert ctx.mask_lengths == {length: (position(ctx, "mask"), TOKENS - 22)}
    new = ["sum.dim_IntList", "transpose.int", "where.ScalarOther"]
    added = sorted(targets(graph))
    for target in before:
        added.remove(target)
    assert sorted(name.removeprefix("aten.").removesuffix(".default") for name in added) == sorted(new)
    ctx.phase = Phase.SPARSE
    assert SparsifyAttention().run(graph, ctx).matched == 1
    assert not graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    graph.eliminate_dead_code()
    assert not graph.find_nodes(op="call_function", target=aten.repeat.default), "no mask as large as the attention"


def test_tiles_count_the_tokens_before_the_mask(context) -> None:
    recipe = {**SPARSE, "token_order": "tiles"}
    _, ctx, _ = run(context, Attention(square), TEXT, recipe=recipe, phase=Phase.SPARSE)
    ctx.options = dataclasses.replace(ctx.options, grid=(5, 8, 8))
    assert OrderTokens().run(ctx.capture.module.graph, ctx).matched == 1
    assert ctx.prefix_inputs == {position(ctx, "mask"): 22}, "all 320 tokens are the video, 22 of them in the mask"


def either(mask: torch.Tensor) -> torch.Tensor:
    keys = mask.view(-1, 1, 1, TOKENS).repeat(1, 1, TOKENS, 1)
    return keys | keys.transpose(2, 3)


def of_two(mask: torch.Tensor) -> torch.Tensor:
    keys = mask.view(-1, 1, 1, TOKENS)
    return keys.repeat(1, 1, TOKENS, 1) & keys.flip(-1).repeat(1, 1, TOKENS, 1).transpose(2, 3)


def behind(mask: torch.Tensor) -> torch.Tensor:
    return F.pad(mask, (0, TOKENS - 22), value=True).view(-1, 1, 1, TOKENS)


def zeros_before(mask: torch.Tensor) -> torch.Tensor:
    return F.pad(mask, (TOKENS - 22, 0), value=False).view(-1, 1, 1, TOKENS)


@pytest.mark.parametrize(
    ("views", "mask"), [(either, MASK[:, 0, 0]), (of_two, MASK[:, 0, 0]), (behind, TEXT), (zeros_before, TEXT)]
)
def test_what_only_looks_like_it(context, views, mask: torch.Tensor) -> None:
    result, ctx, before = run(context, Attention(views), mask)
    assert result.matched == 0 and ctx.prefix_inputs == {} and targets(ctx.capture.module.graph) == before
