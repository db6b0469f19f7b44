"""The callable that the backend returns: step signal -> phase -> compiled graph with this layer's tensors."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..capture import Capture, Kind
from ..dump import Report
from ..errors import DeviceError, UnsupportedError
from ..passes.base import AttentionSite, PassContext, Phase
from .caches import CacheEntry, Frame, tensor_version
from .implicit import ImplicitSignal
from .inputs import Cached, Packed, Provider
from .schedule import Schedule
from .tracker import Signal, is_announced, signal_of
from .weights import packs_for_call

if TYPE_CHECKING:
    from ..options import BackendOptions

log = logging.getLogger("qs_compiler.runtime")

Build = Callable[[Phase, Sequence[Any]], "Variant"]


class Variant:
    """One compiled phase of a graph and what its appended inputs need."""

    def __init__(self, phase: Phase, fn: Callable[..., Any], context: PassContext) -> None:
        self.phase, self.fn = phase, fn
        self.providers: list[Provider] = context.extra_inputs
        self.sites: list[AttentionSite] = context.sites
        self.packed = list(dict.fromkeys((p.index, p.recipe) for p in self.providers if isinstance(p, Packed)))
        extra = context.capture.placeholders[len(context.capture.inputs) :]
        self.specs: list[dict[str, torch.Tensor]] = [{} for _ in self.sites]
        for provider, node in zip(self.providers, extra, strict=True):
            if isinstance(provider, Cached):
                self.specs[provider.site][provider.slot] = node.meta["val"]

    def __call__(self, args: Sequence[Any], frame: Frame) -> Any:
        frame.packs = packs_for_call(self.packed, args)
        return self.fn(*args, *(p.resolve(args, frame) for p in self.providers))


class CompiledGraph:
    """Runs one captured graph in the phase that the step signal allows.

    Args:
        dense: the compiled dense phase.
        build: compiles another phase for the shapes of a call.
        capture: the graph's inputs.
        options: interval, warm-up, gain, strict and memory budget are read here.
    """

    def __init__(
        self, dense: Variant, build: Build, capture: Capture, report: Report, options: BackendOptions
    ) -> None:
        self.dense, self._build, self._report = dense, build, report
        self._schedule = Schedule(options.interval, options.warmup)
        self._gain, self._strict, self._budget = options.recipe.gain, options.strict, options.memory_budget
        self._sizes = [i for i, x in enumerate(capture.inputs) if x.kind is Kind.SIZE]
        self._variants: dict[tuple[int, ...], tuple[Variant, Variant]] = {}
        self._implicit = ImplicitSignal(capture.inputs, options.warmup)
        self._lock = threading.RLock()
        self._warned = False

    def __call__(self, *args: Any) -> Any:
        signal = self._signal(args) if self.dense.sites else None
        step = None if signal is None else self._schedule.refresh_step(signal.step, signal.num_steps)
        if signal is None or step is None:
            return self._run(self.dense, args, Frame())
        refresh, sparse = self._phases(args)
        if not sparse.sites:
            return self._run(self.dense, args, Frame())
        entries = [self._entry(signal, site, args) for site in sparse.sites]
        frame = Frame(entries=entries)
        fits = all(not e.allocate(s) for e, s in zip(entries, sparse.specs, strict=True))
        fresh = all(e.valid_for(args[s.anchor], step) for e, s in zip(entries, sparse.sites, strict=True))
        if fits and fresh and step != signal.step:
            frame.scalars["gain"] = self._gain_at(signal.step - entries[0].computed_at)
            return self._run(sparse, args, frame)
        for entry, spec in zip(entries, refresh.specs, strict=True):
            if entry.allocate(spec):
                entry.refreshed_at = None
        self._check_budget(signal)
        frame.scalars["new_video"] = any(e.refreshed_at is None for e in entries)
        for entry in entries:
            entry.refreshed_at = None  # void while it is being written
        out = self._run(refresh, args, frame)
        for entry, site in zip(entries, sparse.sites, strict=True):
            entry.owner, entry.version = weakref.ref(args[site.anchor]), tensor_version(args[site.anchor])
            entry.refreshed_at, entry.computed_at = step, signal.step
        return out

    def _run(self, variant: Variant, args: Sequence[Any], frame: Frame) -> Any:
        self._report.calls[variant.phase.value] += 1
        return variant(args, frame)

    def _signal(self, args: Sequence[Any]) -> Signal | None:
        anchor = args[self.dense.sites[0].anchor]
        signal = signal_of(anchor)
        if signal is None and not is_announced(anchor):
            self._warn()
            signal = self._implicit.signal(args, anchor)
        return signal

    def _warn(self) -> None:
        if self._warned:
            return
        self._warned = True
        text = (
            f"recipe '{self._report.recipe}' runs dense while nothing says which denoising step this is. Use "
            "qs_compiler.attach(pipe) for a diffusers pipeline, or in your own loop "
            "`with qs_compiler.denoising(model, num_steps) as run:` and run.step(i) before each forward."
        )
        if self._strict:
            raise UnsupportedError(text)
        warnings.warn(text, stacklevel=3)

    def _phases(self, args: Sequence[Any]) -> tuple[Variant, Variant]:
        """Refresh and sparse for the shapes of this call; both are compiled before the first step that needs one."""
        key = tuple(args[i] for i in self._sizes)
        with self._lock:
            if key not in self._variants:
                self._variants[key] = (self._build(Phase.REFRESH, args), self._build(Phase.SPARSE, args))
            return self._variants[key]

    def _entry(self, signal: Signal, site: AttentionSite, args: Sequence[Any]) -> CacheEntry:
        owner = args[site.anchor]
        layer: Hashable = (id(owner), site.ordinal, signal.branch)
        key = (*layer, signal.video.occurrence(layer))
        entry = signal.video.caches.get(key)
        if entry is None or entry.owner() is not owner:
            entry = signal.video.caches[key] = CacheEntry(weakref.ref(owner), tensor_version(owner))
        return entry

    def _check_budget(self, signal: Signal) -> None:
        if self._budget is None:
            return
        needed = sum(t.nbytes for e in signal.video.caches.values() for t in e.tensors.values())
        if needed > self._budget:
            raise DeviceError(
                f"the residual caches of this video need at least {needed} bytes, and memory_budget is {self._budget}; "
                "raise it, choose a smaller cache_format (int8, int4), or run with a dense recipe."
            )

    def _gain_at(self, lag: int) -> float:
        """f(k) of C_k = D + f(k) lowrank(D - D_prev), k steps after the refresh."""
        return {"0": 0.0, "1": 1.0, "k/tau": lag / self._schedule.interval}[self._gain]


def raising(error: Exception) -> Callable[..., Any]:
    """A callable that raises `error`: what the backend raises itself would reach the user as BackendCompilerFailed."""

    def fail(*_: Any) -> Any:
        raise error

    return fail
