"""The demo's report: one HTML file that holds its pictures, beside the folder of dumped graphs that it links to."""

from __future__ import annotations

import base64
import dataclasses
import re
from pathlib import Path

import jinja2

from . import figures, summary
from .run import Outcome

TEMPLATE = Path(__file__).with_name("report.html.jinja")
GRAPHS = "graphs"


@dataclasses.dataclass(frozen=True)
class DumpedGraph:
    """The graph before and after one pass in one phase; links relative to the report."""

    position: int
    phase: str
    name: str
    before: str
    after: str


def write_report(outcome: Outcome, folder: Path, command: str) -> Path:
    """Write `folder`/report.html; returns its path.

    Args:
        command: how the demo was called.
    """
    kept = outcome.kept if outcome.sparse_density is not None else []
    text = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(TEMPLATE.read_text())
    path = folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        text.render(
            caption=outcome.demo.caption,
            recipe=outcome.demo.recipe,
            headline=summary.headline(outcome),
            weights=summary.weight_rows(outcome),
            phases=summary.phase_rows(outcome),
            passes=summary.pass_rows(outcome),
            skips=summary.skip_rows(outcome),
            fallbacks=summary.fallback_rows(outcome),
            settings=summary.setting_rows(outcome, command),
            graphs=dumped_graphs(folder),
            clips=_data_uri("image/gif", figures.clips_gif(outcome.twin, outcome.clip)),
            clip_width=4 * (3 * outcome.clip.shape[-1] + 2 * figures.GAP),
            gain=figures.GAIN,
            steps=_data_uri("image/svg+xml", figures.steps_svg(outcome.steps)),
            blocks=_data_uri("image/png", figures.blocks_png(kept)) if kept else None,
        )
    )
    return path


def dumped_graphs(folder: Path) -> list[DumpedGraph]:
    """What lies under `folder`/graphs, in the order in which the passes ran."""
    found = []
    for before in (folder / GRAPHS).glob("*/*.before.py"):
        after = before.with_name(before.name.replace(".before.", ".after."))
        match = re.fullmatch(r"(\d+)\.(\w+)\.(\w+)\.before\.py", before.name)
        if match is not None and after.is_file():
            links = (path.relative_to(folder).as_posix() for path in (before, after))
            found.append(DumpedGraph(int(match[1]), match[2], match[3], *links))
    order = list(summary.PHASES)
    return sorted(found, key=lambda graph: (order.index(graph.phase), graph.position))


def clear_dumps(folder: Path) -> None:
    """Remove the graphs that an earlier demo left in `folder`, so that the report links to its own alone."""
    for dump in (folder / GRAPHS).glob("*/*"):
        if re.fullmatch(r"\d+\.\w+\.\w+\.(before|after)\.py|report\.json", dump.name):
            dump.unlink()


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
