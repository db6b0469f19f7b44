"""The callable that the backend returns: step signal -> phase -> compiled graph with this layer's tensors."""

from __future__ import annotations

import logging
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import _compat
from ..capture import Capture, Kind
from ..dump import Report
from ..errors import UnsupportedError
from ..passes.base import AttentionSite, PassContext, Phase
from ..passes.order_tokens import patch_shapes
from .cache_layout import Slot, cache_slots
from .caches import CacheEntry, Frame, tensor_version
from .implicit import ImplicitSignal
from .inputs import Cached, Packed, Provider
from .placement import Demand, Place, belongs_on_host
from .prefix_masks import NO_PREFIX, PREFIX_MASKS
from .schedule import Decision, Schedule
from .seen_grid import see
from .tracker import Signal, is_announced, signal_of
from .weights import packs_for_call

if TYPE_CHECKING:
    from ..options import BackendOptions

log = logging.getLogger("qs_compiler.runtime")

Build = Callable[..., "Variant"]
_TAKE_LENGTHS = (torch.ops.quantsparse.sparse_attention.default, torch.ops.quantsparse.refresh_attention.default)


class Variant:
    """One compiled phase of a graph and what its appended inputs need."""

    def __init__(self, phase: Phase, fn: Callable[..., Any], context: PassContext) -> None:
        self.phase, self.fn = phase, fn
        self.providers: list[Provider] = context.extra_inputs
        self.sites: list[AttentionSite] = context.sites
        self.prefix_inputs = context.prefix_inputs
        self.assumes_prefixes = bool(self.prefix_inputs) and any(
            _compat.calls(context.capture.module, op) for op in _TAKE_LENGTHS
        )
        self.packed = list(dict.fromkeys((p.index, p.recipe) for p in self.providers if isinstance(p, Packed)))
        used = [p for p in self.providers if isinstance(p, Cached)]
        self.slots: list[dict[str, Slot]] = []
        for site in self.sites if used else ():
            layout = cache_slots(site.recipe, site.shape)
            self.slots.append({p.slot: layout[p.slot] for p in used if p.site == site.index})

    def __call__(self, args: Sequence[Any], frame: Frame) -> Any:
        frame.packs = packs_for_call(self.packed, args)
        return self.fn(*args, *(p.resolve(args, frame) for p in self.providers))


class CompiledGraph:
    """Runs one captured graph in the phase that the step signal allows.

    Args:
        dense: the compiled dense phase.
        build: (phase, args, on host, attentions that refresh, whether masks are taken for prefixes) -> another phase
            for the shapes of a call.
        capture: the graph's inputs.
        options: interval, warm-up, gain, strict and memory budget are read here.
    """

    def __init__(self, dense: Variant, build: Build, capture: Capture, report: Report, options: BackendOptions) -> None:
        self.dense, self._build, self._report = dense, build, report
        self._schedule = Schedule.of(options.recipe)
        self._recipe, self._strict, self._budget = options.recipe, options.strict, options.memory_budget
        self._cuda_graphs = bool(_compat.mode_patches(options.mode).get("triton.cudagraphs"))
        self._spares: dict[Hashable, Any] = {}
        self._inputs = capture.placeholders
        self._patches = patch_shapes(capture.module.graph) if options.recipe.needs_grid else []
        self._sizes = [i for i, x in enumerate(capture.inputs) if x.kind is Kind.SIZE]
        self._demands: dict[tuple[int, ...], Demand] = {}
        self._variants: dict[tuple[Any, ...], tuple[Variant, Variant]] = {}
        self._mixed: dict[tuple[Any, ...], Variant] = {}
        self._unassuming: dict[tuple[Any, ...], Variant] = {}
        self._implicit = ImplicitSignal(capture.inputs, options.warmup)
        self._lock = threading.RLock()
        self._warned = False

    def __call__(self, *args: Any) -> Any:
        if self._patches:
            see(_compat.concrete_shape(shape, self._inputs, args) for shape in self._patches)
        signal = self._signal(args) if self.dense.sites else None
        kept = self._kept(args)
        if NO_PREFIX in kept.values():
            self._warn_of_mask("dense and in 16 bit with a mask that hides tokens before some that it keeps")
            return self._run(self._without_assumptions(args), args, Frame())
        step = None if signal is None else self._schedule.refresh_step(signal.step, signal.num_steps)
        if signal is None or step is None:
            if signal is not None:
                self._prepare(signal, args)
            return self._run(self.dense, args, Frame())
        on_host = self._place(signal, args, final=True)
        refresh, sparse = self._phases(args, on_host)
        if not sparse.sites:
            return self._run(self.dense, args, Frame())
        if any(kept.get(position, NO_PREFIX) < least for position, least in sparse.prefix_inputs.items()):
            self._warn_of_mask("dense with a mask that hides video tokens, since its tiles need all")
            return self._run(self.dense, args, Frame())
        entries = [self._entry(signal, site, args) for site in sparse.sites]
        owners, layers = [args[site.anchor] for site in sparse.sites], signal.video.layers[signal.branch]
        if self._schedule.max_drift is not None:
            decision = self._decide(signal)
            plans, taus = [decision.refresh] * len(entries), [decision.tau] * len(entries)
        else:
            late = [self._schedule.late(entry.position, layers, signal.num_steps) for entry in entries]
            plans = [self._schedule.refresh_step(signal.step, signal.num_steps, n) for n in late]
            taus = [self._schedule.tau(p, signal.num_steps, n) for p, n in zip(plans, late, strict=True)]
        planned = frozenset(i for i, plan in enumerate(plans) if plan == signal.step)
        stale = [not entry.valid_for(o, p) for entry, o, p in zip(entries, owners, plans, strict=True)]
        variant = refresh
        if not any(old for i, old in enumerate(stale) if i not in planned):
            variant = self._due(planned, args, on_host, refresh, sparse)
        devices = [owner.device for owner in owners]
        if _allocate(entries, variant.slots, devices, on_host) and variant is not refresh:
            variant = refresh
            _allocate(entries, variant.slots, devices, on_host)
        due = range(len(entries)) if variant is refresh else sorted(planned)
        lags = [signal.step - entry.computed_at for entry in entries]
        frame = Frame(entries=entries)
        frame.scalars["gain"] = [self._gain_at(lag, tau) for lag, tau in zip(lags, taus, strict=True)]
        frame.scalars["new_video"] = [entry.refreshed_at is None for entry in entries]
        for i in due:
            entries[i].refreshed_at = None  # void while it is being written
        out = self._run(variant, args, frame)
        for i in due:
            entries[i].owner, entries[i].version = weakref.ref(owners[i]), tensor_version(owners[i])
            entries[i].refreshed_at, entries[i].computed_at = plans[i], signal.step
        return out

    def _decide(self, signal: Signal) -> Decision:
        """The adaptive decision for this step and branch; the first graph that a step runs makes it for all.

        Reading the drift waits for the step before: what the host was ahead of the device is lost once a step.
        """
        video, branch = signal.video, signal.branch

        def drift() -> float:
            entries = [e for key, e in video.caches.items() if key[2] == branch and "drift" in e.tensors]
            device = entries[0].tensors["drift"].device
            return float(torch.cat([e.tensors["drift"].to(device) for e in entries]).mean())

        last = video.decisions.get(branch)
        decision = self._schedule.decide(signal.step, signal.num_steps, last, drift)
        video.decisions[branch] = decision
        return decision

    def _due(
        self, planned: frozenset[int], args: Sequence[Any], on_host: bool, refresh: Variant, sparse: Variant
    ) -> Variant:
        """The form in which the attentions `planned` refresh and no other; compiled at the first step that needs it."""
        if not planned:
            return sparse
        if len(planned) == len(sparse.sites):
            return refresh
        key = (planned, on_host, *(args[i] for i in self._sizes))
        with self._lock:
            if key not in self._mixed:
                self._mixed[key] = self._build(Phase.MIXED, args, on_host, planned)
            return self._mixed[key]

    def _run(self, variant: Variant, args: Sequence[Any], frame: Frame) -> Any:
        name = variant.phase.value
        self._report.calls[name] = self._report.calls.get(name, 0) + 1
        return variant(args, frame)

    def _kept(self, args: Sequence[Any]) -> dict[int, int]:
        """Position of each mask that a phase takes for a prefix -> how many tokens it keeps, or NO_PREFIX."""
        if not self.dense.sites and not self.dense.assumes_prefixes:
            return {}
        remember = not self._cuda_graphs
        return {position: PREFIX_MASKS.kept(args[position], remember) for position in self.dense.prefix_inputs}

    def _without_assumptions(self, args: Sequence[Any]) -> Variant:
        """The dense phase with the masks as they are; compiled at the first call that needs it."""
        if not self.dense.assumes_prefixes:
            return self.dense
        key = tuple(args[i] for i in self._sizes)
        with self._lock:
            if key not in self._unassuming:
                self._unassuming[key] = self._build(Phase.DENSE, args, False, trust_mask_inputs=False)
            return self._unassuming[key]

    def _warn_of_mask(self, how: str) -> None:
        text = f"recipe '{self._report.recipe}' runs attention {how}."
        if self._strict:
            raise UnsupportedError(text)
        PREFIX_MASKS.warn_once(text)

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

    def _prepare(self, signal: Signal, args: Sequence[Any]) -> None:
        """In a dense step: compile what later steps of this run will run, so that none of them waits for it."""
        on_host = self._place(signal, args, final=False)
        if self._schedule.first_refresh(signal.num_steps) < signal.num_steps:
            self._phases(args, on_host)

    def _place(self, signal: Signal, args: Sequence[Any], *, final: bool) -> bool:
        """Whether the caches of this call lie in host memory; decided at the first refresh of a branch.

        A look before (`final=False`) foretells it, so that caches which fit nowhere are refused at the first step, and
        so that what a refresh will run is compiled then.
        """
        sizes = tuple(args[i] for i in self._sizes)
        anchor = args[self.dense.sites[0].anchor]
        key, places = (id(anchor), signal.branch, sizes), signal.video.places
        place = places.get(key)
        if place is None or (final and not place.settled):
            if sizes not in self._demands:
                self._demands[sizes] = self._demand(args)
            demand = self._demands[sizes]
            used = sum(entry.device_bytes for entry in signal.video.caches.values())
            foreseen = [other for k, other in places.items() if k != key and not other.settled]
            on_host = belongs_on_host(demand, anchor.device, self._budget, used, foreseen, self._cuda_graphs)
            if on_host and self._schedule.max_drift is not None:
                raise UnsupportedError(
                    "the caches of this video go to host memory, and adaptive refreshes read theirs at every step; "
                    "raise memory_budget, choose a smaller cache_format (int4, rank16), or refresh='fixed'."
                )
            place = places[key] = Place(on_host, final, demand)
            self._report.cache_bytes, self._report.cache_place = demand.total, "host" if on_host else "device"
        return place.on_host

    def _demand(self, args: Sequence[Any]) -> Demand:
        """What a branch keeps, from the recipe and the shapes of this call."""
        sites = self.dense.sites
        shapes = [_compat.concrete_shape(site.shape, self._inputs, args) for site in sites]
        slots = [list(cache_slots(s.recipe, shape).values()) for s, shape in zip(sites, shapes, strict=True)]
        layers = tuple(sum(slot.nbytes for slot in layer) for layer in slots)
        pinned = sum(slot.pinned_bytes for layer in slots for slot in layer)
        largest = max(2 * math.prod(shape) for shape in shapes)
        return Demand(layers, pinned, largest, f"{self._recipe}, cache_format {self._recipe.cache_format}")

    def _phases(self, args: Sequence[Any], on_host: bool) -> tuple[Variant, Variant]:
        """Refresh and sparse for the shapes of this call, compiled when one of them is first asked for or foreseen."""
        key = (on_host, *(args[i] for i in self._sizes))
        with self._lock:
            if key not in self._variants:
                built = [self._build(phase, args, on_host) for phase in (Phase.REFRESH, Phase.SPARSE)]
                self._variants[key] = (built[0], built[1])
            return self._variants[key]

    def _entry(self, signal: Signal, site: AttentionSite, args: Sequence[Any]) -> CacheEntry:
        owner = args[site.anchor]
        layer: Hashable = (id(owner), site.ordinal, signal.branch)
        key = (*layer, signal.video.occurrence(layer))
        entry = signal.video.caches.get(key)
        if entry is None or entry.owner() is not owner:
            position = signal.video.layers[signal.branch] if entry is None else entry.position
            signal.video.layers[signal.branch] += entry is None
            entry = signal.video.caches[key] = CacheEntry(weakref.ref(owner), tensor_version(owner), position)
            if self._cuda_graphs:
                entry.adopt(self._spares, key)
        return entry

    def _gain_at(self, lag: int, tau: int) -> float:
        """f(k) of C_k = D + f(k) lowrank(D - D_prev), k steps after a refresh, tau of them after the one before."""
        share = lag / tau
        return {"0": 0.0, "1": 1.0, "k/tau": share, "clipped": min(share, 0.5)}[self._recipe.gain]


def _allocate(
    entries: Sequence[CacheEntry], slots: Sequence[dict[str, Slot]], devices: Sequence[torch.device], on_host: bool
) -> bool:
    """Make caches of a size and place that they had not; what was (re)allocated is void, and True says so."""
    changed = [e.allocate(s, d, on_host) for e, s, d in zip(entries, slots, devices, strict=True)]
    for entry, new in zip(entries, changed, strict=True):
        if new:
            entry.refreshed_at = None
    return any(changed)


def raising(error: Exception) -> Callable[..., Any]:
    """A callable that raises `error`: what the backend raises itself would reach the user as BackendCompilerFailed."""

    def fail(*_: Any) -> Any:
        raise error

    return fail
