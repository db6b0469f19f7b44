"""Call the repeated blocks of a transformer through one body, so that Inductor compiles it once.

Before:  add_7 = ...   # nodes of blocks.0
         add_19 = ...  # the same nodes again for blocks.1, blocks.2, ...
After:   invoke_subgraph = torch.ops.higher_order.invoke_subgraph(submod_1, "quantsparse_0", x, weight_of_block_0)
         invoke_subgraph_1 = torch.ops.higher_order.invoke_subgraph(submod_1, "quantsparse_0", y, weight_of_block_1)

The flat graph is split by the module stack of its nodes. Two blocks share a body only if their nodes, metadata,
constants and wiring are equal; every call keeps its own weights and caches as operands.

Views that a block returns are taken behind it, and its body returns what they are views of:

Before:  slice_8 = torch.ops.aten.slice.Tensor(add_7, 1, 0, -256)   # in the block, returned
After:   slice_8 = torch.ops.aten.slice.Tensor(getitem, 1, 0, -256)   # behind the call that returns add_7

Inductor takes every output of a body for a buffer that begins where the output begins, and reuses it as one: of a slice
it would write before, behind and into the other half of what the slice lies in.
"""

from __future__ import annotations

import torch
from torch import fx

from .. import _compat
from ..blocks import assign_parts, block_of, canonical, members, repeated_blocks
from .base import GraphPass, PassContext, PassResult, call


class OutlineRepeatedBlocks(GraphPass):
    """Split the graph at the repeated blocks and share one body among equal ones. Runs last: it closes the graph."""

    name = "outline_repeated_blocks"
    after = ("stage_caches",)

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        result = PassResult()
        blocks = repeated_blocks(graph)
        if not blocks:
            return result
        if context.exported:
            result.skip("the graph", "an ExportedProgram is one flat graph")
            return result
        hoist_views(graph, members(assign_parts(graph, blocks)))
        parts = members(assign_parts(graph, blocks))
        groups: dict[str, list[int]] = {}
        for part, nodes in parts.items():
            if part % 2:
                groups.setdefault(canonical(nodes), []).append(part)
        shared: dict[int, tuple[str, int]] = {}
        for number, alike in enumerate(groups.values()):
            if len(alike) < 2:
                result.skip(str(block_of(parts[alike[0]][0])), "no other block has the same graph")
                continue
            shared.update({part: (f"quantsparse_{number}", alike[0]) for part in alike})
        if shared:
            _compat.outline(context.capture.module, parts, shared)
            result.matched = len(shared)
        return result


def hoist_views(graph: fx.Graph, parts: dict[int, list[fx.Node]]) -> None:
    """Take the views that leave a block behind it, so that what leaves it are buffers that it computes."""
    for nodes in [nodes for part, nodes in parts.items() if part % 2]:
        inside, behind, copies = set(nodes), nodes[-1].next, dict[fx.Node, fx.Node]()
        leaving = [n for n in nodes if _compat.is_view(n) and not inside.issuperset(n.users)]
        for node in leaving:
            new = _one_batch(_copy_behind(node, inside, behind, copies))
            node.replace_all_uses_with(new, lambda user: user not in inside)  # noqa: B023
        for node in reversed(nodes):
            if not node.users and (node in copies or _compat.is_view(node)):
                graph.erase_node(node)


def _copy_behind(node: fx.Node, inside: set[fx.Node], behind: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """A view of a block, or a size that it reads, taken again before the node `behind`; any other node as it is."""
    if node not in inside or not (_compat.is_view(node) or isinstance(node.meta.get("val"), torch.SymInt)):
        return node
    if node not in copies:
        with node.graph.inserting_before(behind):
            new = node.graph.node_copy(node, lambda n: _copy_behind(n, inside, behind, copies))
        new.meta = {key: value for key, value in node.meta.items() if key != "nn_module_stack"}
        copies[node] = new
    return copies[node]


def _one_batch(view: fx.Node) -> fx.Node:
    """A view (1, L, ...) whose unused stride is that of a buffer of its own: torch compares strides of size 1 too."""
    value = view.meta["val"]
    batch = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() > 1 else None
    if not isinstance(batch, int) or batch != 1:  # a symbolic one is not known to be 1
        return view
    with view.graph.inserting_before(view.next):
        squeezed = call(view.graph, view, torch.ops.aten.squeeze.dim, view, 0)
        return call(view.graph, view, torch.ops.aten.unsqueeze.default, squeezed, 0)
