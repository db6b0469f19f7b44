"""Compress the linears of one block, one after the other, each on the inputs that the ones before it leave it.

Nothing is trained: scales are searched, rounding is solved for. It is the whole calibration where no distillation
follows, and its start where one does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UnsupportedError
from ..ops.formats import FORMATS
from ..options import Recipe
from ..packing import PackedWeight
from .gptq import InputStatistics, gptq
from .input_record import InputRecord, input_of, some_rows
from .samples import Sample
from .settings import Settings
from .smoothing import search_smoothing
from .transforms import Transform, hadamard
from .walk import Walk, stops_at, walking
from .weight_grid import GridForm, WeightGrid, search_grid

FORWARD_ROWS = 16384
UNLIKE_ORDER = "the forwards of calibration call a block's linears in unlike order"
NAN = "NaN, which linears return that are still to be compressed, or the model's own, reached others of its block"
SIDE_BY_SIDE = "Calibrate with in_flight=None"
SEARCH_ROWS = 2048  # of all samples together: what the search for a smoothing scale reads


def packed_forward(packed: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What a packed linear computes when compiled: x (..., K) -> (..., N) in x's dtype, input quantised per row.

    FORWARD_ROWS rows at a time: the references of the ops hold several float32 copies of what they are given.
    """
    if packed.activation == "none":
        return F.linear(x, packed.dequantize(x.dtype), bias)
    ops = torch.ops.quantsparse
    wq = packed.wq
    if packed.multipliers is not None:
        wq = ops.expand_w4(wq, packed.multipliers, FORMATS[packed.activation].dtype)
    y = x.new_empty(*x.shape[:-1], len(wq))
    flat = y.view(-1, len(wq))
    for i, rows in enumerate(x.reshape(-1, x.shape[-1]).split(FORWARD_ROWS)):
        xq, xs = ops.quantize_rows(rows, packed.smooth, packed.rotation, packed.activation)
        start = i * FORWARD_ROWS
        flat[start : start + len(rows)] = ops.linear(xq, xs, wq, packed.ws, bias, x.dtype)
    return y


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What is chosen for a linear before its weight is rounded; linears that read one tensor share `transform`."""

    transform: Transform
    grid: WeightGrid
    activation: str


@dataclasses.dataclass
class Compressed:
    """A compressed block.

    Attributes:
        packed, choices: by the linear's name.
        unrounded: the codes as they were before they were rounded, (N, K) float32.
        outputs: one a sample.
    """

    packed: dict[str, PackedWeight]
    choices: dict[str, Choice]
    unrounded: dict[str, torch.Tensor]
    outputs: list[Any]


def walk_block(block: nn.Module, sample: Sample, stops: Iterable[nn.Module]) -> Walk:
    """A walk through a block, on the device where the block lies."""
    device = next(block.parameters()).device
    sample = sample.to(device)
    return Walk(block, sample.args, sample.kwargs, stops, sample.context(device))


def compress_linears(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    recipes: Mapping[str, Recipe],
    samples: list[Sample],
    record: InputRecord,
    settings: Settings,
    choices: Mapping[str, Choice] | None = None,
) -> Compressed:
    """Compress the linears that `record` saw, each after those that its input was computed from.

    Args:
        linears: by name.
        recipes: of each linear, by name.
        samples: inputs of the block as the compressed model has them, on the block's device.
        record: what the linears read in the full-precision model, on the same forwards.
        choices: transforms and grids that are settled already; None: find them here.

    Raises:
        UnsupportedError: the forwards do not call the linears in one order, or with more samples than may be in flight
            a linear depends on another in a way that torch does not see.
    """
    names = {linear: name for name, linear in linears.items() if name in record.rows}
    found = Compressed({}, dict(choices or {}), {}, [])
    in_flight = settings.in_flight or len(samples)
    with stops_at(names), torch.no_grad():
        if len(samples) <= in_flight:
            _side_by_side(block, names, recipes, samples, record, settings, found)
        else:
            _one_at_a_time(block, names, recipes, samples, record, settings, found)
    return found


def _side_by_side(
    block: nn.Module,
    names: Mapping[nn.Linear, str],
    recipes: Mapping[str, Recipe],
    samples: list[Sample],
    record: InputRecord,
    settings: Settings,
    found: Compressed,
) -> None:
    """All samples wait at one linear, and go on together: one forward of the block a sample."""
    group_of = {name: group for group in record.groups for name in group}
    linears = {name: linear for linear, name in names.items()}
    walks = [walk_block(block, s, names) for s in samples]
    with walking(walks):
        calls = [walk.advance() for walk in walks]
        while any(calls):
            linear = calls[0].module if calls[0] else None
            if any(call is None or call.module is not linear for call in calls):
                raise UnsupportedError(f"{UNLIKE_ORDER}.")
            name, inputs = names[linear], [input_of(call) for call in calls]
            if name not in found.packed:
                rows = [some_rows(x, settings.rows) for x in inputs]
                _compress_group({n: linears[n] for n in group_of[name]}, recipes, rows, record, settings, found)
            outputs = [packed_forward(found.packed[name], x, linear.bias) for x in inputs]
            calls = [walk.advance(y) for walk, y in zip(walks, outputs, strict=True)]
    found.outputs = [walk.result for walk in walks]


def _one_at_a_time(
    block: nn.Module,
    names: Mapping[nn.Linear, str],
    recipes: Mapping[str, Recipe],
    samples: list[Sample],
    record: InputRecord,
    settings: Settings,
    found: Compressed,
) -> None:
    """Every sample is run anew for each stage of linears: several forwards, the memory of one.

    In the run for a stage the linears that are still to come return NaN, which must not reach the stage.
    """
    linears = {name: linear for linear, name in names.items()}

    def run(sample: Sample, firsts: list[str]) -> tuple[dict[str, torch.Tensor], Any]:
        """Rows of what the linears `firsts` read, and where there are none the output of the block."""
        rows: dict[str, torch.Tensor] = {}
        walk = walk_block(block, sample, names)
        with walking([walk]):
            call = walk.advance()
            while call is not None:
                name, x = names[call.module], input_of(call)
                if name in firsts and name not in rows:  # later calls count as in full precision
                    rows[name] = some_rows(x, settings.rows)
                    if len(rows) == len(firsts):
                        break
                if name in found.packed:
                    y = packed_forward(found.packed[name], x, call.module.bias)
                elif firsts:
                    y = x.new_full((*x.shape[:-1], call.module.out_features), torch.nan)
                else:
                    raise UnsupportedError(f"{UNLIKE_ORDER}: '{name}'.")
                call = walk.advance(y)
            return rows, walk.result

    for stage in record.stages:
        firsts = [group[0] for group in stage]
        try:
            rows = [run(sample, firsts)[0] for sample in samples]
        except Exception as error:  # what a model makes of NaN is its own
            raise UnsupportedError(f"{NAN}: {type(error).__name__}: {error}. {SIDE_BY_SIDE}") from error
        if any(own.keys() != set(firsts) for own in rows):
            raise UnsupportedError(f"{UNLIKE_ORDER}: {', '.join(firsts)}.")
        if any(x.isnan().any() for own in rows for x in own.values()):
            raise UnsupportedError(f"{NAN}. {SIDE_BY_SIDE}")
        for group in stage:
            quantized = [own[group[0]] for own in rows]
            _compress_group({n: linears[n] for n in group}, recipes, quantized, record, settings, found)
    found.outputs = [run(sample, [])[1] for sample in samples]


def _compress_group(
    linears: Mapping[str, nn.Linear],
    recipes: Mapping[str, Recipe],
    quantized: list[torch.Tensor],
    record: InputRecord,
    settings: Settings,
    found: Compressed,
) -> None:
    """Compress linears that read the same tensors: one transform for those whose inputs are quantised alike.

    Args:
        quantized: for each sample rows (M, K) of what they read first in the compressed model.
    """
    recipes = {n: recipes[n].weight_only() if n in record.few_rows else recipes[n] for n in linears}
    full = record.rows[next(iter(linears))]
    # A linear is compressed at its first call. What it reads later may come from itself, so full precision says.
    quantized = [y if len(y) == len(x) else torch.cat([y, x[len(y) :]]) for x, y in zip(full, quantized, strict=True)]
    for activation in dict.fromkeys(recipes[n].activation_format for n in linears):
        alike = [n for n in linears if recipes[n].activation_format == activation]
        weights = {n: linears[n].weight.detach().float() for n in alike}
        if alike[0] in found.choices:
            transform = found.choices[alike[0]].transform
        else:
            transform = _find_transform(weights, recipes, full, quantized, settings)
        statistics = InputStatistics(full[0].shape[1], full[0].device)
        for x, y in zip(full, quantized, strict=True):
            statistics.add(transform.of_input(x), transform.quantized_input(y, activation))
        for name in alike:
            w = transform.of_weight(weights[name])
            if settings.rounding != "nearest":
                w = statistics.corrected(w, settings.damping)
            if name not in found.choices:
                form = GridForm.of(recipes[name])
                grid = search_grid(w, form, form.groups(w.shape[1], recipes[name]), statistics.importance())
                found.choices[name] = Choice(transform, grid, activation)
            grid = found.choices[name].grid
            if settings.rounding == "nearest":
                codes = grid.unrounded(w)
            else:
                codes = gptq(w, grid, statistics.damped(settings.damping))
            found.unrounded[name] = codes
            found.packed[name] = grid.pack(grid.form.round(codes), transform, activation)


def _find_transform(
    weights: Mapping[str, torch.Tensor],
    recipes: Mapping[str, Recipe],
    full: list[torch.Tensor],
    quantized: list[torch.Tensor],
    settings: Settings,
) -> Transform:
    """The transform of an input that linears with these weights read."""
    own = [recipes[n] for n in weights]
    if own[0].activation_format == "none":
        return Transform()  # a linear that is only stored low-bit has no run-time quantiser to put one in
    divides = settings.rotation is not None and full[0].shape[1] % settings.rotation == 0
    # A rotation spreads outliers, of which an integer grid suffers; a float grid does not.
    rotates = divides and any(recipe.weight_format != "fp8" for recipe in own)
    rotation = hadamard(settings.rotation, full[0].device) if rotates else None
    if settings.smoothing == "none":
        return Transform(None, rotation)
    each = -(-SEARCH_ROWS // len(full))
    rows = [torch.cat([some_rows(x, each) for x in xs]) for xs in (full, quantized)]
    return Transform(search_smoothing(list(weights.values()), own, *rows, rotation), rotation)
