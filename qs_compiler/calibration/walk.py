"""Run a model up to the calls of some of its modules, and let the caller compute what those calls return.

    walks = [Walk(model, args, kwargs, blocks) for args, kwargs in samples]
    with stops_at(blocks), walking(walks):
        calls = [walk.advance() for walk in walks]                  # every sample waits at its first block
        calls = [walk.advance(block_of(call)) for ...]              # and goes on to the second

Whatever a model does between its blocks (embeddings, concatenations, skip connections) is its own code, run once a
sample: nothing about the model has to be known, and no activations are stored but those that its frames hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

_CURRENT = threading.local()


class _Stopped(BaseException):
    """Unwinds a walk that is given up; no `except Exception` of a model may catch it."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `module` that waits for its result."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Walk:
    """One forward in a thread of its own, which runs only while `advance` waits for it. Nothing is differentiated.

    Args:
        fn: what to call, usually a module.
        stops: modules whose calls wait for the caller; needs `stops_at` around it.
        autocast: context manager factory that is entered around the call.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        stops: Iterable[nn.Module],
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.result: Any = None
        self.stops = frozenset(stops)
        self._to_walk: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._to_caller: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._run = lambda: fn(*args, **kwargs)
        self._autocast = autocast
        self._thread: threading.Thread | None = None

    def advance(self, value: Any = None) -> Call | None:
        """Give the waiting call its result (nothing at the start); the next call, or None at the end.

        At the end `result` holds what the forward returned. What the forward raises is raised here.
        """
        if self._thread is None:
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            self._thread = threading.Thread(target=self._body, args=(device,), daemon=True)
            self._thread.start()
        else:
            self._to_walk.put(value)
        kind, payload = self._to_caller.get()
        if kind == "call":
            return payload
        self._thread.join()
        if kind == "error":
            raise payload
        self.result = payload
        return None

    def close(self) -> None:
        """Give the forward up, wherever it is."""
        if self._thread is not None and self._thread.is_alive():
            self._to_walk.put(_Stopped)
            self._thread.join()

    def wait_at(self, call: Call) -> Any:
        """Called in the walk's own thread: hand `call` to the caller and wait for its result."""
        self._to_caller.put(("call", call))
        value = self._to_walk.get()
        if value is _Stopped:
            raise _Stopped
        return value

    def _body(self, device: int | None) -> None:
        _CURRENT.walk = self
        if device is not None:
            torch.cuda.set_device(device)  # the current device is a thread's own
        try:
            with torch.no_grad(), self._autocast():
                self._to_caller.put(("done", self._run()))
        except _Stopped:
            pass
        except BaseException as error:  # belongs to the caller, whatever it is
            self._to_caller.put(("error", error))


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While open, each module computes what its entry says. Hooks of the modules run as ever."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextlib.contextmanager
def stops_at(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, calls of `modules` wait for the caller in walks that stop there; other calls run as ever."""

    def waiting(module: nn.Module) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            walk = getattr(_CURRENT, "walk", None)
            if walk is None or module not in walk.stops:
                return original(*args, **kwargs)
            return walk.wait_at(Call(module, args, kwargs))

        return forward

    with replaced_forwards({module: waiting(module) for module in modules}):
        yield


@contextlib.contextmanager
def walking(walks: list[Walk]) -> Iterator[list[Walk]]:
    """Give up, at the end, every walk that has not ended."""
    try:
        yield walks
    finally:
        for walk in walks:
            walk.close()
