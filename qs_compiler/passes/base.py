"""What a pass is, what it is given, and what it gives back."""

from __future__ import annotations

import abc
import dataclasses
import enum
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx

from .. import _compat
from ..blocks import module_path
from ..runtime.inputs import Scalar

if TYPE_CHECKING:
    from ..capture import Capture
    from ..options import BackendOptions, Recipe


class Phase(enum.Enum):
    """The compiled forms of one graph.

    DENSE touches no cache; REFRESH is dense and renews the caches; SPARSE uses them; in MIXED a share of the attentions
    refresh and the others run sparse (recipe field `refresh`).
    """

    DENSE = "dense"
    REFRESH = "refresh"
    SPARSE = "sparse"
    MIXED = "mixed"


@dataclasses.dataclass
class PassResult:
    """How many nodes a pass rewrote (or found), and which it left alone and why."""

    matched: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def skip(self, node: fx.Node | str, reason: str) -> None:
        """Record that `node` was left as it is."""
        self.skipped.append((node if isinstance(node, str) else describe(node), reason))


@dataclasses.dataclass
class AttentionSite:
    """One self-attention of the graph that may run sparse.

    `anchor` is the index of the graph input whose identity says which layer is running: the weight of the linear
    that feeds q. `ordinal` tells sites with the same anchor apart. `recipe` is that of the layer. `shape` is that of q,
    (B, H, S, D).
    """

    index: int
    name: str
    anchor: int
    ordinal: int
    recipe: Recipe
    budget: int
    kv_blocks: int
    shape: tuple[Any, ...]


class MaskInput(NamedTuple):
    """A mask that is an argument of the forward.

    Attributes:
        position: among the inputs of the graph.
        padded: how many tokens, all of them kept, the graph puts before those of the mask.
    """

    position: int
    padded: int


@dataclasses.dataclass
class PassContext:
    """Everything a pass may need beside the graph.

    Attributes:
        capture: the graph under rewriting and the description of its inputs.
        recipe: the recipe of this compile; `recipe.for_layer(name)` applies the overrides by name.
        options: the other options of this compile.
        phase: which of the forms is being built.
        weights: gives quantize_linear the packed form of a parameter.
        attached: the model owns packed tensors, so a linear over a 16-bit weight is meant to stay.
        caches_on_host: the caches of this phase lie in host memory.
        exported: the result is an ExportedProgram: one flat graph, and no runtime that supplies further inputs.
        refreshing: indices of the attentions that refresh in a MIXED phase.
        trust_mask_inputs: a mask that is an argument may be taken for a prefix, since the runtime looks at every call.
        sites: the attentions that may run sparse, filled by sparsify_attention.
        extra_inputs: providers of the graph inputs that passes appended, in order.
        packed_from: packed graph input -> position of the parameter that it packs.
        mask_lengths: valid length that was counted in a mask input -> which input.
        prefix_inputs: position of a mask input that is taken for a prefix -> how many tokens it must at least keep.
    """

    capture: Capture
    recipe: Recipe
    options: BackendOptions
    phase: Phase
    weights: Any = None
    attached: bool = False
    caches_on_host: bool = False
    exported: bool = False
    refreshing: frozenset[int] = frozenset()
    trust_mask_inputs: bool = True
    sites: list[AttentionSite] = dataclasses.field(default_factory=list)
    extra_inputs: list[Any] = dataclasses.field(default_factory=list)
    packed_from: dict[fx.Node, int] = dataclasses.field(default_factory=dict)
    mask_lengths: dict[fx.Node, MaskInput] = dataclasses.field(default_factory=dict)
    prefix_inputs: dict[int, int] = dataclasses.field(default_factory=dict)

    def add_input(self, name: str, example: torch.Tensor, provider: Any) -> fx.Node:
        """A graph input that `provider.resolve(args, frame)` supplies at every call; one for equal providers.

        The tensor is never bound at compile time: one graph may serve many modules.
        """
        if provider in self.extra_inputs:
            return self.capture.placeholders[len(self.capture.inputs) + self.extra_inputs.index(provider)]
        graph = self.capture.module.graph
        last = self.capture.placeholders[-1] if self.capture.placeholders else None
        with graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder(name)
        fake_mode = _compat.fake_mode_of(graph)
        node.meta["val"] = example if _compat.is_fake(example) else fake_mode.from_tensor(example, static_shapes=True)
        _compat.mark_extra_placeholder(node, stays=not isinstance(provider, Scalar))
        self.extra_inputs.append(provider)
        return node

    def phase_of(self, site: AttentionSite) -> Phase:
        """What one attention does in the form that is being built."""
        if self.phase is not Phase.MIXED:
            return self.phase
        return Phase.REFRESH if site.index in self.refreshing else Phase.SPARSE

    def owner_name(self, node: fx.Node) -> str | None:
        """Dotted name of the module that owns the weight `node`, without its last part (`blocks.0.attn1.to_q`)."""
        index = self.input_index(node)
        if index is None or index >= len(self.capture.inputs):
            return None
        return self.capture.inputs[index].name.rpartition(".")[0]

    def input_index(self, node: fx.Node) -> int | None:
        """Position of a placeholder among the graph's inputs, or None for any other node."""
        if node.op != "placeholder":
            return None
        return self.capture.placeholders.index(node)


class GraphPass(abc.ABC):
    """A named rewrite of one ATen graph.

    The manager dumps the graph before and after, times the pass, lints the graph and wraps what it raises. `run`
    edits `graph` in place and returns a PassResult.

    Attributes:
        name: the stem of the file; unique in the registry.
        after, before: names of passes that this one must follow or precede.
    """

    name: str
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    @abc.abstractmethod
    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        """Rewrite `graph`."""


class FunctionPass(GraphPass):
    """A pass made of a user's function `fn(graph, context)`, which may return a PassResult, a count or None."""

    def __init__(self, fn: Callable[..., Any], name: str, after: tuple[str, ...], before: tuple[str, ...]) -> None:
        self.fn, self.name, self.after, self.before = fn, name, after, before

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        result = self.fn(graph, context)
        if isinstance(result, PassResult):
            return result
        return PassResult(matched=result if isinstance(result, int) else 0)


def upstream(node: fx.Node, limit: int | None = None) -> Iterator[fx.Node]:
    """`node` and what it is computed from, nearest first, placeholders left out; it ends once `limit` were found."""
    frontier, seen = [node], {node}
    while frontier and (limit is None or len(seen) < limit):
        one = frontier.pop(0)
        yield one
        for parent in one.all_input_nodes:
            if parent not in seen and parent.op != "placeholder":
                seen.add(parent)
                frontier.append(parent)


def describe(node: fx.Node) -> str:
    """`linear_3 (blocks.0.attn1.to_q)`: a node as reports and errors name it."""
    path = module_path(node)
    return node.name if path == node.name else f"{node.name} ({path})"


def call(graph: fx.Graph, like: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Add a call with its fake value; provenance (module stack, stack trace) is that of `like`.

    Calls whose inputs have equal metadata share a value, which is kept with the graph: a fake op takes a millisecond.
    """
    node = graph.call_function(target, args)
    node.meta = {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta")}
    known = _VALUES.setdefault(graph, {})
    key = _key_of((target, *args))
    if key is None or key not in known:
        values = fx.map_arg(args, lambda n: n.meta["val"])
        with _compat.fake_mode_of_value(values):
            known[key] = target(*values)
    node.meta["val"] = known[key]
    return node


def splice(graph: fx.Graph, before: fx.Node, fn: Callable[..., Any], *args: Any) -> Any:
    """Trace `fn` on the fake values of `args` and insert the resulting ATen nodes before `before`.

    A graph's repeated blocks ask for the same again and again: what was traced is kept with the graph, and copied where
    the function, its constants and the metadata of its inputs are the same.

    Args:
        args: nodes (their `meta["val"]` is traced) or constants.

    Returns:
        the node, or tuple of nodes, that stand for what `fn` returned.
    """
    nodes = [a for a in args if isinstance(a, fx.Node)]

    def call(*values: torch.Tensor) -> Any:
        rest = iter(values)
        return fn(*(next(rest) if isinstance(a, fx.Node) else a for a in args))

    known = _TRACED.setdefault(graph, {})
    key = _key_of((fn, *args))
    traced = known.get(key) or _compat.trace_fake(call, [n.meta["val"] for n in nodes])
    if key is not None:
        known[key] = traced
    mapping = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    for attribute, value in _compat.tensor_constants(traced):
        setattr(graph.owning_module, attribute, value)
    with graph.inserting_before(before):
        output = graph.graph_copy(traced.graph, mapping)
    stack = before.meta.get("nn_module_stack")
    for old, new in mapping.items():
        if old.op != "placeholder" and stack is not None:
            new.meta.setdefault("nn_module_stack", stack)
    return output


_VALUES: weakref.WeakKeyDictionary[fx.Graph, dict[Hashable, Any]] = weakref.WeakKeyDictionary()
_TRACED: weakref.WeakKeyDictionary[fx.Graph, dict[Hashable, fx.GraphModule]] = weakref.WeakKeyDictionary()
_PLAIN = (type(None), bool, int, str, torch.dtype, torch.device, torch._ops.OpOverload)
_CODE = (types.CodeType, types.BuiltinFunctionType)


def _key_of(value: Any) -> Hashable:
    """What tells a traced function, a constant or an input from another; None where that is not known."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
        if not isinstance(value, torch.Tensor):
            return None
        layout = (*value.shape, *value.stride(), value.storage_offset())
        return (value.dtype, value.device, layout) if all(type(n) is int for n in layout) else None
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        value = (value.__code__, value.__defaults__, value.__kwdefaults__, *cells)
    if isinstance(value, tuple):
        keys = tuple(_key_of(v) for v in value)
        return None if None in keys else keys
    if isinstance(value, float):
        return float, repr(value)  # 0.0 and -0.0 are equal, and are not the same
    return (type(value), value) if isinstance(value, (*_PLAIN, *_CODE)) else None
