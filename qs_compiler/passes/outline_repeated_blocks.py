"""Call the repeated blocks of a transformer through one body, so that Inductor compiles it once.

Before:  add_7 = ...   # nodes of blocks.0
         add_19 = ...  # the same nodes again for blocks.1, blocks.2, ...
After:   invoke_subgraph = torch.ops.higher_order.invoke_subgraph(submod_1, "quantsparse_0", x, weight_of_block_0)
         invoke_subgraph_1 = torch.ops.higher_order.invoke_subgraph(submod_1, "quantsparse_0", y, weight_of_block_1)

The flat graph is split by the module stack of its nodes. Two blocks share a body only if their nodes, metadata,
constants and wiring are equal; every call keeps its own weights and caches as operands.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import fx

from .. import _compat
from ..capture import dotted_path
from .base import GraphPass, PassContext, PassResult


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
        parts = assign_parts(graph, blocks)
        groups: dict[str, list[int]] = {}
        for part in sorted({p for p in parts.values() if p % 2}):
            nodes = [n for n, p in parts.items() if p == part]
            groups.setdefault(canonical(nodes), []).append(part)
        shared: dict[int, tuple[str, int]] = {}
        for number, members in enumerate(groups.values()):
            if len(members) < 2:
                name = next(str(block_of(n)) for n, p in parts.items() if p == members[0])
                result.skip(name, "no other block has the same graph")
                continue
            shared.update({part: (f"quantsparse_{number}", members[0]) for part in members})
        if shared:
            context.capture.module = _compat.outline(context.capture.module, parts, shared)
            result.matched = len(shared)
        return result


def block_of(node: fx.Node) -> tuple[str, str] | None:
    """(path, class) of the outermost numbered module in which a node was traced: ("blocks.3", "WanTransformerBlock").

    torch's own layers do not count: an nn.Sequential of linears is no list of blocks.
    """
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        path = dotted_path(_compat.stack_name(entry))
        if re.search(r"(^|\.)\d+$", path):
            cls = entry[1] if isinstance(entry[1], str) else f"{entry[1].__module__}.{entry[1].__qualname__}"
            if not cls.startswith("torch.nn."):
                return path, cls.rpartition(".")[2]
    return None


def repeated_blocks(graph: fx.Graph) -> dict[tuple[str, str], int]:
    """Blocks of the outermost lists of which the graph holds at least two of one class, in order of appearance."""
    seen: dict[tuple[str, str], None] = {}
    for node in graph.nodes:
        if node.op == "call_function" and (block := block_of(node)) is not None:
            seen.setdefault(block)
    families = [(path.rpartition(".")[0], cls) for path, cls in seen]
    depth = min((path.count(".") for path, cls in families if families.count((path, cls)) > 1), default=0)
    repeated = [
        block
        for block, family in zip(seen, families, strict=True)
        if families.count(family) > 1 and family[0].count(".") == depth
    ]
    return {block: number for number, block in enumerate(repeated)}


def assign_parts(graph: fx.Graph, blocks: dict[tuple[str, str], int]) -> dict[fx.Node, int]:
    """Part number of every node but placeholders and output: odd inside a block, even between blocks, ascending."""
    parts: dict[fx.Node, int] = {}
    number, inside = 0, None
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        block = block_of(node)
        block = block if block in blocks else None
        if block != inside:
            step = 2 if block is not None and inside is not None else 1
            number, inside = number + step, block
        parts[node] = number
    return parts


def canonical(nodes: list[fx.Node]) -> str:
    """Hash of a part's nodes: targets, constants, wiring, and the metadata of values, inputs included."""
    inside = {n: i for i, n in enumerate(nodes)}
    outside: dict[fx.Node, int] = {}
    used_outside = [any(user not in inside for user in n.users) for n in nodes]

    def label(node: fx.Node) -> str:
        if node in inside:
            return f"n{inside[node]}"
        known = node in outside
        number = outside.setdefault(node, len(outside))
        return f"i{number}" if known else f"i{number}:{_metadata(node.meta.get('val'))}"

    digest = hashlib.sha256()
    for node, escapes in zip(nodes, used_outside, strict=True):
        args = fx.map_arg((node.args, node.kwargs), lambda n: _Label(label(n)))
        value = node.meta.get("val", node.target if node.op == "get_attr" else None)
        digest.update(f"{node.op}|{node.target}|{args}|{_metadata(value)}|{escapes}\n".encode())
    return digest.hexdigest()


class _Label(str):
    __slots__ = ()
    __repr__ = str.__str__


def _metadata(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}{list(value.stride())}{value.device}"
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_metadata(v) for v in value) + ")"
    return repr(value)
