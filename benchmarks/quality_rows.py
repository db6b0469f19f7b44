"""The rows of the quality table, in the order in which they are worth having."""

from __future__ import annotations

import dataclasses
from typing import Any

from qs_compiler import Recipe

# Each stage of a calibration adds one thing to the stage before it; None rounds the weights without data.
STAGES: dict[str, dict[str, Any] | None] = {
    "rounding": None,
    "range": {"rounding": "nearest", "rotation": None, "smoothing": "none"},
    "smoothing": {"rounding": "nearest", "rotation": None, "smoothing": "search"},
    "hadamard": {"rounding": "nearest", "rotation": 64, "smoothing": "none"},
    "learned": {"rounding": "gptq", "rotation": 64, "epochs": 15, "lambda_global": 0.0, "lambda_local": 0.0},
    "global": {"rounding": "gptq", "rotation": 64, "epochs": 15, "lambda_local": 0.0},
    "local": {"rounding": "gptq", "rotation": 64, "epochs": 15, "lambda_global": 0.0},
    "msad": {"rounding": "gptq", "rotation": 64, "epochs": 15},
    "distilled": {"rounding": "learned", "epochs_rounding": 10, "lambda_global": 0.0, "lambda_local": 0.0},
    "default": {},
    "more": {},  # on MORE forwards
}
MORE = 64
SPARSE: dict[str, dict[str, Any]] = {
    "naive": {"correction": "none", "interval": 1000, "warmup": 0.0},  # one mask, chosen in the first step, for ever
    "none": {"correction": "none"},
    "first_order": {"correction": "first_order"},
    "second_order-1": {"correction": "second_order", "gain": "1"},
    "second_order-k": {"correction": "second_order", "gain": "k/tau"},
    "mixture-0.25": {"correction": "mixture"},  # the default gain
    "mixture": {"correction": "mixture"},  # gains fitted in full precision
    "by_head": {"correction": "mixture", "budgets": "fitted"},  # and numbers of blocks
    "complement": {"correction": "complement"},
    "staggered": {"correction": "mixture", "refresh": "staggered"},
    "adaptive": {"correction": "mixture", "refresh": "adaptive", "interval": 8},
}
MASKS: dict[str, dict[str, Any]] = {  # on the mixture with the default gain
    "tiles": {"token_order": "tiles"},
    "spatial": {"mask": "spatial"},
    "temporal": {"mask": "temporal"},
    "radial": {"mask": "radial"},
    "mass": {"mask": "mass"},
    "first_frame": {"always_keep": ("first_frame",)},
    "neighbourhood": {"always_keep": ("neighbourhood",)},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        recipe: what is computed.
        calibration: options of `calibrate`; None: weights are rounded without data.
        grid: "small" (4,096 tokens) or "large" (13,824).
        compiled: through Inductor; otherwise the same graph, or the same linears, with the ops' references.
        forwards: that the calibration reads; None: as the command line says.
        fitted: whether what heads differ in is fitted first: gains of the mixture, numbers of blocks.
    """

    name: str
    recipe: Recipe
    calibration: dict[str, Any] | None
    grid: str = "small"
    compiled: bool = False
    forwards: int | None = None
    fitted: bool = False


def all_rows() -> dict[str, Row]:
    """Name -> row, most wanted first."""
    learned = ("msad", "learned", "distilled", "global", "local")
    dense = [
        ("w4a8", ("rounding", "default", "hadamard", "more", "range", "smoothing", *learned)),
        *(
            (form, ("rounding", "default", "hadamard", "range", "smoothing", *learned))
            for form in ("w4a4", "w6a6", "w8a8", "fp8")
        ),
    ]
    rows = [Row(f"{form}/{stage}", Recipe.parse(form), STAGES[stage]) for form, stages in dense for stage in stages]
    rows = [dataclasses.replace(row, forwards=MORE) if row.name.endswith("/more") else row for row in rows]
    for percent in (25, 15, 40):
        for form in ("off", "w4a8"):
            for kind in SPARSE:
                rows.append(_sparse(form, percent, kind, "small"))
    for percent in (25, 15, 40):
        row = _sparse("w4a8", percent, "second_order-k", "small")
        rows.append(dataclasses.replace(row, name=f"w4a8-d{percent}/msad", calibration=STAGES["msad"]))
    for percent in (25, 15):
        for kind in ("naive", "none", "first_order", "mixture-0.25"):
            rows.append(_sparse("w4a8", percent, kind, "large"))
    for percent in (25, 15):
        for form in ("off", "w4a8"):
            rows += [_varied(form, percent, attention, attention=attention) for attention in ("int8-fp8", "int8")]
    for percent in (25, 15):
        rows += [_varied("off", percent, name, **fields) for name, fields in MASKS.items()]
    for percent in (25, 15, 40):
        for form in ("off", "w4a8"):
            kinds = ("by_head", "none", "first_order")
            rows += [_varied(form, percent, "tiles", kind, **MASKS["tiles"]) for kind in kinds]
    for name in ("w4a8", "w4a4", "w8a8"):
        rows.append(Row(f"{name}/default/compiled", Recipe.parse(name), STAGES["default"], compiled=True))
    for form in ("off", "w4a8"):
        row = _sparse(form, 25, "first_order", "small")
        rows.append(dataclasses.replace(row, name=f"{row.name}/reference", compiled=False))
    return {row.name: row for row in rows}


def _sparse(form: str, percent: int, kind: str, grid: str) -> Row:
    base = Recipe.parse(f"{form}-d{percent}")
    recipe = dataclasses.replace(base, **{"budgets": "uniform", "token_order": "rows", **SPARSE[kind]})
    calibration = None if kind == "naive" or form == "off" else STAGES["default"]
    prefix = "large/" if grid == "large" else ""
    name = f"{prefix}{form}-d{percent}/{kind}"
    return Row(name, recipe, calibration, grid, compiled=True, fitted=kind in ("mixture", "by_head"))


def _varied(form: str, percent: int, name: str, kind: str = "mixture-0.25", **fields: Any) -> Row:
    """A kind of SPARSE, the mixture with the default gain, with other fields of the recipe."""
    row = _sparse(form, percent, kind, "small")
    return dataclasses.replace(row, name=f"{row.name}/{name}", recipe=dataclasses.replace(row.recipe, **fields))
