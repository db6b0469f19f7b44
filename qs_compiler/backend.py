"""The torch.compile backend "quantsparse": options -> capture -> passes -> compile -> runtime."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from . import _compat
from .artifact import package_versions
from .capture import Capture, capture_dynamo
from .dump import GraphDump, new_report
from .errors import DeviceError, QuantSparseError, UnsupportedError
from .lowering import collect_fallbacks, register_lowerings, source_files
from .options import BackendOptions
from .passes import PassContext, Phase, run_passes
from .passes.manager import user_passes_fingerprint
from .passes.quantize_linear import KEPT
from .runtime.graph import CompiledGraph, Variant, raising
from .runtime.weights import CallTimeWeights

log = logging.getLogger("qs_compiler")

DEVICES = ("cpu", "cuda")
EIGENVECTORS = torch.ops.quantsparse.low_rank.default  # they are checked on the host


def quantsparse(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Any = None, **_: Any
) -> Callable[..., Any]:
    """Compile one Dynamo graph. Use as `torch.compile(model, backend="quantsparse", options={...})`.

    Args:
        mode: one of Inductor's modes; `options={"mode": ...}` where options are given too.
        options: the options of `BackendOptions`.

    Returns:
        the compiled graph, or a callable that raises a QuantSparseError: an exception raised here would reach the
        caller as BackendCompilerFailed.
    """
    return _compile(module, example_inputs, mode, options, attached=False)


def quantsparse_attached(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Any = None, **_: Any
) -> Callable[..., Any]:
    """The same backend for a model whose linears own their packed tensors: what is still 16-bit is meant to stay."""
    return _compile(module, example_inputs, mode, options, attached=True)


def _compile(
    module: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: Any, attached: bool
) -> Callable[..., Any]:
    try:
        parsed = BackendOptions.parse(options, mode)
        _check(parsed, example_inputs)
        if _on_cuda(example_inputs):
            _compat.start_compile_workers()
        return GraphCompiler(module, example_inputs, parsed, attached).compile(example_inputs)
    except QuantSparseError as error:
        return raising(error)


def _check(options: BackendOptions, example_inputs: Sequence[Any]) -> None:
    if options.recipe.format == "off" and not options.recipe.sparse:
        return
    tensors = [t for t in example_inputs if isinstance(t, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise UnsupportedError(
            f"recipe '{options.recipe}' is for inference and gradients are required here; run the model under "
            "torch.no_grad() or torch.inference_mode(), or use recipe 'off' for training."
        )
    for tensor in tensors:
        if tensor.device.type not in DEVICES:
            raise DeviceError(
                f"an input lies on '{tensor.device}', and this backend compiles for {' and '.join(DEVICES)}; "
                "move the model there, or compile it with another backend."
            )


class GraphCompiler:
    """Compiles the phases of one graph. It lives as long as the graph, so it keeps no inputs: a block's are 0.7 GiB."""

    def __init__(
        self, module: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions, attached: bool
    ) -> None:
        self.options, self.attached = options, attached
        self.capture = capture_dynamo(module, example_inputs)
        self.report = new_report(_model_name(module), str(options.recipe))
        self.dump = GraphDump(options.debug_dir, self.report)

    def compile(self, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile the dense phase now; refresh and sparse follow in the first forward of a run that will need them."""
        dense = self._variant(Phase.DENSE, self.capture.copy(), list(example_inputs), own_context=False)
        self._summarise(dense)
        return CompiledGraph(dense, self.build, self.capture, self.report, self.options)

    def build(
        self,
        phase: Phase,
        args: Sequence[Any],
        caches_on_host: bool,
        refreshing: frozenset[int] = frozenset(),
        trust_mask_inputs: bool = True,
    ) -> Variant:
        """Compile `phase` for the shapes of `args`; in a MIXED one the attentions `refreshing` refresh."""
        return self._variant(
            phase,
            self.capture.specialise(args),
            list(args),
            own_context=True,
            on_host=caches_on_host,
            refreshing=refreshing,
            trust_mask_inputs=trust_mask_inputs,
        )

    def _variant(
        self,
        phase: Phase,
        capture: Capture,
        args: list[Any],
        *,
        own_context: bool,
        on_host: bool = False,
        refreshing: frozenset[int] = frozenset(),
        trust_mask_inputs: bool = True,
    ) -> Variant:
        register_lowerings()
        context = PassContext(
            capture,
            self.options.recipe,
            self.options,
            phase,
            CallTimeWeights(args),
            attached=self.attached,
            caches_on_host=on_host,
            refreshing=refreshing,
            trust_mask_inputs=trust_mask_inputs,
        )
        self.report.passes += run_passes(context, self.dump)
        examples = [node.meta["val"] for node in context.capture.placeholders[len(capture.inputs) :]]
        inputs, patches = [*args, *examples], self._patches()
        if patches.get("triton.cudagraphs") and _compat.calls(context.capture.module, EIGENVECTORS):
            self._leave_out_cuda_graphs(phase, patches, ["low_rank"])
        fn, fallbacks = self._compiled(phase, context, inputs, patches, own_context)
        if patches.get("triton.cudagraphs") and (asking := [op for op, _ in fallbacks if _compat.asks_device(op)]):
            self._leave_out_cuda_graphs(phase, patches, asking)
            fn, fallbacks = self._compiled(phase, context, inputs, patches, own_context)
        self.report.fallbacks += [f for f in dict.fromkeys(fallbacks) if f not in self.report.fallbacks]
        self.dump.write_report()
        if fallbacks and self.options.strict:
            text = "; ".join(f"{op}: {reason}" for op, reason in fallbacks)
            raise UnsupportedError(f"strict=True, and these ops have no kernel here: {text}.")
        return Variant(phase, fn, context)

    def _compiled(
        self, phase: Phase, context: PassContext, inputs: list[Any], patches: dict[str, Any], own_context: bool
    ) -> tuple[Callable[..., Any], list[tuple[str, str]]]:
        """What Inductor makes of a rewritten graph, and the (op, reason) that it left to their references on CUDA."""
        start = time.perf_counter()
        with collect_fallbacks() as fallbacks, _compat.generated_code() as codes:
            fn = _compat.compile_graph(context.capture.module, inputs, patches, own_context=own_context)
        spent = self.report.compile_seconds.get(phase.value, 0.0) + time.perf_counter() - start
        self.report.compile_seconds[phase.value] = round(spent, 3)
        for number, code in enumerate(codes):
            self.dump.write(f"{phase.value}.output_code_{number}.py", code)
        if _on_cuda(inputs):
            fallbacks += _called_references(codes, {op for op, _ in fallbacks})
        return fn, fallbacks

    def _leave_out_cuda_graphs(self, phase: Phase, patches: dict[str, Any], ops: list[str]) -> None:
        patches["triton.cudagraphs"] = False
        self.report.notes.append(f"{phase.value}: no CUDA graph, since {', '.join(ops)} waits for the device")

    def _patches(self) -> dict[str, Any]:
        user = user_passes_fingerprint()
        key = None if user is None else json.dumps([package_versions(), self.options.fingerprint(), user])
        files = sorted({*source_files(), *(str(p) for p in Path(__file__).parent.glob("passes/*.py"))})
        return {
            **_compat.mode_patches(self.options.mode),
            "post_grad_custom_pre_pass": _compat.fingerprint_pass(files, key),
        }

    def _summarise(self, dense: Variant) -> None:
        by_name = {p.name: p for p in self.report.passes if p.phase == Phase.DENSE.value}
        for field, name in (("linears", "quantize_linear"), ("attentions", "sparsify_attention")):
            found = by_name.get(name)
            if found is not None:
                setattr(self.report, field, (found.matched, found.matched + len(found.skipped)))
        log.info("%s", self.report.line())
        self.dump.write_report()
        if self.options.strict and self.options.recipe.format != "off":
            self._refuse_skips(by_name)

    def _refuse_skips(self, by_name: dict[str, Any]) -> None:
        """strict=True: what was asked for and cannot be compressed is an error."""
        wanted = [by_name["quantize_linear"]]
        if self.options.recipe.sparse:
            wanted.append(by_name["sparsify_attention"])
        skipped = [f"{node}: {reason}" for p in wanted for node, reason in p.skipped if reason != KEPT]
        if skipped:
            raise UnsupportedError(
                f"strict=True, and {len(skipped)} operations stay uncompressed: {'; '.join(skipped[:5])}"
                f"{'; ...' if len(skipped) > 5 else ''}. List them in the recipe's `keep`, or leave out strict."
            )


def _on_cuda(inputs: Sequence[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs)


def _called_references(codes: list[str], known: set[str]) -> list[tuple[str, str]]:
    """Ops of ours that generated CUDA code calls eagerly; lowering gave no reason where the code is from a cache."""
    called = {op for code in codes for op in re.findall(r"torch\.ops\.quantsparse\.(\w+)\.\w+\(", code)}
    copies = {"fetch", "send"}  # of caches in host memory: calls are what they are meant to be
    return [(op, "the generated code calls its reference") for op in sorted(called - known - copies)]


def _model_name(module: fx.GraphModule) -> str:
    """Stem of the source file that holds the traced forward, such as transformer_wan; Dynamo keeps no class name."""
    for node in module.graph.nodes:
        if found := re.search(r'File "([^"]+)", line \d+, in forward', node.meta.get("stack_trace") or ""):
            return Path(found[1]).stem
    return "graph"


__all__ = ["quantsparse"]
