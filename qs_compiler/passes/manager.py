"""The ordered registry of passes and the code that runs them over a graph."""

from __future__ import annotations

import hashlib
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any, overload

from ..dump import GraphDump, PassReport
from ..errors import PassError, PassFailed, QuantSparseError
from .base import FunctionPass, GraphPass, PassContext

log = logging.getLogger("qs_compiler.passes")

CLOSING = "outline_repeated_blocks"  # after it a block's nodes lie in a body that all blocks share
_REGISTRY: dict[str, GraphPass] = {}
_BUILT_IN: set[str] = set()


class Registration:
    """Handle of a registered pass; `remove()` takes the pass out again. Usable as a context manager."""

    def __init__(self, name: str, fn: Callable[..., Any] | None) -> None:
        self.name, self._fn = name, fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A decorated function stays callable."""
        if self._fn is None:
            raise PassError(f"pass '{self.name}' is a class, not a function; instantiate its class to call it.")
        return self._fn(*args, **kwargs)

    def remove(self) -> None:
        """Take the pass out of the registry. Graphs that are compiled already keep it."""
        _REGISTRY.pop(self.name, None)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@overload
def register_pass(fn: Callable[..., Any] | type[GraphPass] | GraphPass, /) -> Registration: ...
@overload
def register_pass(
    *, name: str | None = None, after: str | tuple[str, ...] = (), before: str | tuple[str, ...] = ()
) -> Callable[[Callable[..., Any] | type[GraphPass]], Registration]: ...
def register_pass(fn: Any = None, /, *, name: Any = None, after: Any = (), before: Any = ()) -> Any:
    """Register a pass over the pre-dispatch ATen graph; it runs in every later compile.

    Args:
        fn: `fn(graph, context)`, a GraphPass class or a GraphPass. Without it a decorator is returned.
        name: the pass's name; the function's or class's own by default.
        after, before: names of passes to follow or precede. Unless it follows `outline_repeated_blocks`, which closes
            the graph, a pass runs before it.

    Returns:
        a Registration, which can be called like the function and removed.

    Raises:
        PassError: the name is taken, or `after` / `before` names no pass, or the order has a cycle.
    """
    after = (after,) if isinstance(after, str) else tuple(after)
    before = (before,) if isinstance(before, str) else tuple(before)
    if fn is None:
        return lambda f: _register(f, name, after, before)
    return _register(fn, name, after, before)


def _register(fn: Any, name: str | None, after: tuple[str, ...], before: tuple[str, ...]) -> Registration:
    if inspect.isclass(fn) and issubclass(fn, GraphPass):
        fn = fn()
    if isinstance(fn, GraphPass):
        new, function = fn, None
        if name:
            new.name = name
        new.after, new.before = (*new.after, *after), (*new.before, *before)
    elif callable(fn):
        new, function = FunctionPass(fn, name or fn.__name__, after, before), fn
    else:
        raise PassError(f"register_pass takes a function or a GraphPass, not {type(fn).__name__}.")
    if new.name in _REGISTRY:
        raise PassError(f"a pass named '{new.name}' is registered already; remove it first or choose another name.")
    for other in (*new.after, *new.before):
        if other not in _REGISTRY:
            raise PassError(f"'{new.name}' refers to '{other}', which is no pass. Passes: {', '.join(pass_names())}.")
    if CLOSING in _REGISTRY and CLOSING not in new.after:
        new.before = (*new.before, CLOSING)
    _REGISTRY[new.name] = new
    try:
        ordered_passes()
    except PassError:
        del _REGISTRY[new.name]
        raise
    return Registration(new.name, function)


def register_built_in(*passes: GraphPass) -> None:
    """Register the package's own passes in the order given."""
    for one in passes:
        _register(one, None, (), ())
        _BUILT_IN.add(one.name)


def ordered_passes() -> list[GraphPass]:
    """The registered passes in the order in which they run: `after` and `before` first, then registration order."""
    follows = {name: set(p.after) & _REGISTRY.keys() for name, p in _REGISTRY.items()}
    for name, p in _REGISTRY.items():
        for later in set(p.before) & _REGISTRY.keys():
            follows[later].add(name)
    order: list[GraphPass] = []
    done: set[str] = set()
    while len(order) < len(_REGISTRY):
        ready = next((n for n in _REGISTRY if n not in done and follows[n] <= done), None)
        if ready is None:
            raise PassError(f"the order of passes has a cycle among {', '.join(sorted(_REGISTRY.keys() - done))}.")
        done.add(ready)
        order.append(_REGISTRY[ready])
    return order


def pass_names() -> list[str]:
    """Names of the registered passes in the order in which they run."""
    return [p.name for p in ordered_passes()]


def user_passes_fingerprint() -> str | None:
    """Hash of the source of every pass that is not the package's own; None if one of them cannot be hashed."""
    digest = hashlib.sha256()
    for one in ordered_passes():
        if one.name in _BUILT_IN:
            continue
        target = one.fn if isinstance(one, FunctionPass) else type(one)
        try:
            digest.update(inspect.getsource(target).encode())
        except (OSError, TypeError):
            return None
        if isinstance(one, FunctionPass):
            try:
                cells = getattr(one.fn, "__closure__", None) or ()
                digest.update(repr([cell.cell_contents for cell in cells]).encode())
            except ValueError:
                return None
    return digest.hexdigest()


def run_passes(context: PassContext, dump: GraphDump) -> list[PassReport]:
    """Run every registered pass over `context.capture` in order; the graph is linted and dumped around each.

    Raises:
        PassFailed: a pass raised, or left a graph that does not lint; the message names the pass and the dump.
    """
    reports = []
    for position, one in enumerate(ordered_passes()):
        module = context.capture.module
        prefix = f"{position:03d}.{context.phase.value}.{one.name}"
        before = dump.text(module)
        start = time.perf_counter()
        try:
            result = one.run(module.graph, context)
            module = context.capture.module  # a pass may put another in its place
            module.graph.lint()
        except QuantSparseError:
            dump.write(f"{prefix}.before.py", before)
            raise
        except Exception as error:
            where = dump.write(f"{prefix}.before.py", before)
            raise PassFailed(
                f"pass '{one.name}' failed in phase '{context.phase.value}': {type(error).__name__}: {error}. "
                f"Graph: {where or 'not dumped; set debug_dir or QS_DEBUG_DIR'}"
            ) from error
        seconds = time.perf_counter() - start
        after = dump.text(module)
        if after != before:
            dump.write(f"{prefix}.before.py", before)
            dump.write(f"{prefix}.after.py", after)
        report = PassReport(one.name, context.phase.value, result.matched, result.skipped, seconds)
        reports.append(report)
        log.debug("%s [%s]: matched %d, skipped %d", one.name, context.phase.value, report.matched, len(report.skipped))
    context.capture.module.recompile()  # once: writing a large graph as Python takes as long as a pass
    return reports
