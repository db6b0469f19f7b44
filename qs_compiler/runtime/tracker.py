"""Which video, branch and denoising step a model is computing: the only thing that lets a step run sparse.

When in doubt there is no signal, and without a signal everything runs dense.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import SignalError
from . import seen_grid
from .caches import CacheEntry
from .head_values import note_head_values
from .placement import Place
from .schedule import Decision

_VIDEO_NUMBERS = itertools.count(1)


class Video:
    """One denoising run. Owns its caches, so that no other video can read them.

    Attributes:
        number: counter, unique in the process.
        num_steps: length of the run, or None where it is unknown.
        caches: (anchor id, ordinal, branch, occurrence) -> CacheEntry.
        layers: branch -> how many layers of it have caches.
        decisions: branch -> what an adaptive schedule last decided for it.
        places: (id of a graph's first anchor, branch, sizes) -> where the caches of that call lie. No graph is named:
            one that is compiled again in the middle of a video finds its caches where they were.
    """

    def __init__(self, num_steps: int | None) -> None:
        self.number = next(_VIDEO_NUMBERS)
        self.num_steps = num_steps
        self.caches: dict[tuple[Any, ...], CacheEntry] = {}
        self.layers: collections.Counter[str | None] = collections.Counter()
        self.decisions: dict[str | None, Decision] = {}
        self.places: dict[tuple[Any, ...], Place] = {}
        self._seen: dict[Hashable, tuple[int, int]] = {}
        self._call = 0

    def close(self) -> None:
        """The video is over or was given up: free its caches."""
        for entry in self.caches.values():
            entry.close()
        self.caches.clear()
        self.places.clear()

    def begin_call(self) -> None:
        """A new forward (one step, one branch) starts: occurrences of a layer are counted from zero again."""
        self._call += 1

    def occurrence(self, key: Hashable) -> int:
        """How often the layer `key` has run in the current forward before now."""
        call, count = self._seen.get(key, (self._call, -1))
        count = count + 1 if call == self._call else 0
        self._seen[key] = (self._call, count)
        return count


@dataclasses.dataclass(frozen=True)
class Signal:
    """The step that is being computed."""

    video: Video
    step: int
    num_steps: int
    branch: str | None = None


class ModelTracker:
    """The current signal of a model; experts that share one denoising run share one tracker. One signal a thread.

    Attributes:
        heard: whether a signal was ever given.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._epoch = 0
        self.heard = False

    @property
    def signal(self) -> Signal | None:
        """The signal of this thread, or None."""
        signal, epoch = getattr(self._local, "current", (None, 0))
        return signal if epoch == self._epoch else None

    def set(self, signal: Signal | None) -> None:
        """Announce the forward that comes next in this thread."""
        self._local.current = (signal, self._epoch)
        seen_grid.forget()
        if signal is not None:
            self.heard = True
            signal.video.begin_call()

    def invalidate(self) -> None:
        """Void every signal given so far, in all threads."""
        self._epoch += 1


_TRACKERS: weakref.WeakKeyDictionary[torch.nn.Module, ModelTracker] = weakref.WeakKeyDictionary()
_OWNERS: Any = WeakIdKeyDictionary()  # parameter or buffer -> list of weak references to trackers
_LOCK = threading.Lock()


def track(*modules: torch.nn.Module) -> ModelTracker:
    """The tracker of a model, made at first use; several modules (the experts of one run) come to share one.

    Registers their parameters and buffers, again at every call, so that swapped weights are known too.
    """
    with _LOCK:
        tracker = next((_TRACKERS[m] for m in modules if m in _TRACKERS), None) or ModelTracker()
        for module in modules:
            _TRACKERS[module] = tracker
            note_head_values(module)
            for tensor in itertools.chain(module.parameters(), module.buffers()):
                owners = _OWNERS.setdefault(tensor, [])
                if not any(ref() is tracker for ref in owners):
                    owners[:] = [ref for ref in owners if ref() is not None] + [weakref.ref(tracker)]
        return tracker


def signal_of(tensor: torch.Tensor) -> Signal | None:
    """The signal of the one model that owns `tensor`; None if there is none, or if two of its owners have one."""
    found = [t.signal for ref in _OWNERS.get(tensor, ()) if (t := ref()) is not None and t.signal is not None]
    return found[0] if len(found) == 1 else None


def is_announced(tensor: torch.Tensor) -> bool:
    """Whether somebody announces the steps of a model that owns `tensor`; then nothing is guessed."""
    return any((t := ref()) is not None and t.heard for ref in _OWNERS.get(tensor, ()))


class DenoisingRun:
    """Announces the steps of one video; made by `denoising`."""

    def __init__(self, tracker: ModelTracker, num_steps: int) -> None:
        self._tracker, self._num_steps = tracker, num_steps
        self._video: Video | None = Video(num_steps)
        self._last: dict[str | None, int] = {}

    def step(self, index: int, branch: str | None = None) -> None:
        """Say which step, and which branch of classifier-free guidance, the next forward computes.

        Call it before every forward: once for a batched or embedded guidance, once a branch for a sequential one.

        Args:
            index: 0 to num_steps - 1, never falling within a branch.
            branch: any name that tells the branches apart, for example "cond" and "uncond".

        Raises:
            SignalError: index out of range or falling, or the run is over.
        """
        if self._video is None:
            raise SignalError("this run is over; open a new `with qs_compiler.denoising(...)` for the next video.")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self._num_steps:
            raise SignalError(f"step {index!r} is not within 0 to {self._num_steps - 1} (num_steps={self._num_steps}).")
        if index < self._last.get(branch, 0):
            raise SignalError(
                f"step {index} of branch {branch!r} follows step {self._last[branch]}; "
                "open a new `with qs_compiler.denoising(...)` for a new video."
            )
        self._last[branch] = index
        self._tracker.set(Signal(self._video, index, self._num_steps, branch))

    def caches(self, branch: str | None = None) -> list[CacheEntry]:
        """What the attention layers of `branch` hold, in the order in which they ran: block lists and residuals.

        To look at, before the run is over; empty while every step was dense.
        """
        video = self._video
        return [] if video is None else [entry for key, entry in video.caches.items() if key[2] == branch]

    def close(self) -> None:
        """End the video and free its caches."""
        current = self._tracker.signal
        if current is not None and current.video is self._video:
            self._tracker.set(None)
        if self._video is not None:
            self._video.close()
        self._video = None


@contextlib.contextmanager
def denoising(model: Any, num_steps: int) -> Iterator[DenoisingRun]:
    """Announce the steps of a hand-written denoising loop, so that sparse steps may run.

    Args:
        model: the module (compiled or not, or one whose blocks are compiled), or a list of experts.
        num_steps: steps of this video, at least 1.

    Yields:
        a DenoisingRun; call `run.step(i)`, or `run.step(i, branch="uncond")`, before each forward.

    Raises:
        SignalError: num_steps below 1, or `model` holds no module.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise SignalError(f"num_steps must be a whole number of at least 1, not {num_steps!r}.")
    run = DenoisingRun(track(*modules_of(model)), num_steps)
    try:
        yield run
    finally:
        run.close()


def modules_of(model: Any) -> list[torch.nn.Module]:
    """The modules behind a module, a compiled module, a list of them, or a diffusers pipeline's transformers."""
    if isinstance(model, torch.nn.Module):
        return [getattr(model, "_orig_mod", model)]
    if isinstance(model, (list, tuple)) and model:
        return [m for one in model for m in modules_of(one)]
    parts = [getattr(model, name, None) for name in ("transformer", "transformer_2")]
    found = [getattr(p, "_orig_mod", p) for p in parts if isinstance(p, torch.nn.Module)]
    if not found:
        raise SignalError(
            f"{type(model).__name__} is neither a module nor a pipeline with a transformer; pass the module that runs."
        )
    return found


def invalidate(model: Any = None) -> None:
    """Forget what was learned from a model's weights: packed copies, residual caches and running signals.

    Call it after editing weights in a way that nobody can see, for example `p.data += delta` (fuse_lora).

    Args:
        model: a module or pipeline; None for every model of the process.
    """
    from .weights import forget

    modules = list(_TRACKERS) if model is None else modules_of(model)
    for module in modules:
        if module in _TRACKERS:
            _TRACKERS[module].invalidate()
    forget(None if model is None else [p for m in modules for p in m.parameters()])
