"""Trace Dynamo's graph to ATen part by part: blocks that are alike are traced once.

    Dynamo's graph:   before | blocks.0 | blocks.1 | ... | after
    traced:           before | blocks.0 |                  after
    put together:     before | blocks.0 | a copy   | ... | after

Tracing takes some milliseconds a node, copying a tenth of one. Where a copied node comes from (its module, its line of
the model's code) is read off the block that the copy is for.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import _compat
from .blocks import assign_parts, canonical, members, metadata_of, repeated_blocks

ORIGIN = "quantsparse_origin"  # in meta["custom"], which tracing hands on: position of a node in its part
PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack")


def trace_by_parts(source: fx.GraphModule, trace: _compat.Trace) -> fx.GraphModule | None:
    """Trace `source`, whose nodes carry `meta["example_value"]`; blocks with one canonical form share a trace.

    Args:
        source: Dynamo's graph.
        trace: ATen graph of a part for the given values.

    Returns:
        the traced graph, or None where parts would not add up to the whole: no repeated blocks, symbolic sizes,
        constants and bodies held by the graph, something else than tensors between parts, or a node that changes what
        later ones do (autocast, grad mode).
    """
    blocks = repeated_blocks(source.graph)
    if not blocks or not all(_is_plain(node) for node in source.graph.nodes):
        return None
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(source.graph.find_nodes(op="placeholder")):
        new[node] = graph.placeholder(f"arg{number}_1")
        new[node].meta["val"] = node.meta["example_value"]
    traces: dict[str, fx.GraphModule] = {}
    constants: dict[str, torch.Tensor] = {}
    for nodes in members(assign_parts(source.graph, blocks)).values():
        given, returned = _compat.boundary(nodes)
        if not all(isinstance(n.meta["example_value"], torch.Tensor) for n in returned):
            return None
        values = [new[n].meta["val"] for n in given]
        form = canonical(nodes, "example_value") + metadata_of(values)  # values may be laid out unlike Dynamo's
        if form not in traces:
            part = _compat.part_of(source, nodes, given, returned)
            own = [n for n in part.graph.nodes if n.op not in ("placeholder", "output")]
            for position, node in enumerate(own):
                node.meta = {**node.meta, "custom": {**node.meta.get("custom", {}), ORIGIN: position}}
            traces[form] = trace(part, values)
            if not _knows_origins(traces[form].graph):
                return None
            for node in traces[form].graph.find_nodes(op="get_attr"):
                name = f"_tensor_constant{len(constants)}"
                constants[name], node.target = getattr(traces[form], node.target), name
        new |= zip(returned, _paste(graph, traces[form].graph, [new[n] for n in given], nodes), strict=True)
    graph.output(fx.map_arg(source.graph.output_node().args[0], new.__getitem__))
    return fx.GraphModule(constants, graph)


def _paste(
    graph: fx.Graph, traced: fx.Graph, given: Sequence[fx.Node], nodes: Sequence[fx.Node]
) -> tuple[fx.Node, ...]:
    """Append a copy of a part's trace, as that of `nodes`; the nodes that stand for what it returns."""
    mapping = dict(zip(traced.find_nodes(op="placeholder"), given, strict=True))
    inputs = set(mapping)
    output = graph.graph_copy(traced, mapping)
    for old, copy in mapping.items():
        if old in inputs:
            continue
        copy.meta = {key: value for key, value in old.meta.items() if key != "custom"}
        custom = dict(old.meta["custom"])
        origin = nodes[custom.pop(ORIGIN)]
        if custom:
            copy.meta["custom"] = custom
        copy.meta |= {key: origin.meta[key] for key in PROVENANCE if key in origin.meta}
    return output


def _is_plain(node: fx.Node) -> bool:
    """Whether a node of Dynamo's graph means the same wherever it is traced, and its value is there to be read."""
    if node.op in ("output", "get_attr", "call_module"):
        return node.op == "output"
    values = pytree.tree_leaves(node.meta.get("example_value"))
    if node.op == "placeholder":
        return len(values) == 1 and _is_static(values[0])
    return node.target is operator.setitem or (len(values) > 0 and all(map(_is_static, values)))


def _is_static(value: Any) -> bool:
    """Whether a value is a tensor whose layout is numbers."""
    if not isinstance(value, torch.Tensor):
        return False
    return all(type(n) is int for n in (*value.shape, *value.stride(), value.storage_offset()))


def _knows_origins(traced: fx.Graph) -> bool:
    """Whether each node of a trace names the node that it was traced from."""
    return all(n.op in ("placeholder", "output") or ORIGIN in n.meta.get("custom", {}) for n in traced.nodes)
