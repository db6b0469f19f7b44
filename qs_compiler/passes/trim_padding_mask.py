"""Find attention masks that only hide padding at the end, and hand the valid length to the attention passes.

Before:  ge: "b8[1, 12]" = torch.ops.aten.ge.Tensor(arange, length)
         mask: "b8[1, 12]" = torch.ops.aten.masked_fill.Scalar(ones, ge, False)
         sdpa = torch.ops.aten.scaled_dot_product_attention.default(q, k, v, unsqueeze_mask)
After:   the same nodes; sdpa.meta["kv_len"] = length, which sparsify_attention and quantize_attention pass on as
         `kv_len`, and so need no mask.

Only what the graph proves to be a prefix counts: `arange >= length` filled with False into ones, or `arange < length`,
seen through unsqueeze / expand / view. Lengths stay on the device.
"""

from __future__ import annotations

import torch
from torch import fx

from .base import GraphPass, PassContext, PassResult

aten = torch.ops.aten
_VIEWS = {aten.unsqueeze.default, aten.expand.default, aten.view.default, aten.reshape.default, aten.alias.default}


class TrimPaddingMask(GraphPass):
    """Mark each attention whose mask is provably `position < length`."""

    name = "trim_padding_mask"

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        result = PassResult()
        for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            mask = attention_mask(node)
            if mask is None:
                continue
            length = valid_length(mask, node.args[1].meta["val"].shape)
            if length is None:
                result.skip(node, "the graph does not prove that the mask is a prefix")
                continue
            node.meta["kv_len"] = length
            result.matched += 1
        return result


def attention_mask(node: fx.Node) -> fx.Node | None:
    """The attn_mask operand of an aten.scaled_dot_product_attention node."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def valid_length(mask: fx.Node, kv_shape: torch.Size) -> fx.Node | None:
    """The (B,) integer node n with mask[b, ..., j] == (j < n[b]), or None where the graph does not prove one."""
    value = mask.meta["val"]
    if value.dtype != torch.bool or value.dim() != 4 or value.shape[1] != 1 or value.shape[2] != 1:
        return None
    if value.shape[-1] != kv_shape[2] or value.shape[0] != kv_shape[0]:
        return None
    base = _strip(mask, _VIEWS)
    if _is(base, aten.masked_fill.Scalar):
        ones, hidden, fill = base.args[:3]
        if (fill is not False and fill != 0) or not _is_true(ones) or not _is(hidden, aten.ge.Tensor):
            return None
        positions, length = hidden.args[:2]
    elif _is(base, aten.lt.Tensor):
        positions, length = base.args[:2]
    else:
        return None
    arange = _strip(positions, _VIEWS)
    if not _is(arange, aten.arange.default) and not _is(arange, aten.arange.start):
        return None
    bounds = [a for a in arange.args if not isinstance(a, fx.Node)]
    if len(bounds) == 2 and bounds[0] != 0:
        return None
    if arange.meta["val"].dim() != 1 or arange.meta["val"].shape[0] != kv_shape[2]:
        return None
    if not _is(length, aten.unsqueeze.default):
        return None
    source, dim = length.args[:2]
    if dim not in (1, -1) or source.meta["val"].dim() != 1 or source.meta["val"].is_floating_point():
        return None
    return source


def _is(node: object, target: object) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _is_true(node: fx.Node) -> bool:
    return _is(node, aten.ones.default) or (_is(node, aten.full.default) and node.args[1] in (True, 1))


def _strip(node: fx.Node, targets: set[object]) -> fx.Node:
    while isinstance(node, fx.Node) and node.target in targets:
        node = node.args[0]
    return node
