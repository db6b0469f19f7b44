"""The only module that touches private torch API.

Names of torch._inductor resolve on first use, so that importing this module (and qs_compiler.ops) stays cheap:
`from qs_compiler._compat import ir, L` imports Inductor, `import qs_compiler._compat` does not.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

# name -> (module, attribute); attribute None means the module itself
_LAZY: dict[str, tuple[str, str | None]] = {
    # lowerings
    "ir": ("torch._inductor.ir", None),
    "L": ("torch._inductor.lowering", None),
    "lowerings": ("torch._inductor.lowering", "lowerings"),
    "register_lowering": ("torch._inductor.lowering", "register_lowering"),
    "V": ("torch._inductor.virtualized", "V"),
    "ops": ("torch._inductor.virtualized", "ops"),
    "FloorDiv": ("torch.utils._sympy.functions", "FloorDiv"),
    # templates
    "SymbolicGridFn": ("torch._inductor.select_algorithm", "SymbolicGridFn"),
    "can_use_tma": ("torch._inductor.utils", "can_use_tma"),
    "get_num_sms": ("torch._inductor.utils", "get_num_sms"),
    "persistent_mm_grid": ("torch._inductor.kernel.mm_common", "persistent_mm_grid"),
    "compile_fx": ("torch._inductor.compile_fx", "compile_fx"),
    # kernels that Inductor generates
    "InductorChoices": ("torch._inductor.choices", "InductorChoices"),
    "FixedTritonConfig": ("torch._inductor.codegen.triton", "FixedTritonConfig"),
    "ReductionHint": ("torch._inductor.runtime.hints", "ReductionHint"),
    # packages of exported programs
    "aoti_compile_and_package": ("torch._inductor", "aoti_compile_and_package"),
    "aoti_load_package": ("torch._inductor", "aoti_load_package"),
    # inspection of generated code (tests)
    "inductor_config": ("torch._inductor.config", None),
    "run_and_get_code": ("torch._inductor.utils", "run_and_get_code"),
    "DebugContext": ("torch._inductor.debug", "DebugContext"),
    "GraphLowering": ("torch._inductor.graph", "GraphLowering"),
    "select_decomp_table": ("torch._inductor.decomposition", "select_decomp_table"),
    "select_algorithm": ("torch._inductor.select_algorithm", None),
    "DeviceProperties": ("torch._inductor.runtime.hints", "DeviceProperties"),
    "ShapeEnv": ("torch.fx.experimental.symbolic_shapes", "ShapeEnv"),
    "CudaInterface": ("torch._dynamo.device_interface", "CudaInterface"),
    "triton_support": ("torch.utils._triton", None),
    "fake_tensor": ("torch._subclasses.fake_tensor", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    found = importlib.import_module(module)
    value = found if attribute is None else getattr(found, attribute)
    globals()[name] = value
    return value


# ---- lowerings and templates ----


def extern_kernel(op) -> Any:
    """A lowering that calls `op` eagerly; unlike Inductor's own handlers it leaves the global fallback set alone."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)


def declare_aligned(box: Any) -> None:
    """Say that an extern kernel's output starts at a multiple of 16 bytes, so that kernels may read it in vectors."""
    from torch._inductor.virtualized import V

    V.graph.unaligned_buffers.discard(box.get_name())


def divide_to_nearest(a: Any, b: Any) -> Any:
    """IR for a / b, rounded to nearest on CUDA too, where Inductor can say so: Triton's own division is approximate."""
    from torch._inductor.ops_handler import OpsHandler
    from torch._inductor.virtualized import ops

    return (ops.div_rn if hasattr(OpsHandler, "div_rn") else ops.truediv)(a, b)


def static_size(size: Any) -> int:
    """A size of the graph being lowered as a number; a symbol is specialised to its value."""
    from torch._inductor.virtualized import V

    sizevars = V.graph.sizevars
    return int((sizevars.guard_int if hasattr(sizevars, "guard_int") else sizevars.evaluate_static_shape)(size))


def size_hint(size: Any, fallback: int = 8192) -> int:
    """What a size of the graph being lowered probably is; nothing is specialised."""
    from torch._inductor.virtualized import V

    sizevars = V.graph.sizevars
    hint = sizevars.optimization_hint if hasattr(sizevars, "optimization_hint") else sizevars.size_hint
    return int(hint(size, fallback=fallback))


def make_template(name: str, grid, source: str) -> Any:
    """A TritonTemplate whose input layouts are frozen (an argument only from torch 2.13 on)."""
    from torch._inductor.select_algorithm import TritonTemplate

    frozen = "always_freeze_layout" in TritonTemplate.__init__.__code__.co_varnames
    return TritonTemplate(name=name, grid=grid, source=source, **({"always_freeze_layout": True} if frozen else {}))


def make_library_choice(name: str, function: Callable[..., Any]) -> Any:
    """A choice beside a template: `function(*nodes, out=...)`, called by generated Python code."""
    from torch._inductor.select_algorithm import ExternKernelChoice

    return ExternKernelChoice(function, name=name)


def select_template(
    name: str, template, configs: list[dict], nodes: list, layout, *, others: Sequence[Any] = (), **common
) -> Any:
    """The TensorBox of `template` over `nodes` with the best of `configs`, or the best of `others`, bound choices.

    Several of them together are benchmarked.
    """
    from torch._inductor.select_algorithm import autotune_select_algorithm

    choices: list = [*others]
    for config in configs:
        error = template.maybe_append_choice(choices, input_nodes=nodes, layout=layout, **common, **config)
        if error is not None and len(configs) == 1:
            raise error
    selected = autotune_select_algorithm(name, choices, nodes, layout)
    return selected[0] if isinstance(selected, tuple) else selected  # a pair from torch 2.13 on


def output_is_used(index: int) -> bool:
    """Whether anything uses output `index` of the node being lowered, an op that returns several."""
    from torch._inductor.virtualized import V

    return any(user.args[1] == index and user.users for user in V.graph.current_node.users)


def symbolic_size(shape_env: Any, value: int) -> torch.SymInt:
    """A new symbol for a size whose value at trace time is `value`."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(f"size_{value}")
    symbol = shape_env.create_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    return shape_env.create_symintnode(symbol, hint=value, source=source)


def cpp_wrapper_active() -> bool:
    """Whether the graph being lowered is emitted as C++ (AOTInductor)."""
    from torch._inductor.virtualized import V

    return bool(V.graph.cpp_wrapper)


# --- graphs: tracing, copying, naming -------------------------------------------------------------------------------


Trace = Callable[[fx.GraphModule, Sequence[Any]], fx.GraphModule]


def retrace_dynamo(
    module: fx.GraphModule,
    prepare: Callable[[fx.Graph], None],
    by_parts: Callable[[fx.GraphModule, Trace], fx.GraphModule | None],
) -> fx.GraphModule:
    """Dynamo's torch-level graph as flat pre-dispatch ATen, with the placeholders' Dynamo identity kept.

    Args:
        prepare: edits a copy of Dynamo's graph before it is traced.
        by_parts: traces that copy by calls of `trace(part, values)`, or returns None: it is traced as a whole then.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    values = [p.meta["example_value"] for p in placeholders]
    fake_mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()
    source = copy_graph_module(module)
    for node in source.graph.find_nodes(op="call_function", target=torch._C._autograd._get_data_attr):
        # x.data escapes the tracer, which would bake a fake tensor into the graph; detach() is traced.
        node.target = torch.ops.aten.detach.default
    prepare(source.graph)

    def trace(part: fx.GraphModule, values: Sequence[Any]) -> fx.GraphModule:
        return make_fx(fx.Interpreter(part).run, pre_dispatch=True)(*_told_apart(values))

    # tracing(None): with a tracing context invoke_subgraph bodies would keep their pre-dispatch form and
    # compile_fx would refuse them.
    with torch._guards.tracing(None), _trace_modes(fake_mode):
        traced = by_parts(source, trace) or trace(source, values)
    _copy_placeholders(module, traced)
    baked = [name for name, value in tensor_constants(traced) if isinstance(value, FakeTensor)]
    if baked:
        raise TypeError(f"a value of the graph escaped the tracer and became the constant {baked[0]}")
    return traced


def retrace_concrete(module: fx.GraphModule, args: Sequence[Any]) -> fx.GraphModule:
    """Trace an ATen graph again for the shapes of `args`; sizes become numbers."""
    fake_mode = FakeTensorMode()
    values = [fake_mode.from_tensor(a, static_shapes=True) if isinstance(a, torch.Tensor) else a for a in args]
    with torch._guards.tracing(None), _trace_modes(fake_mode):
        traced = make_fx(fx.Interpreter(module).run, pre_dispatch=True)(*values)
    _copy_placeholders(module, traced)
    return traced


@contextlib.contextmanager
def _trace_modes(fake_mode: FakeTensorMode) -> Iterator[None]:
    with enable_python_dispatcher(), fake_mode, torch.fx.traceback.preserve_node_meta(), torch.no_grad():
        yield


def trace_fake(fn: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule:
    """Pre-dispatch ATen graph of `fn` on fake tensors of one mode."""
    fake_mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()
    with torch._guards.tracing(None), _trace_modes(fake_mode):
        return make_fx(fn, pre_dispatch=True)(*_told_apart(values))


def _told_apart(values: Sequence[Any]) -> list[Any]:
    """The values as objects of their own: the tracer knows a tensor by its identity, and nodes may share a value."""
    seen: set[int] = set()
    found = []
    for value in values:
        found.append(value.detach() if isinstance(value, torch.Tensor) and id(value) in seen else value)
        seen.add(id(value))
    return found


def copy_graph_module(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own graph; nodes keep their metadata and placeholders their Dynamo identity."""
    graph, mapping = fx.Graph(), {}
    graph.output(graph.graph_copy(module.graph, mapping))
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        if old.op == "placeholder" and hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # graph_copy drops it
    out = fx.GraphModule(module, graph)
    out.meta = dict(module.meta)
    if hasattr(module, "_param_name_to_source"):
        out._param_name_to_source = dict(module._param_name_to_source)
    return out


def source_name(placeholder: fx.Node) -> str | None:
    """Dynamo's source of a placeholder, for example `L['self']._modules['to_q']._parameters['weight']`."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return name() if callable(name) else name


def stack_name(entry: tuple[str, Any]) -> str:
    """Path string of one entry of a node's nn_module_stack."""
    return entry[0]


def mark_extra_placeholder(node: fx.Node, *, stays: bool) -> None:
    """Give a placeholder of ours the attributes that AOTAutograd expects of Dynamo's.

    stays: its tensor keeps its address from call to call, as a parameter does. A CUDA graph then reads and writes it in
    place, and is recorded again if it moves after all; other inputs are copied at every replay and may not be written.
    """
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"} if stays else {}


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode of a graph's values."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    return FakeTensorMode()


def fake_mode_of_value(value: Any) -> Any:
    """The fake mode of the first fake tensor in a nest of arguments."""
    found: list[FakeTensor] = []
    fx.node.map_aggregate(value, lambda v: found.append(v) if isinstance(v, FakeTensor) else None)
    return found[0].fake_mode if found else FakeTensorMode()


def from_fake(value: Any, fake_mode: FakeTensorMode) -> Any:
    """A tensor like `value`, which may be a fake one of another mode, in `fake_mode`."""
    if not isinstance(value, FakeTensor):
        return fake_mode.from_tensor(value, static_shapes=True)
    with fake_mode:
        size, stride = [int(n) for n in value.shape], [int(n) for n in value.stride()]
        return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)


def storage_of(value: Any) -> int | None:
    """What tells the storage of a tensor from others, or the tensor if it has none; None for anything else."""
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse tensor
        return id(value)


def is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def static_hint(value: Any) -> int:
    """A size as a number, without adding a guard: the hint of a symbolic one."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint) if value.node.hint is not None else 0
    return int(value)


def concrete_shape(shape: Sequence[Any], placeholders: Sequence[fx.Node], args: Sequence[Any]) -> tuple[int, ...]:
    """A shape of a graph for one call: symbols take the values of the size inputs that carry them."""
    if not any(isinstance(s, torch.SymInt) for s in shape):
        return tuple(int(s) for s in shape)
    sizes = {
        p.meta["val"].node.expr: value
        for p, value in zip(placeholders, args, strict=True)
        if isinstance(p.meta.get("val"), torch.SymInt)
    }
    return tuple(int(s.node.expr.xreplace(sizes)) if isinstance(s, torch.SymInt) else int(s) for s in shape)


def tensor_constants(module: fx.GraphModule) -> list[tuple[str, torch.Tensor]]:
    """Names and values of the tensors that a traced graph fetches by get_attr."""
    found = [(n.target, getattr(module, n.target)) for n in module.graph.find_nodes(op="get_attr")]
    return [(name, value) for name, value in found if isinstance(value, torch.Tensor)]


def is_view(node: fx.Node) -> bool:
    """Whether a node of a traced graph returns a view of its input, or several."""
    if node.target is operator.getitem:
        return is_view(node.args[0])
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or not op.is_view or op is torch.ops.aten.contiguous.default:
        return False
    value = node.meta["val"][0] if isinstance(node.meta["val"], (tuple, list)) else node.meta["val"]
    return value.dtype == node.all_input_nodes[0].meta["val"].dtype  # a cast is declared a view of what it may return


def calls(module: fx.GraphModule, target: Any) -> bool:
    """Whether a graph, or a body that it calls, calls `target`."""
    graphs = [m.graph for m in module.modules() if isinstance(m, fx.GraphModule)]
    return any(graph.find_nodes(op="call_function", target=target) for graph in graphs)


def asks_device(op: str) -> bool:
    """Whether the reference of one of our ops reads values from the device, which no CUDA graph can record."""
    return torch.Tag.cudagraph_unsafe in getattr(torch.ops.quantsparse, op).default.tags


def finish_graph(module: fx.GraphModule) -> None:
    """Lint a graph and compile it to Python."""
    module.graph.lint()
    module.recompile()


# --- one body for equal parts ---------------------------------------------------------------------------------------


def outline(module: fx.GraphModule, parts: dict[int, list[fx.Node]], shared: dict[int, tuple[str, int]]) -> None:
    """Call equal parts of a flat graph through invoke_subgraph, in place.

    Args:
        parts: part number -> its nodes, in the order of the graph.
        shared: part number -> (identifier, part number whose body is called).
    """
    from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

    graph = module.graph
    # torch 2.11 binds a body's symbols by its own operands alone, so each gets all sizes.
    sizes = [p for p in graph.find_nodes(op="placeholder") if isinstance(p.meta.get("val"), torch.SymInt)]
    for part, (identifier, body) in shared.items():
        nodes, inside = parts[part], set(parts[part])
        given, returned = boundary(nodes)
        operands = list(dict.fromkeys([*given, *sizes]))
        if part == body:
            module.add_submodule(f"submod_{body}", part_of(module, nodes, operands, returned))
        with graph.inserting_before(nodes[-1].next):
            result = graph.call_function(invoke_subgraph, (graph.get_attr(f"submod_{body}"), identifier, *operands))
            for number, node in enumerate(returned):
                item = graph.call_function(operator.getitem, (result, number))
                item.meta = {"val": node.meta["val"]}
                node.replace_all_uses_with(item, lambda user: user not in inside)  # noqa: B023
        for node in reversed(nodes):
            graph.erase_node(node)


def boundary(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a part reads of the rest of its graph, and which of its nodes the rest reads."""
    inside = set(nodes)
    given = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))
    return given, [n for n in nodes if any(user not in inside for user in n.users)]


def part_of(
    module: fx.GraphModule, nodes: list[fx.Node], operands: list[fx.Node], returned: list[fx.Node]
) -> fx.GraphModule:
    """`nodes` as a graph of their own, from `operands` to a tuple of `returned`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for operand in operands:
        copies[operand] = graph.placeholder(operand.name)
        copies[operand].meta = {key: operand.meta[key] for key in ("val", "example_value") if key in operand.meta}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in returned))
    return fx.GraphModule(module, graph)


def _copy_placeholders(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Keep the module metadata and the identity that Dynamo gave to each placeholder."""
    new.meta = dict(old.meta)
    if hasattr(old, "_param_name_to_source"):
        new._param_name_to_source = dict(old._param_name_to_source)
    for a, b in zip(old.graph.find_nodes(op="placeholder"), new.graph.find_nodes(op="placeholder"), strict=True):
        b._dynamo_source = getattr(a, "_dynamo_source", None)
        b.meta["tensor_dict"] = a.meta.get("tensor_dict", {})


# --- compiling ------------------------------------------------------------------------------------------------------

_EAGER_GRAPHS = contextvars.ContextVar("quantsparse_eager_graphs", default=False)


@contextlib.contextmanager
def eager_graphs() -> Iterator[None]:
    """Graphs that are built while this is open run node by node with the ops' references, uncompiled.

    For sweeps over recipes, where compiling would take longer than running: the numbers are those of the references.
    """
    token = _EAGER_GRAPHS.set(True)
    try:
        yield
    finally:
        _EAGER_GRAPHS.reset(token)


_Schemas = dict[tuple[Any, ...], tuple[Any, Any]]
_SCHEMAS: contextvars.ContextVar[_Schemas | None] = contextvars.ContextVar("quantsparse_schemas", default=None)


@contextlib.contextmanager
def one_schema_a_body() -> Iterator[None]:
    """Let torch ask once, not at every call, what a body that `outline` shares writes to.

    Up to torch 2.12 AOTAutograd traces the body anew for each of its calls, twice a phase; later ones remember.
    """
    from torch._guards import InvokeSubgraphCache
    from torch._higher_order_ops.invoke_subgraph import InvokeSubgraphHOP

    before = InvokeSubgraphHOP.gen_schema
    if not hasattr(InvokeSubgraphCache, "get_functionalize_schema_entry") and before.__module__ != __name__:

        def gen_schema(self: Any, subgraph: Any, identifier: str, *operands: Any) -> Any:
            known = _SCHEMAS.get()
            if known is None:  # another backend's graph
                return before(self, subgraph, identifier, *operands)
            key = id(subgraph), identifier, tuple(type(o) for o in operands)
            if key not in known:
                known[key] = before(self, subgraph, identifier, *operands), subgraph  # held: ids are used again
            return known[key][0]

        InvokeSubgraphHOP.gen_schema = gen_schema
    token = _SCHEMAS.set({})
    try:
        yield
    finally:
        _SCHEMAS.reset(token)


def start_compile_workers() -> None:
    """Ask for the processes that compile Triton kernels, which take seconds to start; does not wait.

    Inductor asks when it has the first kernel, and compiles in this process whatever comes before they have started.
    """
    from torch._inductor.async_compile import AsyncCompile

    if not _EAGER_GRAPHS.get():
        AsyncCompile.use_process_pool()


@one_schema_a_body()
def compile_graph(
    module: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any], *, own_context: bool
) -> Callable[..., Any]:
    """compile_fx with config patches for this compile alone.

    Args:
        inputs: one for each placeholder, in Dynamo's compile the real ones that it gave; what stands for an appended
            input, and anything in a compile of its own, may be a fake tensor of another mode.
        own_context: the graph does not take part in the compile that Dynamo is doing (a phase compiled at its first
            call): its shapes are numbers and no guard may reach Dynamo.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from .lowering.decompositions import decompositions
    from .lowering.row_kernels import row_kernels

    if _EAGER_GRAPHS.get():
        return module.forward
    _name_constants(module)
    if not own_context:
        # Dynamo knows nothing of the appended inputs; left to AOTAutograd, their sizes would become symbols.
        fake_mode = torch._guards.TracingContext.get().fake_mode
        examples = [from_fake(t, fake_mode) if is_fake(t) else t for t in inputs]
        with row_kernels():
            return compile_fx(module, examples, config_patches=patches, decompositions=decompositions())
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())  # the compile caches keep nothing that has no ShapeEnv
    fakes = [from_fake(t, fake_mode) if isinstance(t, torch.Tensor) else t for t in inputs]
    own = torch._guards.TracingContext(fake_mode)
    with torch._guards.tracing(own), torch._guards.compile_context(None), row_kernels():
        return compile_fx(module, fakes, config_patches=patches, decompositions=decompositions())


@contextlib.contextmanager
def generated_code() -> Iterator[list[str]]:
    """Collect the texts that Inductor generates, or takes from its cache, in this block."""
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []
    before = GraphLowering.save_output_code

    def save(code: str) -> None:
        codes.append(code)
        if before is not None:
            before(code)

    GraphLowering.save_output_code = staticmethod(save)
    try:
        yield codes
    finally:
        GraphLowering.save_output_code = before


def _name_constants(module: fx.GraphModule) -> None:
    """AOTAutograd wants a source for every tensor that a module holds; tracing added constants of its own."""
    from torch._dynamo.source import ConstantSource

    sources = getattr(module, "_param_name_to_source", None)
    if sources is None:
        return
    for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        sources.setdefault(name, ConstantSource(f"quantsparse_{name}"))


def mode_patches(mode: str | None) -> dict[str, Any]:
    """Inductor's config patches for one of its modes ("reduce-overhead", "max-autotune", ...)."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode)) if mode and mode != "default" else {}


def known_modes() -> list[str]:
    """Names of Inductor's modes."""
    from torch._inductor import list_mode_options

    return list(list_mode_options())


def fingerprint_pass(files: Sequence[str], extra: str | None) -> Any:
    """A CustomGraphPass that does nothing but put the hash of our sources into the keys of Inductor's caches.

    Inductor's caches key on graph text and op names, not on the bodies of our ops and lowerings, nor on who chooses
    kernels. A pass that the user has set in the same slot is kept: it runs and its uuid is part of ours. `extra=None`
    switches caching off.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    from torch._inductor.virtualized import V

    inner = config.post_grad_custom_pre_pass

    class Fingerprint(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            if inner is not None:
                inner(graph)

        def uuid(self) -> Any:
            own = inner.uuid() if isinstance(inner, CustomGraphPass) else None
            if extra is None or (inner is not None and own is None):
                return None
            chooser = type(V.choices)
            return (get_hash_for_files(tuple(files)), extra, own, f"{chooser.__module__}.{chooser.__qualname__}")

    return Fingerprint()


def structured_tracing() -> bool:
    """Whether somebody listens to trace_structured (TORCH_TRACE)."""
    from torch._logging._internal import trace_log

    return bool(trace_log.handlers)


def trace_artifact(name: str, text: str) -> None:
    """Send a text to tlparse."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)


def register_backend_once(fn: Callable[..., Any], name: str) -> None:
    """Register a Dynamo backend unless an installed entry point provides it: both together raise."""
    from importlib.metadata import entry_points

    if any(e.name == name for e in entry_points(group="torch_dynamo_backends")):
        return
    from torch._dynamo.backends.registry import register_backend

    register_backend(fn, name=name)
