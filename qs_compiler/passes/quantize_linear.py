"""Compute linears in low-bit arithmetic: quantise the rows of x once, multiply packed weights, scale in the epilogue.

Plain form, a 16-bit parameter; the packed tensors become graph inputs that are looked up at every call:

Before:  linear: "bf16[1, 4096, 768]" = torch.ops.aten.linear.default(x, weight, bias)
After:   xq, xs = torch.ops.quantsparse.quantize_rows.default(x, None, None, "int8")
         linear = torch.ops.quantsparse.linear.default(xq, xs, weight_wq, weight_ws, bias, torch.bfloat16)

Attached form, a module that owns its packed tensors:

Before:  weight = torch.ops.quantsparse.dequantize.default(wq, ws, multipliers, smooth, rotation, "int8", dtype)
         linear = torch.ops.aten.linear.default(x, weight, bias)
After:   xq, xs = torch.ops.quantsparse.quantize_rows.default(x, smooth, rotation, "int8")
         w8 = torch.ops.quantsparse.expand_w4.default(wq, multipliers, torch.int8)          # int4 only
         linear = torch.ops.quantsparse.linear.default(xq, xs, w8, ws, bias, dtype)

Linears that read the same x with the same smoothing and rotation share one quantize_rows.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from .. import _compat
from ..blocks import block_of, repeated_blocks
from ..lora import ADAPTER, is_adapter
from .base import GraphPass, PassContext, PassResult, call

aten = torch.ops.aten
KEPT = "kept in 16 bit by the recipe"
SMALL_ROWS = 32  # a 2-D input with fewer rows than this is a batch of embeddings (time, guidance, modulation)


class QuantizeLinear(GraphPass):
    """Swap each linear whose weight has a packed form; leave the rest and say why."""

    name = "quantize_linear"
    after = ("trim_padding_mask",)

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        result = PassResult()
        quantised: dict[tuple[object, ...], tuple[fx.Node, fx.Node]] = {}
        blocks = repeated_blocks(graph)
        for node in graph.find_nodes(op="call_function", target=aten.linear.default):
            x, weight, bias = (*node.args, None)[:3]
            if _is_dequantize(weight):
                wq, ws, multipliers, smooth, rotation, activation, _ = weight.args
                if activation == "none":
                    result.skip(node, "kept as weight-only storage by the artifact")
                    continue
                if few_rows(x):
                    result.skip(node, "stored low-bit, computed in 16 bit: one row per clip")
                    continue
            else:
                reason = why_not(node, context, blocks)
                if reason is not None:
                    result.skip(node, reason)
                    continue
                layer = context.owner_name(weight) or node.name
                packed = context.weights.place(context, weight, context.recipe.for_layer(layer))
                wq, ws, multipliers, activation = packed
                smooth = rotation = None
            key = (x, smooth, rotation, activation)
            with graph.inserting_before(node):
                if key not in quantised:
                    quantised[key] = self.quantize(graph, node, key, blocks)
                xq, xs = quantised[key]
                if wq.meta["val"].dtype == torch.uint8:
                    dtype = xq.meta["val"].dtype
                    wq = call(graph, node, torch.ops.quantsparse.expand_w4.default, wq, multipliers, dtype)
                new = call(
                    graph, node, torch.ops.quantsparse.linear.default, xq, xs, wq, ws, bias, node.meta["val"].dtype
                )
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            if not weight.users and weight.op == "call_function":
                graph.erase_node(weight)
            result.matched += 1
        return result

    def quantize(
        self, graph: fx.Graph, node: fx.Node, key: tuple[object, ...], blocks: dict[tuple[str, str], int]
    ) -> tuple[fx.Node, fx.Node]:
        """Codes and scales of the rows of an input.

        What all blocks read (the text) is quantised where it is made: in the first block that reads it, that block
        had another graph than the rest.
        """
        x, smooth, rotation, _ = key
        made_outside = x.op != "placeholder" and block_of(node) in blocks and block_of(x) not in blocks
        for_all = made_outside and smooth is None and rotation is None
        like, place = (x, x.next) if for_all else (node, node)
        with graph.inserting_before(place):
            rows = call(graph, like, torch.ops.quantsparse.quantize_rows.default, *key)
            return call(graph, like, operator.getitem, rows, 0), call(graph, like, operator.getitem, rows, 1)


def why_not(node: fx.Node, context: PassContext, blocks: dict[tuple[str, str], int]) -> str | None:
    """Why a linear over a 16-bit weight stays as it is, or None."""
    x, weight = node.args[:2]
    recipe = context.recipe
    if recipe.format == "off":
        return "recipe 'off'"
    if is_adapter(context.owner_name(weight) or ""):
        return ADAPTER
    if context.attached:
        return node.meta.get("kept", "kept in 16 bit by the artifact")
    if weight.op != "placeholder":
        return "the weight is computed in the graph"
    index = context.input_index(weight)
    if not context.capture.inputs[index].owned:
        return "the weight is not a parameter"
    layer = context.recipe.for_layer(context.owner_name(weight) or node.name)
    if layer.format == "off":
        return KEPT
    if not x.meta["val"].is_floating_point():
        return f"the input is {x.meta['val'].dtype}"
    if few_rows(x):
        return "one row per clip (time, guidance or modulation)"
    if blocks and block_of(node) not in blocks:
        return "outside the repeated blocks"
    if layer.activation_format == "none":
        return f"'{layer.format}' is storage only; attach() stores it, a plain compile keeps the 16-bit weight"
    return None


def few_rows(x: fx.Node) -> bool:
    """Whether x (B, K) holds one row a clip instead of tokens."""
    shape = x.meta["val"].shape
    return len(shape) == 1 or (len(shape) == 2 and _compat.static_hint(shape[0]) < SMALL_ROWS)


def _is_dequantize(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ops.quantsparse.dequantize.default
