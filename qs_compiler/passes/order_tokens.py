"""Find where the tokens of each self-attention lie in the video, and order them so that a block is a local box.

Before:  o = torch.ops.aten.scaled_dot_product_attention.default(q, k, v)

After, in refresh and sparse, with `token_order="tiles"`:

         q_order = torch.ops.aten.index_select.default(q, 2, order)            # k and v likewise
         o = torch.ops.aten.scaled_dot_product_attention.default(q_order, k_order, v_order)
         o_rows = torch.ops.aten.index_select.default(o, 2, inverse)

Attention does not depend on the order of its tokens, so this moves roundings alone until blocks are dropped. The order
and its inverse are graph inputs. The gathers are pointwise reads for Inductor: those of q, k and v fuse with what makes
them, that of o with what reads it. What lies in the caches is in the order of the blocks in both phases.

The grid (t, h, w) is the option `grid`, else the output of the patch embedding: a conv3d, or a conv2d over frames; in a
graph without one that of the graph before it, or of the eager model around a block (runtime/seen_grid.py). A
sequence longer than the grid holds text too; the graph must show where, by a cat with a part as long as the grid.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from .. import _compat
from ..runtime.seen_grid import seen
from ..runtime.token_layout import LayoutInput, TokenLayout, part_start, patch_grids
from .base import GraphPass, PassContext, PassResult, Phase, call, upstream

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv3d.default, aten.conv3d.padding, aten.conv2d.default, aten.conv2d.padding)
_SEEN_THROUGH = 4000  # nodes upstream of q that are searched for a cat


class OrderTokens(GraphPass):
    """Give each self-attention a TokenLayout, and reorder its tokens where the recipe says so."""

    name = "order_tokens"
    after = ("quantize_linear",)

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        from .sparsify_attention import why_not

        result, recipe = PassResult(), context.recipe
        if not recipe.needs_grid:
            return result
        for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            if why_not(node, context) is not None:
                continue  # sparsify_attention gives the reason
            layout = find_layout(graph, node, context)
            if isinstance(layout, str):
                result.skip(node, layout)
                continue
            node.meta["token_layout"] = layout
            result.matched += 1
            if layout.tiled and context.phase is not Phase.DENSE:
                reorder(graph, node, layout, context)
        return result


def reorder(graph: fx.Graph, node: fx.Node, layout: TokenLayout, context: PassContext) -> None:
    """Gather the tokens of q, k and v before an attention, and undo it after."""
    like = node.args[0].meta["val"]
    with like.fake_mode:
        example = torch.empty(layout.tokens, dtype=torch.int64, device=like.device)
    order, inverse = (
        context.add_input(f"token_{what}", example, LayoutInput(layout, what, like.device))
        for what in ("order", "inverse")
    )
    moved: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        for operand in node.args[:3]:
            if operand not in moved:
                moved[operand] = call(graph, node, aten.index_select.default, operand, 2, order)
    node.args = (*(moved[operand] for operand in node.args[:3]), *node.args[3:])
    users = list(node.users)
    with graph.inserting_after(node):
        back = call(graph, node, aten.index_select.default, node, 2, inverse)
    for user in users:
        user.replace_input_with(node, back)


def find_layout(graph: fx.Graph, node: fx.Node, context: PassContext) -> TokenLayout | str:
    """Where the tokens of an attention lie, or why that is not known."""
    q, recipe = node.args[0], context.recipe
    batch, tokens = (_compat.static_hint(q.meta["val"].shape[i]) for i in (0, 2))
    given = context.options.grid
    own = [[_compat.static_hint(size) for size in shape] for shape in patch_shapes(graph)]
    grids = [given] if given is not None else patch_grids(own, batch)
    followed = not grids
    if followed:
        grids = patch_grids(seen(), batch)
    if not grids:
        return "no patch embedding in or before the graph tells the (t, h, w) grid; give the option `grid`"
    tiled = recipe.token_order == "tiles"
    for grid in grids:
        length = math.prod(grid)
        start = 0 if length == tokens else video_start(q, length, tokens)
        if start is not None:
            if tiled and "kv_len" in node.meta and not _keeps(node.meta["kv_len"], start + length, context):
                if not recipe.needs_places:
                    return "the graph does not prove that the padding mask hides no video token"
                tiled = False
            return TokenLayout(tokens, grid, start, recipe.block_size, tiled, followed)
    return f"{tokens} tokens are not the grid {'x'.join(map(str, grids[-1]))}, nor a cat of it and text"


def patch_shapes(graph: fx.Graph) -> list[torch.Size]:
    """Shapes of the outputs of convolutions."""
    return [n.meta["val"].shape for t in _CONVOLUTIONS for n in graph.find_nodes(op="call_function", target=t)]


def video_start(q: fx.Node, length: int, tokens: int) -> int | None:
    """Position of the video in a joint sequence: the nearest cat upstream of q that has a part as long as the grid."""
    for node in upstream(q, _SEEN_THROUGH):
        if node.target is aten.cat.default and (start := _part_of(node, length, tokens)) is not None:
            return start
    return None


def _keeps(kv_len: fx.Node, end: int, context: PassContext) -> bool:
    """Whether a mask hides none of the first `end` tokens: by the graph, or since the runtime will see to it."""
    mask = context.mask_lengths.get(kv_len)
    if mask is None:
        return _is_longer(kv_len, end)
    if context.phase is not Phase.DENSE:  # which leaves the tokens where they are
        context.prefix_inputs[mask.position] = max(context.prefix_inputs[mask.position], end - mask.padded)
    return True


def _is_longer(kv_len: fx.Node, end: int) -> bool:
    """Whether a length is a count of mask entries plus at least `end`."""
    if kv_len.target is not aten.add.Tensor:
        return False
    counts = [a for a in kv_len.args if isinstance(a, fx.Node)]
    added = [_compat.static_hint(a) for a in kv_len.args if not isinstance(a, fx.Node)]
    sums = (aten.sum.dim_IntList, aten.sum.default)
    return len(counts) == len(added) == 1 and added[0] >= end and counts[0].target in sums


def _part_of(cat: fx.Node, length: int, tokens: int) -> int | None:
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    return part_start([_compat.static_hint(part.meta["val"].shape[dim]) for part in cat.args[0]], length, tokens)
