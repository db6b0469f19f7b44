"""The same passes over an ExportedProgram, whose weights become packed buffers.

Before:  p_blocks_0_to_q_weight: "bf16[768, 768]"                                       (PARAMETER)
         linear = torch.ops.aten.linear.default(x, p_blocks_0_to_q_weight, p_blocks_0_to_q_bias)
After:   b_blocks_0_to_q_wq: "i8[768, 768]", b_blocks_0_to_q_ws: "f32[768]"             (BUFFER)
         xq, xs = torch.ops.quantsparse.quantize_rows.default(x, None, None, "int8")
         linear = torch.ops.quantsparse.linear.default(xq, xs, b_..._wq, b_..._ws, p_..._bias, torch.bfloat16)

A program is first brought into the form that the export of an attached model has: `aten.linear` over
`quantsparse.dequantize`, buffers named as PackedLinear names them. From there on both are the same.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from . import _compat
from .artifact import TENSOR_NAMES, Artifact
from .blocks import block_of, repeated_blocks
from .capture import Capture, GraphInput, Kind, capture_exported
from .dump import GraphDump, PassReport, new_report
from .errors import ArtifactError, OptionError, UnsupportedError
from .lora import ADAPTER, BASE, is_adapter
from .lowering import register_lowerings
from .options import BackendOptions, Recipe
from .packing import PackedWeight, pack_weight, why_not
from .passes import PassContext, PassResult, Phase, run_passes

log = logging.getLogger("qs_compiler")

aten = torch.ops.aten
DEQUANTIZE = torch.ops.quantsparse.dequantize.default


def compress(
    program: ExportedProgram,
    *,
    recipe: str | Mapping[str, Any] | Recipe | None = None,
    artifact: Artifact | str | os.PathLike[str] | None = None,
    strict: bool = False,
    debug_dir: str | os.PathLike[str] | None = None,
) -> ExportedProgram:
    """Compress an exported program: packed weights instead of the 16-bit ones, low-bit linears, dense attention.

    The result is an ordinary ExportedProgram with custom ops: `torch.export.save` and `load` it, run its `module()`;
    a process that loads it needs `import qs_compiler` first. AOTInductor compiles it with this package's lowerings.
    What `attach` would pack is packed, data-free by `recipe` or from `artifact`. A program exported from an attached
    model owns its packed weights already and takes neither.

    Args:
        program: of `torch.export.export`, not decomposed; it is left as it is. Tensors that stay are shared with it.
        recipe: a dense one; the artifact's, else `w8a8`, by default.
        artifact: an Artifact or its path. The names of the program's parameters must be those of its model.
        strict: a linear that stays uncompressed without being told to is an error.
        debug_dir: where the dumps go (or QS_DEBUG_DIR).

    Returns:
        a new program, validated.

    Raises:
        UnsupportedError: not an ExportedProgram, a recipe with a density, nothing to compress, or `strict`.
        OptionError: an option is ill-typed or in conflict with the artifact or with the program.
        ArtifactError: the artifact is damaged or was made from other weights.
    """
    if not isinstance(program, ExportedProgram):
        raise UnsupportedError(
            f"compress takes an ExportedProgram, not a {type(program).__name__}; call "
            "torch.export.export(model, args, kwargs, strict=False) first, or attach() to compress a model."
        )
    given = {"recipe": recipe, "artifact": artifact, "strict": strict, "debug_dir": debug_dir}
    options = BackendOptions.parse(given)
    _require_dense(options.recipe)
    draft = Draft(program)
    report = new_report(_model_name(draft.graph), str(options.recipe))
    dump = GraphDump(options.debug_dir, report)
    if draft.graph.find_nodes(op="call_function", target=DEQUANTIZE):
        if recipe is not None or artifact is not None:
            raise OptionError(
                "this program was exported from an attached model, whose weights are packed already; leave out "
                "recipe and artifact."
            )
    elif options.recipe.format != "off":
        start = time.perf_counter()
        packed = draft.pack_weights(options.recipe, options.artifact)
        seconds = time.perf_counter() - start
        report.passes.append(PassReport("pack_weights", Phase.DENSE.value, packed.matched, packed.skipped, seconds))
        _check_packed(packed, strict)
    context = PassContext(draft.capture, options.recipe, options, Phase.DENSE, attached=True, exported=True)
    report.passes += run_passes(context, dump)
    register_lowerings()
    (linears,) = (p for p in report.passes if p.name == "quantize_linear")
    report.linears = (linears.matched, linears.matched + len(linears.skipped))
    log.info("%s", report.line())
    dump.write_report()
    return draft.finish()


class Draft:
    """An exported program under rewriting: a copy of its graph, and what each graph input is and holds."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.capture: Capture = capture_exported(program)
        self.signature = copy.deepcopy(program.graph_signature)
        self.state = dict(program.state_dict)
        self.specs = dict(zip(self.capture.placeholders, self.signature.input_specs, strict=True))
        self._inputs = dict(zip(self.specs, self.capture.inputs, strict=True))
        self._buffers: dict[int, tuple[torch.Tensor, fx.Node]] = {}  # held, so that no other tensor has its id
        self._packed: set[Any] = set()  # identities of the tensors whose packed form the program holds

    @property
    def graph(self) -> fx.Graph:
        return self.capture.module.graph

    def pack_weights(self, recipe: Recipe, artifact: Artifact | None) -> PassResult:
        """Let every linear that is to be compressed read its weight out of packed buffers.

        Skipped is what cannot be packed. A linear that stays, for this or by choice, carries the reason in
        `meta["kept"]`, which quantize_linear reports.
        """
        choice = Calibrated(self.state, artifact) if artifact is not None else Rounded(self.graph, recipe)
        result = PassResult()
        operands: dict[Any, tuple[Any, ...]] = {}  # identity of a weight -> what its dequantize takes
        for node in self.graph.find_nodes(op="call_function", target=aten.linear.default):
            x, parameter = node.args[:2]
            spec = self.specs.get(parameter)
            if spec is None or spec.kind is not InputKind.PARAMETER:
                kept = "the weight is computed in the graph" if spec is None else "the weight is not a parameter"
                node.meta["kept"] = kept
                result.skip(node, kept)
                continue
            weight = self.state[spec.target]
            layer, key = spec.target.rpartition(".")[0], _identity(weight)
            if (reason := choice.keeps(node, layer, weight)) is not None:
                node.meta["kept"] = reason
                continue
            if key not in operands:
                packed = choice.pack(layer, weight)
                if isinstance(packed, str):
                    node.meta["kept"] = packed
                    result.skip(node, packed)
                    continue
                operands[key] = self._operands(layer, packed, weight.device)
            with self.graph.inserting_before(node):
                node.update_arg(1, self._dequantize(node, (*operands[key], x.meta["val"].dtype)))
            result.matched += 1
        self.capture.inputs = [self._inputs[p] for p in self.capture.placeholders]
        self._packed.update(operands)
        return result

    def finish(self) -> ExportedProgram:
        """The rewritten program, validated."""
        self._drop_packed_weights()
        placeholders = self.capture.placeholders
        if foreign := [p.name for p in placeholders if p not in self.specs]:
            raise UnsupportedError(
                f"a pass added the graph inputs {', '.join(foreign)}, which only the runtime of torch.compile can "
                "supply; remove the pass, or give it constants."
            )
        (output,) = self.graph.find_nodes(op="output")
        for spec, value in zip(self.signature.output_specs, output.args[0], strict=True):
            if isinstance(value, fx.Node):
                spec.arg = dataclasses.replace(spec.arg, name=value.name)
        self.signature.input_specs = [self.specs[p] for p in placeholders]
        _compat.finish_graph(self.capture.module)
        return ExportedProgram(
            root=self.capture.module,
            graph=self.graph,
            graph_signature=self.signature,
            state_dict=self.state,
            range_constraints=dict(self.program.range_constraints),
            module_call_graph=list(self.program.module_call_graph),
            example_inputs=self.program.example_inputs,
            constants=dict(self.program.constants),
            verifiers=self.program.verifiers,
        )

    def _operands(self, layer: str, packed: PackedWeight, device: torch.device) -> tuple[Any, ...]:
        """What `quantsparse::dequantize` takes of a packed weight: a buffer for each tensor, and the activation."""
        tensors = packed.tensors()
        buffers = [self._buffer(layer, f, tensors[f], device) if f in tensors else None for f in TENSOR_NAMES]
        return *buffers, packed.activation

    def _dequantize(self, linear: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        node = self.graph.call_function(DEQUANTIZE, args)
        node.meta = {k: v for k, v in linear.meta.items() if k not in ("val", "tensor_meta", "kept")}
        with _compat.fake_mode_of(self.graph):
            node.meta["val"] = DEQUANTIZE(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def _buffer(self, layer: str, field: str, tensor: torch.Tensor, device: torch.device) -> fx.Node:
        """The placeholder of a new persistent buffer, after the others; one tensor becomes one buffer."""
        if id(tensor) in self._buffers:
            return self._buffers[id(tensor)][1]
        target = f"{layer}.{field}" if layer else field
        while target in self.state:
            target += "_"
        kinds = (InputKind.PARAMETER, InputKind.BUFFER)
        later = (p for p, s in self.specs.items() if s.kind not in kinds or s.persistent is False)
        before = next(later, None) or next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(before):
            node = self.graph.placeholder("b_" + target.replace(".", "_"))
        node.meta["val"] = _compat.fake_mode_of(self.graph).from_tensor(tensor.to(device), static_shapes=True)
        self.state[target] = tensor.to(device)
        self.specs[node] = InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), target, persistent=True)
        self._inputs[node] = GraphInput(target, Kind.BUFFER)
        self._buffers[id(tensor)] = tensor, node
        return node

    def _drop_packed_weights(self) -> None:
        """Take out every 16-bit weight whose packed form is there and that nothing reads any more."""
        for node in self.capture.placeholders:
            spec = self.specs.get(node)
            if spec is None or spec.kind is not InputKind.PARAMETER or node.users:
                continue
            if _identity(self.state[spec.target]) in self._packed:
                del self.specs[node], self.state[spec.target]
                self.graph.erase_node(node)
        read = {spec.target for spec in self.specs.values()}
        for name in [n for n, t in self.state.items() if n not in read and _identity(t) in self._packed]:
            del self.state[name]


class Rounded:
    """Packs without data what `attach` would pack by a recipe."""

    def __init__(self, graph: fx.Graph, recipe: Recipe) -> None:
        self._recipe, self._blocks = recipe, repeated_blocks(graph)
        linears = graph.find_nodes(op="call_function", target=aten.linear.default)
        self._mixed = any(n.meta["val"].dtype != torch.float32 for n in linears)

    def keeps(self, node: fx.Node, layer: str, weight: torch.Tensor) -> str | None:
        """Why the linear `node` is not meant to be compressed, or None."""
        if self._blocks and block_of(node) not in self._blocks:
            return "outside the repeated blocks"
        if is_adapter(layer):
            return ADAPTER
        if self._recipe.for_layer(layer).format == "off":
            return "kept in 16 bit by the recipe"
        if self._mixed and weight.dtype == torch.float32:
            return "kept in float32 by the model"
        return None

    def pack(self, layer: str, weight: torch.Tensor) -> PackedWeight | str:
        """The packed weight, or why there can be none."""
        recipe = self._recipe.for_layer(layer)
        return why_not(weight, recipe) or pack_weight(weight.detach(), recipe)


class Calibrated:
    """Takes packed weights out of an artifact, which is known then to belong to the program."""

    def __init__(self, state: Mapping[str, torch.Tensor], artifact: Artifact) -> None:
        self._layers = {}
        for layer, packed in artifact.layers.items():
            weight = state.get(f"{layer}.weight", state.get(f"{layer}.{BASE}.weight"))
            if weight is None:
                raise ArtifactError(
                    f"the artifact holds a layer '{layer}', and the program has no parameter '{layer}.weight'; export "
                    "the model that it was calibrated on, the model itself and not a module around it."
                )
            artifact.check_weight(layer, weight)
            self._layers[_identity(weight)] = packed

    def keeps(self, node: fx.Node, layer: str, weight: torch.Tensor) -> str | None:
        """Why the linear `node` is not meant to be compressed, or None."""
        return None if _identity(weight) in self._layers else "kept in 16 bit by the artifact"

    def pack(self, layer: str, weight: torch.Tensor) -> PackedWeight:
        """The packed weight."""
        return self._layers[_identity(weight)]


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor (a tied weight)."""
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _require_dense(recipe: Recipe) -> None:
    if recipe.sparse:
        raise UnsupportedError(
            f"recipe '{recipe}' asks for sparse attention, which takes three graphs (dense, refresh, sparse) and "
            "caches that live from step to step, and an exported program is one graph. "
            f"Use recipe='{recipe.format}' here, or attach() the model to run it sparse."
        )


def _model_name(graph: fx.Graph) -> str:
    """Class of the exported model."""
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            cls = next(iter(stack.values()))[1]
            return (cls if isinstance(cls, str) else cls.__name__).rpartition(".")[2]
    return "graph"


def _check_packed(packed: PassResult, strict: bool) -> None:
    if not packed.matched:
        raise UnsupportedError(
            "the program has no linear that can be packed; export the model without run_decompositions(), and check "
            "the recipe's `keep`."
        )
    if strict and packed.skipped:
        names = "; ".join(f"{node}: {reason}" for node, reason in packed.skipped[:5])
        raise UnsupportedError(
            f"strict=True, and {len(packed.skipped)} linears cannot be packed: {names}"
            f"{'; ...' if len(packed.skipped) > 5 else ''}. List them in the recipe's `keep`, or leave out strict."
        )
