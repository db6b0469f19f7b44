"""Reports of what was compiled, and the before/after dumps of each pass."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

from torch import fx

from . import _compat
from .errors import OptionError

log = logging.getLogger("qs_compiler")


@dataclasses.dataclass
class PassReport:
    """What one pass did in one phase: nodes matched, (node, reason) skipped, wall time in seconds."""

    name: str
    phase: str
    matched: int
    skipped: list[tuple[str, str]]
    seconds: float


@dataclasses.dataclass
class Report:
    """One compiled graph.

    Attributes:
        graph_id: number of the graph in this process.
        model: class of the module, where it is known.
        recipe: canonical name of the recipe.
        passes: one entry a pass and phase, in the order in which they ran.
        calls: how often each phase ran, {"dense": n, "refresh": n, "sparse": n}; and "mixed" where one did.
        fallbacks: (op, reason) of every op that runs as a reference or fallback on CUDA.
        compile_seconds: Inductor's time by phase, over all that was compiled of it.
        linears, attentions: (rewritten, found) of the dense phase.
        cache_bytes: what one branch of a video keeps for the sparse steps of this graph, 0 before the first refresh.
        cache_place: "device" or "host", where the caches of the last branch went.
    """

    graph_id: int
    model: str
    recipe: str
    passes: list[PassReport] = dataclasses.field(default_factory=list)
    calls: dict[str, int] = dataclasses.field(default_factory=lambda: {"dense": 0, "refresh": 0, "sparse": 0})
    fallbacks: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    compile_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    linears: tuple[int, int] = (0, 0)
    attentions: tuple[int, int] = (0, 0)
    cache_bytes: int = 0
    cache_place: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)

    def skipped(self, pass_name: str) -> list[tuple[str, str]]:
        """(node, reason) that the pass left alone, over all phases, without repeats."""
        found = [s for p in self.passes if p.name == pass_name for s in p.skipped]
        return list(dict.fromkeys(found))

    def line(self) -> str:
        """The one line that the first compile logs."""
        skips = collections.Counter(
            reason for name in dict.fromkeys(p.name for p in self.passes) for _, reason in self.skipped(name)
        )
        reasons = "; ".join(f"{n} x {reason}" for reason, n in skips.most_common(4))
        return (
            f"{self.model}: {self.recipe}, linears {self.linears[0]}/{self.linears[1]}, "
            f"attentions {self.attentions[0]}/{self.attentions[1]}" + (f", skipped: {reasons}" if reasons else "")
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_REPORTS: list[Report] = []


def reports() -> list[Report]:
    """Reports of the graphs compiled in this process, newest last."""
    return list(_REPORTS)


def new_report(model: str, recipe: str) -> Report:
    """Start the report of one more graph."""
    report = Report(len(_REPORTS), model, recipe)
    _REPORTS.append(report)
    return report


class GraphDump:
    """Writes the files of one graph under `<debug_dir>/<model>_<graph id>/`; without a folder it does nothing.

    The same texts go through trace_structured, so that tlparse shows them.
    """

    def __init__(self, debug_dir: str | Path | None, report: Report) -> None:
        self.report = report
        self.folder = None
        if debug_dir is not None:
            name = re.sub(r"\W+", "_", report.model)
            self.folder = Path(debug_dir) / f"{name}_{report.graph_id}"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OptionError(f"debug_dir {debug_dir} is no folder to write to: {error.strerror}.") from None

    def text(self, module: fx.GraphModule) -> str:
        """The graph as readable Python, or "" where nobody will read it."""
        if self.folder is None and not _compat.structured_tracing():
            return ""
        return module.print_readable(print_output=False, include_stride=True)

    def write(self, name: str, text: str) -> Path | None:
        """Write one file; returns its path."""
        _compat.trace_artifact(f"quantsparse.{self.report.graph_id}.{name}", text)
        if self.folder is None:
            return None
        path = self.folder / name
        path.write_text(text)
        return path

    def write_report(self) -> None:
        """Write report.json, again after every phase."""
        if self.folder is not None:
            (self.folder / "report.json").write_text(json.dumps(self.report.to_dict(), indent=2))
