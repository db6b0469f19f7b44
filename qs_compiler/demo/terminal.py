"""The demo's figures as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from . import summary
from .run import Outcome


def show(outcome: Outcome, console: Console) -> None:
    """Print what the report shows, without its pictures."""
    console.print(_table("", ("", "", ""), summary.headline(outcome), numbers=(1,), header=False))
    console.print(
        _table(
            "Weights", ("class", "16 bit, MB", "compressed, MB", "smaller by"), summary.weight_rows(outcome), (1, 2, 3)
        )
    )
    console.print(
        _table("Phases", ("phase", "calls", "compiling, s", "what it does"), summary.phase_rows(outcome), (1, 2))
    )
    console.print(
        _table("Rewritten, matches", ("pass", "dense", "refresh", "sparse"), summary.pass_rows(outcome), (1, 2, 3))
    )
    skips = [row[:3] for row in summary.skip_rows(outcome)]
    console.print(_table("Left alone, and why", ("pass", "nodes", "reason"), skips, (1,)))
    fallbacks = summary.fallback_rows(outcome)
    if fallbacks:
        console.print(_table("Ran as their reference", ("op", "reason"), fallbacks))


def _table(
    title: str, columns: Sequence[str], rows: Iterable[summary.Row], numbers: Sequence[int] = (), header: bool = True
) -> Table:
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=header
    )
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in numbers else "left", header_style="dim")
    for row in rows:
        table.add_row(*row)
    return table


def show_rows(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the rows of `quantsparse eval`."""
    columns = ("recipe", "clips", "sparse step", "whole run", "PSNR, dB", "SSIM", "relative L2", "colour", "direction")
    cells = [
        (
            row["name"],
            str(row["clips"]),
            "dense" if row["sparse_density"] is None else f"{row['sparse_density']:.0%}",
            f"{row['average_density']:.0%}",
            *(
                _with_interval(row[measure], digits)
                for measure, digits in (("psnr", 2), ("ssim", 3), ("relative_l2", 3))
            ),
            f"{row['caption_accuracy']['colour']:.0%}",
            f"{row['caption_accuracy']['direction']:.0%}",
        )
        for row in rows
    ]
    console.print(
        _table("Against the uncompressed model, mean and 95 % interval", columns, cells, range(1, len(columns)))
    )


def _with_interval(value: dict[str, float | None], digits: int) -> str:
    half = value["interval95"]
    return f"{value['mean']:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
