"""One IR for everything: a Dynamo graph or an ExportedProgram becomes flat pre-dispatch ATen with named inputs.

Pre-dispatch ATen is what torch.export produces: aten.linear and aten.scaled_dot_product_attention are still whole,
so one set of matchers serves torch.compile and torch.export.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from . import _compat
from .blocks import block_of, dotted_path, repeated_blocks
from .errors import CaptureError
from .trace_parts import trace_by_parts

aten = torch.ops.aten


class Kind(enum.Enum):
    """What a graph input is to the model."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    USER = "user"  # activations, timestep, text: what the caller passes
    SIZE = "size"  # a dynamic size that Dynamo lifted to an int input


@dataclasses.dataclass(frozen=True)
class GraphInput:
    """One placeholder: its dotted name ("blocks.0.attn1.to_q.weight", "hidden_states") and its kind."""

    name: str
    kind: Kind

    @property
    def owned(self) -> bool:
        """Whether the tensor belongs to a module, so that its identity says which layer is running."""
        return self.kind in (Kind.PARAMETER, Kind.BUFFER)


@dataclasses.dataclass
class Capture:
    """A flat pre-dispatch ATen graph; `inputs[i]` describes the i-th placeholder."""

    module: fx.GraphModule
    inputs: list[GraphInput]

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.module.graph.find_nodes(op="placeholder")

    @property
    def dynamic(self) -> bool:
        return any(i.kind is Kind.SIZE for i in self.inputs)

    def copy(self) -> Capture:
        """A copy whose graph may be edited; tensors held by the module are shared, metadata is not."""
        module = _compat.copy_graph_module(self.module)
        return Capture(module, list(self.inputs))

    def specialise(self, args: Sequence[Any]) -> Capture:
        """The same graph for the shapes of `args`: every size is a number afterwards."""
        if not self.dynamic:
            return self.copy()
        return Capture(_compat.retrace_concrete(self.module, args), list(self.inputs))


def lay_tokens_out(graph: fx.Graph) -> None:
    """Make the tokens (..., L, C) that enter the first of repeated blocks contiguous, in Dynamo's graph.

    Before:  tokens = conv.flatten(2).transpose(1, 2)               # the channels of a token do not lie together
    After:   tokens = conv.flatten(2).transpose(1, 2).contiguous()

    Every block hands on the strides that it got: each norm would gather its rows and each epilogue scatter them. Tokens
    are left alone where something else reads the same storage, which a block might write into.
    """
    blocks = repeated_blocks(graph)
    first: dict[str, tuple[str, str]] = {}
    for block in blocks:
        first.setdefault(block[1], block)
    for node in list(graph.nodes):
        if (block := block_of(node)) is None or block not in first.values():
            continue
        for tokens in node.all_input_nodes:
            value = tokens.meta.get("example_value")
            if tokens.op == "placeholder" or block_of(tokens) == block or not isinstance(value, torch.Tensor):
                continue
            apart = value.is_floating_point() and value.dim() > 2 and _compat.static_hint(value.stride(-1)) != 1
            if apart and _sole_reader(tokens):
                with graph.inserting_after(tokens):
                    copy = graph.call_method("contiguous", (tokens,))
                copy.meta = {**tokens.meta, "example_value": value.contiguous()}
                tokens.replace_all_uses_with(copy, lambda user: user is not copy)  # noqa: B023


def _sole_reader(view: fx.Node) -> bool:
    """Whether nothing but `view` and what is computed from it sees the storage of its value, callers included."""
    storage, source = _compat.storage_of(view.meta["example_value"]), view
    while True:
        parents = [n for n in source.all_input_nodes if _compat.storage_of(n.meta.get("example_value")) == storage]
        if not parents:
            return source.op != "placeholder"
        source = parents[0]
        if len(parents) > 1 or len(source.users) > 1:
            return False


def capture_dynamo(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Capture:
    """Trace Dynamo's torch-level graph to pre-dispatch ATen. Dynamo's own graph is left alone.

    Raises CaptureError if the graph cannot be traced, with the op that stopped it.
    """
    nodes = module.graph.find_nodes(op="placeholder")
    try:
        traced = _compat.retrace_dynamo(module, lay_tokens_out, trace_by_parts)
    except Exception as error:
        raise CaptureError(
            f"the graph could not be traced to ATen: {type(error).__name__}: {error}. "
            "Compile smaller regions (model.compile_repeated_blocks) or file an issue with this message."
        ) from error
    remove_identities(traced.graph)
    inputs = []
    for node, example in zip(nodes, example_inputs, strict=True):
        source = _compat.source_name(node)
        if not isinstance(example, torch.Tensor):
            kind = Kind.SIZE
        elif isinstance(example, torch.nn.Parameter):
            kind = Kind.PARAMETER
        else:
            kind = Kind.BUFFER if source and "_buffers[" in source else Kind.USER
        inputs.append(GraphInput(dotted_path(source) if source else node.name, kind))
    return Capture(traced, inputs)


def capture_exported(program: ExportedProgram) -> Capture:
    """A copy of an exported program's graph with the same description of its inputs."""
    kinds = {InputKind.PARAMETER: Kind.PARAMETER, InputKind.BUFFER: Kind.BUFFER, InputKind.CONSTANT_TENSOR: Kind.BUFFER}
    inputs = [
        GraphInput(spec.target or spec.arg.name, kinds.get(spec.kind, Kind.USER))
        for spec in program.graph_signature.input_specs
    ]
    module = copy.deepcopy(program.graph_module)
    remove_identities(module.graph)
    return Capture(module, inputs)


_CASTS = (aten.to.dtype, aten.to.device, aten.to.other, aten.to.dtype_layout, aten.type_as.default)


def remove_identities(graph: fx.Graph) -> None:
    """Drop casts, `contiguous` and dropout that return their own input.

    Such a node takes the place of its input in all later uses, so that one block would read through the casts of the
    block before and no two blocks had the same graph.
    """
    for node in graph.nodes:
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        before, after = node.args[0].meta.get("val"), node.meta.get("val")
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            continue
        if node.target in _CASTS:
            copies = node.kwargs.get("copy") or any(a is True for a in node.args[1:])
            same = not copies and before.dtype == after.dtype and before.device == after.device
        elif node.target is aten.contiguous.default:
            same = not node.kwargs and before.is_contiguous()
        elif node.target is aten.dropout.default:
            same = node.args[1] == 0 or not node.args[2]
        else:
            same = False
        if same:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
