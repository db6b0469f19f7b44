"""The repeated blocks of a graph, and the parts that they divide it into."""

from __future__ import annotations

import functools
import hashlib
import re

import torch
from torch import fx

from . import _compat

_TOKEN = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)")
_CONTAINERS = frozenset({"__dict__", "_modules", "_parameters", "_buffers", "_orig_mod"})


@functools.cache
def dotted_path(source: str) -> str:
    """`L['self'].__dict__['_modules']['blocks'].0.attn1` -> `blocks.0.attn1`; a plain or dotted name stays."""
    if re.fullmatch(r"[\w.]*", source):
        return source
    tokens = [next(t for t in m if t) for m in _TOKEN.findall(source)]
    path = [t for t in tokens if t not in _CONTAINERS]
    return ".".join(path[1:]) if len(path) > 1 else ".".join(path)


def module_path(node: fx.Node) -> str:
    """Dotted path of the module that a node was traced in, or its own name where none was recorded."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    return dotted_path(_compat.stack_name(next(reversed(stack.values())))) or node.name


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


def members(parts: dict[fx.Node, int]) -> dict[int, list[fx.Node]]:
    """Part number -> its nodes, ascending, in the order of the graph."""
    found: dict[int, list[fx.Node]] = {}
    for node, part in parts.items():
        found.setdefault(part, []).append(node)
    return found


def canonical(nodes: list[fx.Node], value: str = "val") -> str:
    """Hash of a part's nodes: targets, constants, wiring, and the metadata of values, inputs included.

    Where an input begins in its storage does not tell parts apart, so long as it begins at a multiple of 16 bytes.

    Args:
        value: the entry of `meta` that holds a node's value.
    """
    inside = {n: i for i, n in enumerate(nodes)}
    outside: dict[fx.Node, int] = {}
    used_outside = [any(user not in inside for user in n.users) for n in nodes]

    def label(node: fx.Node) -> str:
        if node in inside:
            return f"n{inside[node]}"
        known, example = node in outside, node.meta.get(value)
        number = outside.setdefault(node, len(outside))
        return f"i{number}" if known else f"i{number}:{metadata_of(example)}{_begin(example)}"

    digest = hashlib.sha256()
    for node, escapes in zip(nodes, used_outside, strict=True):
        args = fx.map_arg((node.args, node.kwargs), lambda n: _Label(label(n)))
        example = node.meta.get(value, node.target if node.op == "get_attr" else None)
        digest.update(f"{node.op}|{node.target}|{args}|{metadata_of(example)}|{escapes}\n".encode())
    return digest.hexdigest()


class _Label(str):
    __slots__ = ()
    __repr__ = str.__str__


def metadata_of(value: object) -> str:
    """Dtype, sizes, strides and device of a tensor, or of several; of anything else its value."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}{list(value.stride())}{value.device}"
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(metadata_of(v) for v in value) + ")"
    return repr(value)


def _begin(value: object) -> object:
    """Where a tensor begins, as far as a kernel cares: kernels of a body take its inputs for aligned, or for not."""
    if not isinstance(value, torch.Tensor):
        return None
    offset = value.storage_offset()
    return offset * value.element_size() % 16 if isinstance(offset, int) else offset
