"""Which ops a compilation left to their eager reference although their device should have a kernel."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger(__name__)
_items: ContextVar[list[tuple[str, str]] | None] = ContextVar("quantsparse_fallbacks", default=None)


def record(op: str, reason: str) -> None:
    """Note that `op` falls back to its reference, and why."""
    log.info("quantsparse::%s falls back to its reference: %s", op, reason)
    items = _items.get()
    if items is not None:
        items.append((op, reason))


@contextmanager
def collect_fallbacks() -> Iterator[list[tuple[str, str]]]:
    """Collect (op, reason) of every fallback lowered inside the block. A graph out of a cache lowers nothing."""
    items: list[tuple[str, str]] = []
    token = _items.set(items)
    try:
        yield items
    finally:
        _items.reset(token)
