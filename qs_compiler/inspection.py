"""What `quantsparse inspect` shows: an artifact, or the reports of dumped graphs."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .artifact import Artifact
from .errors import ArtifactError
from .packing import PackedWeight


def show_artifact(path: Path, console: Console) -> None:
    """Print what an artifact was made from and how each kind of layer is stored.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    artifact = Artifact.load(path)
    table = _table("")
    table.add_row("model", artifact.model_class)
    table.add_row("recipe", str(artifact.recipe))
    fields = artifact.recipe.to_dict()
    table.add_row("", ", ".join(f"{name} {value}" for name, value in fields.items() if value not in ((), [], {})))
    table.add_row("made with", ", ".join(f"{name} {value}" for name, value in artifact.versions.items()))
    for name, value in artifact.metrics.items():
        if isinstance(value, (int, float, str)):
            table.add_row(escape(name), f"{value:.4g}" if isinstance(value, float) else escape(str(value)))
    console.print(table)
    kinds: dict[str, list[PackedWeight]] = {}
    for packed in artifact.layers.values():
        kinds.setdefault(_kind(packed), []).append(packed)
    table = _table(f"{len(artifact.layers)} linears", "stored as", "linears", "16 bit, MB", "packed, MB")
    for kind, layers in kinds.items():
        dense = sum(2 * rows * columns for rows, columns in (p.shape for p in layers))
        stored = sum(t.nbytes for p in layers for t in p.tensors().values())
        table.add_row(kind, str(len(layers)), f"{dense / 1e6:.2f}", f"{stored / 1e6:.2f}")
    console.print(table)


def _kind(packed: PackedWeight) -> str:
    stored = "int4" if packed.multipliers is not None else str(packed.wq.dtype).removeprefix("torch.")
    extras = [name for name in ("smooth", "rotation") if getattr(packed, name) is not None]
    return ", ".join([stored, f"input {packed.activation}", *extras])


def show_dumps(reports: Sequence[Path], console: Console) -> None:
    """Print what the passes did to each dumped graph.

    Args:
        reports: the `report.json` of each graph.

    Raises:
        ArtifactError: one of them cannot be read.
    """
    for path in reports:
        try:
            report = json.loads(path.read_text())
            table = _table(
                f"{path.parent.name}: {report['model']}, {report['recipe']}", "phase", "pass", "matched", "s"
            )
            for one in report["passes"]:
                table.add_row(one["phase"], one["name"], str(one["matched"]), f"{one['seconds']:.2f}")
            console.print(table)
            skips = collections.Counter(
                (one["name"], reason) for one in report["passes"] for _, reason in map(tuple, one["skipped"])
            )
            table = _table("left alone", "pass", "nodes", "reason")
            for (name, reason), count in skips.items():
                table.add_row(name, str(count), escape(reason))
            if skips:
                console.print(table)
            for op, reason in report["fallbacks"]:
                console.print(f"[yellow]{escape(op)} ran as its reference: {escape(reason)}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"'{path}' is not the report of a dumped graph: {error!r}; dump again.") from error


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=bool(columns)
    )
    for name in columns or ("", ""):
        table.add_column(name, header_style="dim")
    return table
