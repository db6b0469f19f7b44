"""Caches in pinned host memory, copied to the device and back on a stream beside its computation.

A graph holds no host tensor but a handle, (number of the cache, how often it was written), from which the ops `fetch`
and `send` find it here. Per kind of cache two staging buffers on the device are all that it takes there:

    fetch   wait for the copy into a staging buffer, copy from it to what the graph gets, then let the freed buffer take
            the cache that follows, so that layer i + 1 and i + 2 come in while layer i computes
    send    copy into a staging buffer; the way to the host begins when that is done, and nobody waits for it

What follows is what followed last time, in a refresh or a sparse step: a guess. A cache that was guessed wrongly, or
written since, is copied when it is asked for; a buffer's contents are known by number and write count.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
import types
import weakref
from typing import Any

import torch

from .cache_layout import Slot

BUFFERS = 2  # staging buffers for each kind of cache, hence how many layers ahead a copy begins

_NUMBERS = itertools.count(1)
_CACHES: weakref.WeakValueDictionary[int, HostCache] = weakref.WeakValueDictionary()
_TRANSFERS: weakref.WeakValueDictionary[torch.device, Transfers] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()
_pinned = types.SimpleNamespace(now=0, most=0)  # bytes of all host caches


class HostCache:
    """One cache tensor in host memory.

    Attributes:
        tensor: its values, pinned where the device is a GPU. Ask `value()`, which waits for copies under way.
        kind: caches of one kind share staging buffers.
        handle: what stands for it in a graph, (2,) int64 on the CPU.
        writes: how often it was written.
    """

    def __init__(self, kind: str, slot: Slot, device: torch.device) -> None:
        self.kind, self.writes = (kind, slot.nbytes), 0
        self.transfers = transfers_of(device)
        self.number = next(_NUMBERS)
        with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
            self.tensor = torch.zeros(slot.shape, dtype=slot.dtype, pin_memory=device.type == "cuda")
            self.handle = torch.tensor([self.number, 0])
        _count(slot.pinned_bytes)
        weakref.finalize(self, _count, -slot.pinned_bytes).atexit = False
        self.follower: weakref.ref[HostCache] | None = None
        _CACHES[self.number] = self

    def value(self) -> torch.Tensor:
        """The values, once every copy that was started is done."""
        self.transfers.synchronize()
        return self.tensor


def reusable_bytes() -> int:
    """Pinned bytes of caches that are gone: torch keeps them for the next ones."""
    return _pinned.most - _pinned.now


def _count(nbytes: int) -> None:
    _pinned.now += nbytes
    _pinned.most = max(_pinned.most, _pinned.now)


def cache_of(handle: torch.Tensor) -> HostCache:
    """The cache that a handle stands for."""
    return _CACHES[int(handle[0])]


def transfers_of(device: torch.device) -> Transfers:
    """The one Transfers of a device; it lives, with its staging buffers, as long as a cache that uses it."""
    with _LOCK:
        found = _TRANSFERS.get(device)
        if found is None:
            found = _TRANSFERS[device] = Transfers(device)
        return found


@dataclasses.dataclass(eq=False)
class Staging:
    """A buffer on the device, and the events after which it may be read and overwritten."""

    memory: torch.Tensor
    filled: Any
    free: Any
    holds: tuple[int, int] | None = None  # number and write count of the cache whose values it has

    def view(self, cache: HostCache) -> torch.Tensor:
        """The buffer as a tensor like the cache."""
        return self.memory.view(cache.tensor.dtype).view(cache.tensor.shape)


class Transfers:
    """The copies between one device and the host caches of all videos that run there."""

    def __init__(self, device: torch.device, streams: Any = None) -> None:
        self.device = device
        self._streams = streams or (CudaStreams(device) if device.type == "cuda" else CpuStreams())
        self._copies = self._streams.new()
        self._buffers: dict[tuple[str, int], list[Staging]] = collections.defaultdict(list)
        self._last: dict[tuple[str, int], weakref.ref[HostCache]] = {}
        self._lock = threading.RLock()

    def fetch(self, cache: HostCache) -> torch.Tensor:
        """A copy of the cache on the device, in the order of its current stream."""
        with self._lock:
            self._note(cache)
            current, followers = self._streams.current(), self._followers(cache)
            wanted = [_key(f) for f in followers]
            staging = self._staged(cache) or self._load(cache, wanted)
            current.wait_event(staging.filled)
            out = torch.empty(cache.tensor.shape, dtype=cache.tensor.dtype, device=self.device)
            self._streams.copy(out, staging.view(cache), current)
            staging.free.record(current)
            staging.holds = None
            for follower in followers:
                if self._staged(follower) is None:
                    self._load(follower, wanted)
            return out

    def send(self, value: torch.Tensor, cache: HostCache) -> None:
        """Begin to overwrite the cache with `value` (like it, on the device), which may change afterwards."""
        with self._lock:
            self._note(cache)
            current, staging = self._streams.current(), self._take(cache, [])
            current.wait_event(staging.filled)
            current.wait_event(staging.free)
            self._streams.copy(staging.view(cache), value, current)
            staging.filled.record(current)
            self._copies.wait_event(staging.filled)
            self._streams.copy(cache.tensor, staging.view(cache), self._copies)
            staging.free.record(self._copies)
            cache.writes += 1
            staging.holds = None

    def synchronize(self) -> None:
        """Wait for every copy that was started."""
        self._copies.synchronize()

    def _load(self, cache: HostCache, wanted: list[tuple[int, int]]) -> Staging:
        """Begin to copy a cache into a staging buffer."""
        staging = self._take(cache, wanted)
        self._copies.wait_event(staging.free)
        self._streams.copy(staging.view(cache), cache.tensor, self._copies)
        staging.filled.record(self._copies)
        staging.holds = _key(cache)
        return staging

    def _take(self, cache: HostCache, wanted: list[tuple[int, int]]) -> Staging:
        """A staging buffer for the kind of `cache`: a new one, or that of longest ago whose contents are not wanted."""
        buffers = self._buffers[cache.kind]
        if len(buffers) < BUFFERS:
            with torch.inference_mode(False):
                memory = self._streams.allocate(cache.kind[1], self.device, self._copies)
            buffers.append(Staging(memory, self._streams.event(), self._streams.event()))
            return buffers[-1]
        staging = next((b for b in buffers if b.holds not in wanted), buffers[0])
        buffers.remove(staging)
        buffers.append(staging)
        return staging

    def _staged(self, cache: HostCache) -> Staging | None:
        return next((b for b in self._buffers[cache.kind] if b.holds == _key(cache)), None)

    def _note(self, cache: HostCache) -> None:
        """Learn what follows what."""
        last = self._last.get(cache.kind, lambda: None)()
        if last is not None:
            last.follower = weakref.ref(cache)
        self._last[cache.kind] = weakref.ref(cache)

    def _followers(self, cache: HostCache) -> list[HostCache]:
        """What is probably fetched next, as many as there are staging buffers."""
        found: list[HostCache] = []
        follower = cache.follower() if cache.follower is not None else None
        while follower is not None and follower is not cache and follower not in found and len(found) < BUFFERS:
            found.append(follower)
            follower = follower.follower() if follower.follower is not None else None
        return found


def _key(cache: HostCache) -> tuple[int, int]:
    return cache.number, cache.writes


class CudaStreams:
    """Streams, events and copies of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new(self) -> torch.cuda.Stream:
        """A stream beside those that compute."""
        return torch.cuda.Stream(self._device)

    def current(self) -> torch.cuda.Stream:
        """The stream that computes."""
        return torch.cuda.current_stream(self._device)

    def event(self) -> torch.cuda.Event:
        """Something to wait for; done until it is recorded."""
        return torch.cuda.Event()

    def allocate(self, nbytes: int, device: torch.device, user: torch.cuda.Stream) -> torch.Tensor:
        """Bytes that `user` may use too until they are freed."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        user.wait_stream(self.current())  # what the memory was before may still be in use there
        memory.record_stream(user)
        return memory

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Copy in the order of `stream`."""
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)


class CpuStreams:
    """The same where everything happens at once."""

    def new(self) -> CpuStreams:
        return self

    def current(self) -> CpuStreams:
        return self

    def event(self) -> CpuStreams:
        return self

    def allocate(self, nbytes: int, device: torch.device, user: Any) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        to.copy_(source)

    def wait_event(self, event: Any) -> None:
        """Done already."""

    def record(self, stream: Any) -> None:
        """Done already."""

    def synchronize(self) -> None:
        """Done already."""
