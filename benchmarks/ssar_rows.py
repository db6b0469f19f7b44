"""The rows of the table of corrections, in the order in which they are worth having."""

from __future__ import annotations

import dataclasses
from typing import Any

from ssar_attention import Method

STEPS, WARMUP = 20, 2
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {"correction": "none"},
    "first_order": {},
    "mixture-fitted": {"correction": "mixture", "gain": "fitted"},
    "mixture-0.25": {"correction": "mixture", "gain": 0.25},
    "second_order-k": {"correction": "second_order", "gain": "k/tau", "frozen": True},
    "complement-k": {"correction": "complement", "gain": "k/tau"},
    "second_order-1": {"correction": "second_order", "gain": "1", "frozen": True},
    "complement-0": {"correction": "complement"},
    "mixture-1": {"correction": "mixture", "gain": 1.0},
    "second_order-clipped": {"correction": "second_order", "gain": "clipped", "frozen": True},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: what runs, over how many steps and held-out clips."""

    name: str
    method: Method
    clips: int = 16
    steps: int = STEPS


def fixed(interval: int, steps: int = STEPS, warmup: int = WARMUP) -> tuple[str, ...]:
    """A refresh every `interval` steps after dense ones."""
    return ("".join("d" if i < warmup else "sr"[(i - warmup) % interval == 0] for i in range(steps)),)


def explicit(*refresh: int, dense: int = WARMUP) -> tuple[str, ...]:
    """Refreshes at given steps after dense ones."""
    return ("".join("d" if i < dense else "sr"[i in refresh] for i in range(STEPS)),)


def staggered(layers: int = 8, interval: int = 5) -> tuple[str, ...]:
    """All layers refresh after the warm-up, then each at a step of its own."""
    first = fixed(interval)[0]
    late = [layer * interval // layers for layer in range(layers)]
    return tuple(
        "".join(c if i <= WARMUP else "sr"[(i - WARMUP - o) % interval == 0] for i, c in enumerate(first)) for o in late
    )


def adaptive() -> tuple[str, ...]:
    """Refreshes where they are due, after dense steps."""
    return ("".join("d" if i < WARMUP else "a" for i in range(STEPS)),)


def adjacent(interval: int = 5) -> tuple[str, ...]:
    """As fixed, with one more dense step before each refresh but the first."""
    return (fixed(interval)[0].replace("sr", "pr"),)


def all_rows() -> dict[str, Row]:
    """Name -> row, most wanted first."""
    rows: list[Row] = []

    def add(name: str, clips: int = 16, steps: int = STEPS, **fields: Any) -> None:
        rows.append(Row(name, Method(**{"phases": fixed(5), **fields}), clips, steps))

    pair = {name: CORRECTIONS[name] for name in ("first_order", "mixture-fitted")}
    for number, (name, fields) in enumerate(CORRECTIONS.items()):
        for density in (0.25, 0.15):
            add(f"d{round(100 * density)}/{name}", 32 if number < 4 else 16, density=density, **fields)
    for density in (0.25, 0.15):
        for name, fields in pair.items():
            add(f"d{round(100 * density)}/{name}/budgets by head", 32, density=density, budgets="fitted", **fields)
    for density in (0.25, 0.15):
        dense_first = explicit(5, dense=5)
        add(f"d{round(100 * density)}/dense steps first", density=density, phases=dense_first, correction="none")
    for cache in ("int4", "fp8", "int8", "rank16", "rank32"):
        add(f"d25/mixture-fitted/{cache}", cache=cache, **pair["mixture-fitted"])
    for interval in (3, 4, 6, 8):
        for name, fields in pair.items():
            add(f"d25/{name}/interval {interval}", phases=fixed(interval), **fields)
    for density in (0.4, 0.1):
        for name, fields in {"none": CORRECTIONS["none"], **pair}.items():
            add(f"d{round(100 * density)}/{name}", density=density, **fields)
    for row, mask in {"exact": "exact", "mass": "estimate"}.items():
        for name, fields in pair.items():
            add(f"d25/{name}/mask {row}", mask=mask, **fields)
    add("d25/first_order/frozen mask", frozen=True)
    add("d25/adjacent-1", phases=adjacent(), correction="adjacent", gain="1", frozen=True)
    for rank in (8, 32, None):
        name = "full rank" if rank is None else f"rank {rank}"
        add(f"d25/second_order-k/{name}", rank=rank, **CORRECTIONS["second_order-k"])
    schedules = {"early": explicit(2, 5, 9, 14), "late": explicit(2, 10, 15, 18), "staggered": staggered()}
    for name, phases in schedules.items():
        for correction, fields in pair.items():
            add(f"d25/{correction}/{name}", phases=phases, **fields)
    # As few refreshes as with a fixed interval of 5 (four) at one of these thresholds.
    for drift in (0.2, 0.3, 0.4, 0.5, 0.6):
        for correction, fields in pair.items():
            add(f"d25/{correction}/adaptive {drift}", phases=adaptive(), max_drift=drift, most=8, **fields)
    for steps in (8, 4):
        for interval in (2, 5):
            for name, fields in {"none": CORRECTIONS["none"], "mixture-0.25": CORRECTIONS["mixture-0.25"]}.items():
                phases = fixed(interval, steps, 1)
                add(f"{steps} steps/d25/{name}/interval {interval}", steps=steps, phases=phases, **fields)
    for gain in (0.15, 0.35):
        for density in (0.25, 0.15):
            add(f"d{round(100 * density)}/mixture-{gain}", density=density, correction="mixture", gain=gain)
    return {row.name: row for row in rows}
