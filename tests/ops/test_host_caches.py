"""fetch and send, and the copies behind them: right in whatever order a device gets round to them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from qs_compiler.ops.library import OpInputError
from qs_compiler.runtime.cache_layout import Slot
from qs_compiler.runtime.host_caches import BUFFERS, HostCache, Transfers, reusable_bytes, transfers_of

quantsparse = torch.ops.quantsparse
CPU = torch.device("cpu")


def host_cache(*shape: int, kind: str = "residual", dtype: torch.dtype = torch.float32) -> HostCache:
    return HostCache(kind, Slot(shape, dtype), CPU)


def test_what_is_sent_is_fetched() -> None:
    cache, value = host_cache(3, 4, dtype=torch.bfloat16), torch.randn(4, 3).mT.bfloat16()
    handle = quantsparse.send(value, cache.handle, None)
    assert handle.tolist() == [cache.number, 1] and torch.equal(cache.value(), value)
    got = quantsparse.fetch(value, cache.handle, [3, 4], torch.bfloat16)
    assert torch.equal(got, value) and got.is_contiguous()
    got.zero_()
    assert torch.equal(cache.value(), value), "a copy is handed out"
    quantsparse.send_(-value, cache.handle, None)
    assert cache.handle.tolist() == [cache.number, 1] and torch.equal(cache.value(), -value)


def test_opcheck() -> None:
    cache = host_cache(3, 4)
    torch.library.opcheck(quantsparse.fetch, (torch.randn(2), cache.handle, [3, 4], torch.float32))
    torch.library.opcheck(quantsparse.send, (torch.randn(3, 4), cache.handle, None))
    torch.library.opcheck(quantsparse.send_, (torch.randn(3, 4), cache.handle, None))


def test_bad_input_is_named() -> None:
    cache = host_cache(3, 4)
    with pytest.raises(OpInputError, match=r"the cache is torch.float32 \[3, 4\].*\[4, 3\]"):
        quantsparse.fetch(torch.randn(2), cache.handle, [4, 3], torch.float32)
    with pytest.raises(OpInputError, match=r"value has shape \(4, 3\)"):
        quantsparse.send(torch.randn(4, 3), cache.handle, None)
    with pytest.raises(OpInputError, match=r"value is float64"):
        quantsparse.send(torch.randn(3, 4).double(), cache.handle, None)
    with pytest.raises(OpInputError, match=r"handle has shape \(1,\)"):
        quantsparse.send(torch.randn(3, 4), cache.handle[:1], None)


def test_what_torch_keeps_for_the_next_caches_is_counted() -> None:
    before = reusable_bytes()
    caches = [host_cache(5, 1000) for _ in range(100)]  # 20,000 bytes each, rounded up to 32 KiB
    during = reusable_bytes()
    assert during <= before
    del caches
    assert reusable_bytes() == max(before, 100 * 2**15)


def test_buffers_go_with_the_last_cache() -> None:
    cache = host_cache(3, 4)
    assert transfers_of(CPU) is cache.transfers
    cache.transfers.fetch(cache)
    before = id(cache.transfers)
    assert len(cache.transfers._buffers[cache.kind]) == 1
    del cache
    assert id(transfers_of(CPU)) != before or not transfers_of(CPU)._buffers


class Queues:
    """Streams whose work is done later, in an order drawn at random among those that events allow; one is faster."""

    def __init__(self, seed: int) -> None:
        self.random, self.queues = random.Random(seed), []
        self.compute = self.new()

    def new(self) -> Queue:
        self.queues.append(Queue(self.random.choice([1, 3, 30])))
        return self.queues[-1]

    def current(self) -> Queue:
        return self.compute

    def event(self) -> Event:
        return Event()

    def allocate(self, nbytes: int, device: torch.device, user: Queue) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: Queue) -> None:
        stream.items.append(lambda: to.copy_(source))

    def finish(self) -> None:
        while ready := [q for q in self.queues if q.items and q.may_run()]:
            self.random.choices(ready, [q.speed for q in ready])[0].items.pop(0)()
        assert not any(q.items for q in self.queues), "streams wait for each other"


class Event:
    def __init__(self) -> None:
        self.recorded = self.done = 0

    def record(self, stream: Queue) -> None:
        self.recorded += 1
        number = self.recorded
        stream.items.append(lambda: setattr(self, "done", number))


class Queue:
    def __init__(self, speed: int) -> None:
        self.speed = speed
        self.items: list[Callable[[], object]] = []

    def wait_event(self, event: Event) -> None:
        self.items.append(Wait(event, event.recorded))

    def may_run(self) -> bool:
        first = self.items[0]
        return not isinstance(first, Wait) or first.event.done >= first.number


class Wait:
    def __init__(self, event: Event, number: int) -> None:
        self.event, self.number = event, number

    def __call__(self) -> None:
        """Nothing: it may run, so the event is done."""


def step(transfers: Transfers, queues: Queues, layers: list[HostCache], version: int | None) -> list[torch.Tensor]:
    """A refresh that writes `version` + layer into every cache, or a sparse step; returns what each layer saw."""
    seen = []
    for i, cache in enumerate(layers):
        if version is None:
            fetched, kept = transfers.fetch(cache), torch.full(cache.tensor.shape, -1.0)
            queues.copy(kept, fetched, queues.compute)  # the kernel that uses it
            seen.append(kept)
        else:
            value = torch.empty(cache.tensor.shape)
            queues.compute.items.append(lambda v=value, x=version + i: v.fill_(x))
            transfers.send(value, cache)
            queues.compute.items.append(lambda v=value: v.fill_(float("nan")))  # its memory is used again
    return seen


@pytest.mark.parametrize("seed", range(40))
def test_copies_in_any_order_that_events_allow(seed: int) -> None:
    """Refreshes and sparse steps of two branches, layers left out, one branch given up: each sees its last refresh."""
    queues = Queues(seed)
    transfers = Transfers(CPU, queues)
    branches = [[host_cache(4) for _ in range(5)] for _ in range(2)]
    for branch in branches:
        for cache in branch:
            cache.transfers = transfers
    expected, seen = [], []
    for round_ in range(3):
        for b, branch in enumerate(branches):
            step(transfers, queues, branch, 1000 * round_ + 100 * b)
        for sparse in range(3):
            for b, branch in enumerate(branches):
                left_out = [c for i, c in enumerate(branch) if (i + sparse) % 4 != 3]
                seen += step(transfers, queues, left_out, None)
                expected += [float(1000 * round_ + 100 * b + branch.index(c)) for c in left_out]
    queues.finish()
    assert [x.tolist() for x in seen] == [[e] * 4 for e in expected]
    assert all(len(buffers) == BUFFERS for buffers in transfers._buffers.values())


def test_layers_come_in_ahead_of_their_use() -> None:
    """After the first step's first layer nothing waits for a copy that did not begin two layers before."""
    queues = Queues(0)
    transfers = Transfers(CPU, queues)
    layers = [host_cache(4) for _ in range(6)]
    step(transfers, queues, layers, 0)
    loads: list[int] = []
    load = transfers._load
    transfers._load = lambda cache, wanted: loads.append(layers.index(cache)) or load(cache, wanted)
    for i, cache in enumerate(2 * layers):
        transfers.fetch(cache)
        assert loads == [j % len(layers) for j in range(i + BUFFERS + 1)]
