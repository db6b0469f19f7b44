"""The progress bar of a calibration: block, loss or error, time left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Progress:
    """What a calibration tells of its progress, to nobody."""

    def begin(self, block: str) -> None:
        """The block that is in work now."""

    def advance(self, units: int, **shown: float) -> None:
        """So many forwards of a block are done; `shown` is a loss or an error to show."""


class _Bar(Progress):
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def begin(self, block: str) -> None:
        self._bar.update(self._task, block=block or "model")

    def advance(self, units: int, **shown: float) -> None:
        figures = {"figures": " ".join(f"{name} {value:.4f}" for name, value in shown.items())} if shown else {}
        self._bar.update(self._task, advance=units, **figures)


@contextlib.contextmanager
def show_progress(units: int, shown: bool) -> Iterator[Progress]:
    """A bar over so many units on stderr, or nothing."""
    if not shown:
        yield Progress()
        return
    from rich import progress as rich  # importing the package must not cost its import time
    from rich.console import Console

    columns = (
        rich.TextColumn("calibrating {task.fields[block]}"),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[figures]}"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, bar.add_task("", total=units, block="", figures=""))
