"""Find attention masks that only hide padding at the end, and hand the valid length to the attention passes.

Before:  ge: "b8[1, 12]" = torch.ops.aten.ge.Tensor(arange, length)
         mask: "b8[1, 12]" = torch.ops.aten.masked_fill.Scalar(ones, ge, False)
         sdpa = torch.ops.aten.scaled_dot_product_attention.default(q, k, v, unsqueeze_mask)
After:   the same nodes; sdpa.meta["kv_len"] = length, which sparsify_attention and quantize_attention pass on as
         `kv_len`, and so need no mask.

The graph proves a prefix by `arange >= length` filled with False into ones, or by `arange < length`, seen through
unsqueeze / expand / view. Lengths stay on the device.

A block that is compiled by itself may get its mask as an argument, of which the graph shows nothing:

Before:  mask: "b8[1, 1, 1, 12]" = placeholder
         sdpa = torch.ops.aten.scaled_dot_product_attention.default(q, k, v, mask)
After:   length: "i64[1]" = torch.ops.aten.sum.dim_IntList(mask, [1, 2, 3])
         the same nodes; sdpa.meta["kv_len"] = length, and `context.prefix_inputs[position of mask] = 0`

That is no proof but an assumption: the runtime looks at the mask of every call (`runtime/prefix_masks.py`) and runs a
form without it where the mask is no prefix, or hides one of the first `prefix_inputs` tokens. So it is made only where
there is a runtime (not of exported programs), and where the recipe has attention rewritten or the mask is as large as
the attention (below). The argument may be the mask of the last tokens alone, before which the graph puts ones for all
others (`pad`).

Some models hide padding from keys and queries (HunyuanVideo 1.5): a mask as large as the attention, of which rows that
hide all keys give zeros.

Before:  repeat: "b8[1, 1, 342, 342]" = torch.ops.aten.repeat.default(keys, [1, 1, 342, 1])   # keys: "b8[1, 1, 1, 342]"
         and_1 = torch.ops.aten.__and__.Tensor(repeat, torch.ops.aten.transpose.int(repeat, 2, 3))
         sdpa = torch.ops.aten.scaled_dot_product_attention.default(q, k, v, and_1)
After:   the same nodes; sdpa.meta["kv_len"] as by the mask `keys`
         where = torch.ops.aten.where.ScalarOther(transpose.int(keys, 2, 3), sdpa, 0.0), in the place of sdpa; right by
         any mask, since the runtime may have to leave the length alone
"""

from __future__ import annotations

import torch
from torch import fx

from .. import _compat
from .base import GraphPass, MaskInput, PassContext, PassResult, call, splice

aten = torch.ops.aten
_ANDS = {aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default}
_REPEATS = {aten.repeat.default, aten.expand.default}
_KEY_DIMS = [1, 2, 3]  # of a mask (B, 1, 1, T)
_VIEWS = {aten.unsqueeze.default, aten.expand.default, aten.view.default, aten.reshape.default, aten.alias.default}


class TrimPaddingMask(GraphPass):
    """Mark each attention whose mask is `position < length`, by proof or by an assumption that the runtime checks."""

    name = "trim_padding_mask"

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        result = PassResult()
        for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            mask = attention_mask(node)
            if mask is None:
                continue
            keys = keys_of_square(mask)
            mask = mask if keys is None else keys
            length = valid_length(mask, node.args[1].meta["val"].shape)
            if length is None and assumes_prefixes(context, keys is not None) and is_self_attention(node):
                length = assumed_length(mask, node.args[1].meta["val"].shape, context)
            if length is None:
                result.skip(node, "the graph does not prove that the mask is a prefix")
                continue
            node.meta["kv_len"] = length
            if keys is not None:
                users = list(node.users)
                hidden = splice(graph, node.next, _without_hidden_rows, node, keys)
                for user in users:
                    user.replace_input_with(node, hidden)
            result.matched += 1
        return result


def attention_mask(node: fx.Node) -> fx.Node | None:
    """The attn_mask operand of an aten.scaled_dot_product_attention node."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def keys_of_square(mask: fx.Node) -> fx.Node | None:
    """The (B, 1, 1, T) mask m of which a mask (B, 1, T, T) is m[..., i] & m[..., j], or None if it is no such mask."""
    if mask.target not in _ANDS:
        return None
    for rows, columns in (mask.args, mask.args[::-1]):
        if not _is(columns, aten.transpose.int) or columns.args[0] is not rows or rows.target not in _REPEATS:
            continue
        keys, tokens = rows.args[0], rows.meta["val"].shape[-1]
        swapped = {dim % 4 for dim in columns.args[1:]}
        if swapped == {2, 3} and keys.meta["val"].shape == (rows.meta["val"].shape[0], 1, 1, tokens):
            return keys
    return None


def _without_hidden_rows(o: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Zeros for the queries (B, H, T, D) that the mask (B, 1, 1, T) hides."""
    return torch.where(keys.transpose(2, 3), o, 0.0)


def assumes_prefixes(context: PassContext, square: bool) -> bool:
    """Whether the runtime can check what is assumed of masks, and there is a use for it.

    Of a mask as large as the attention (`square`) there is one in 16 bit too: the kernel that needs none.
    """
    used = context.recipe.sparse or context.recipe.attention != "16bit" or square
    return used and context.trust_mask_inputs and not context.exported


def is_self_attention(node: fx.Node) -> bool:
    """Whether an attention has as many queries as keys."""
    q, k = (operand.meta["val"] for operand in node.args[:2])
    return q.dim() == k.dim() == 4 and _compat.static_hint(q.shape[2]) == _compat.static_hint(k.shape[2])


def assumed_length(mask: fx.Node, kv_shape: torch.Size, context: PassContext) -> fx.Node | None:
    """The (B,) int64 number of keys that a mask keeps, if it is an argument of the forward seen through views."""
    if not _hides_keys(mask, kv_shape):
        return None
    argument = _argument(mask, context)
    if argument is None:
        return None
    known = [node for node in mask.users if node in context.mask_lengths]
    if known:
        return known[0]
    # Beside the mask: of blocks that share one, none gets a node that the others have not.
    graph = mask.graph
    inputs = context.capture.placeholders
    with graph.inserting_after(inputs[-1] if mask in inputs else mask):
        length = call(graph, mask, aten.sum.dim_IntList, mask, _KEY_DIMS)
    context.mask_lengths[length] = argument
    context.prefix_inputs.setdefault(argument.position, 0)
    return length


def _argument(mask: fx.Node, context: PassContext) -> MaskInput | None:
    """The argument of which a mask is a view with the same rows, or with ones before; the graph writes into none."""
    node, padded = _behind_views(mask), 0
    if node.target is aten.pad.default:
        node, (before, *others), mode, value = (*node.args, "constant", None)[:4]
        if any(others) or not isinstance(before, int) or before < 0 or mode != "constant" or value != 1:
            return None
        node, padded = _behind_views(node), before
    position = context.input_index(node)
    if position is None or position >= len(context.capture.inputs) or context.capture.inputs[position].owned:
        return None
    return None if _is_written(node) else MaskInput(position, padded)


def _behind_views(mask: fx.Node) -> fx.Node:
    """What a mask is a view of with the same rows: the last size is the same all the way."""
    tokens = mask.meta["val"].shape[-1:]
    while mask.target in _VIEWS and mask.args[0].meta["val"].shape[-1:] == tokens:
        mask = mask.args[0]
    return mask


def _is_written(tensor: fx.Node) -> bool:
    """Whether the graph writes into a tensor, or into a view of it."""
    for user in tensor.users:
        schema = getattr(user.target, "_schema", None)
        if schema is None:
            continue
        if schema.is_mutable:
            return True
        if any(result.alias_info is not None for result in schema.returns) and _is_written(user):
            return True
    return False


def valid_length(mask: fx.Node, kv_shape: torch.Size) -> fx.Node | None:
    """The (B,) integer node n with mask[b, ..., j] == (j < n[b]), or None where the graph does not prove one."""
    if not _hides_keys(mask, kv_shape):
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


def _hides_keys(mask: fx.Node, kv_shape: torch.Size) -> bool:
    """Whether a mask is a bool (B, 1, 1, T): the same keys for all heads and queries."""
    value = mask.meta["val"]
    if value.dtype != torch.bool or value.dim() != 4 or value.shape[1] != 1 or value.shape[2] != 1:
        return False
    return bool(value.shape[-1] == kv_shape[2] and value.shape[0] == kv_shape[0])


def _is(node: object, target: object) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _is_true(node: fx.Node) -> bool:
    return _is(node, aten.ones.default) or (_is(node, aten.full.default) and node.args[1] in (True, 1))


def _strip(node: fx.Node, targets: set[object]) -> fx.Node:
    while isinstance(node, fx.Node) and node.target in targets:
        node = node.args[0]
    return node
