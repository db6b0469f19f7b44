"""Compress the linears of one block, one after the other, each on the inputs that the ones before it leave it.

Nothing is trained: scales are searched, rounding is solved for. It is the whole calibration where no distillation
follows, and its start where one does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UnsupportedError
from ..options import Recipe
from ..packing import PackedWeight
from ..passes.quantize_linear import SMALL_ROWS
from .gptq import InputStatistics, gptq
from .samples import Sample
from .settings import Settings
from .smoothing import search_smoothing
from .transforms import Transform, hadamard
from .walk import Walk, stops_at, walking
from .weight_grid import GridForm, WeightGrid, search_grid

SEARCH_ROWS = 2048  # of all samples together: what the search for a smoothing scale reads


@dataclasses.dataclass
class InputRecord:
    """What the linears of a block read in full precision.

    Attributes:
        rows: linear -> for each sample some rows of its input, (M, K); always the same positions of inputs alike.
        groups: linears that read one and the same tensor, in the order of their calls.
        few_rows: linears that read one row a clip (time or modulation) instead of tokens.
    """

    rows: dict[str, list[torch.Tensor]]
    groups: list[list[str]]
    few_rows: set[str]


def some_rows(x: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` rows of x (..., K) as (M, K), spread evenly; the choice depends on the shape alone."""
    x = x.detach().reshape(-1, x.shape[-1])
    return x if len(x) <= most else x[torch.arange(most, device=x.device) * len(x) // most]


class InputRecorder:
    """Collects an InputRecord while a block runs in full precision: open it around the forward of each sample."""

    def __init__(self, linears: Mapping[str, nn.Linear], rows: int) -> None:
        self.record = InputRecord({}, [], set())
        self._linears, self._rows = linears, rows
        self._handles: list[Any] = []
        self._readers: dict[int, tuple[torch.Tensor, list[str]]] = {}

    def __enter__(self) -> InputRecorder:
        for name, linear in self._linears.items():

            def read(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self._read(name, args[0] if args else kwargs["input"])

            self._handles.append(linear.register_forward_pre_hook(read, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if not self.record.groups:
            self.record.groups = [names for _, names in self._readers.values()]
        self._readers.clear()

    def _read(self, name: str, x: torch.Tensor) -> None:
        # The tensor is held, so that no later one can take its address.
        _, names = self._readers.setdefault(id(x), (x, []))
        if name in names or any(name in others for _, others in self._readers.values()):
            return  # a linear that is called twice is calibrated on its first input
        names.append(name)
        self.record.rows.setdefault(name, []).append(some_rows(x, self._rows).clone())
        if x.dim() == 1 or (x.dim() == 2 and len(x) < SMALL_ROWS):
            self.record.few_rows.add(name)


def packed_forward(packed: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What a packed linear computes when compiled: x (..., K) -> (..., N) in x's dtype, input quantised per row."""
    if packed.activation == "none":
        return F.linear(x, packed.dequantize(x.dtype), bias)
    ops = torch.ops.quantsparse
    xq, xs = ops.quantize_rows(x, packed.smooth, packed.rotation, packed.activation)
    wq = packed.wq if packed.multipliers is None else ops.expand_w4(packed.wq, packed.multipliers, xq.dtype)
    return ops.linear(xq, xs, wq, packed.ws, bias, x.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What is chosen for a linear before its weight is rounded; linears that read one tensor share `transform`."""

    transform: Transform
    grid: WeightGrid
    activation: str


@dataclasses.dataclass
class Compressed:
    """A compressed block: its packed weights and what led to them, by name; its outputs, one a sample."""

    packed: dict[str, PackedWeight]
    choices: dict[str, Choice]
    outputs: list[Any]


def compress_linears(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    recipes: Mapping[str, Recipe],
    samples: list[Sample],
    record: InputRecord,
    settings: Settings,
    choices: Mapping[str, Choice] | None = None,
) -> Compressed:
    """Compress the linears that `record` saw, in the order in which the block calls them.

    Args:
        linears: by name.
        recipes: of each linear, by name.
        samples: inputs of the block as the compressed model has them, on the block's device.
        record: what the linears read in the full-precision model, on the same forwards.
        choices: transforms and grids that are settled already; None: find them here.

    Raises:
        UnsupportedError: the forwards do not call the linears in one order.
    """
    names = {linear: name for name, linear in linears.items() if name in record.rows}
    group_of = {name: group for group in record.groups for name in group}
    found = Compressed({}, dict(choices or {}), [])
    device = next(block.parameters()).device
    walks = [Walk(block, s.args, s.kwargs, names, s.context(device)) for s in samples]
    with stops_at(names), walking(walks), torch.no_grad():
        calls = [walk.advance() for walk in walks]
        while any(calls):
            linear = calls[0].module if calls[0] else None
            if any(call is None or call.module is not linear for call in calls):
                raise UnsupportedError("the forwards of calibration call a block's linears in unlike order.")
            name = names[linear]
            inputs = [call.args[0] if call.args else call.kwargs["input"] for call in calls]
            if name not in found.packed:
                members = {n: linears[n] for n in group_of[name] if n not in found.packed}
                rows = [some_rows(x, settings.rows) for x in inputs]
                _compress_group(members, recipes, rows, record, settings, found)
            outputs = [packed_forward(found.packed[name], x, linear.bias) for x in inputs]
            calls = [walk.advance(y) for walk, y in zip(walks, outputs, strict=True)]
    found.outputs = [walk.result for walk in walks]
    return found


def _compress_group(
    linears: Mapping[str, nn.Linear],
    recipes: Mapping[str, Recipe],
    quantized: list[torch.Tensor],
    record: InputRecord,
    settings: Settings,
    found: Compressed,
) -> None:
    """Compress linears that read one tensor: one transform for those whose inputs are quantised alike."""
    recipes = {n: recipes[n].weight_only() if n in record.few_rows else recipes[n] for n in linears}
    for activation in dict.fromkeys(recipes[n].activation_format for n in linears):
        alike = [n for n in linears if recipes[n].activation_format == activation]
        weights = {n: linears[n].weight.detach().float() for n in alike}
        full = record.rows[alike[0]]
        if alike[0] in found.choices:
            transform = found.choices[alike[0]].transform
        else:
            transform = _find_transform(weights, recipes, full, quantized, settings)
        statistics = InputStatistics(full[0].shape[1], full[0].device)
        for x, y in zip(full, quantized, strict=True):
            statistics.add(transform.of_input(x), transform.quantized_input(y, activation))
        for name in alike:
            w = transform.of_weight(weights[name])
            if settings.rounding == "gptq":
                w = statistics.corrected(w, settings.damping)
            if name not in found.choices:
                form = GridForm.of(recipes[name])
                grid = search_grid(w, form, form.groups(w.shape[1], recipes[name]), statistics.importance())
                found.choices[name] = Choice(transform, grid, activation)
            grid = found.choices[name].grid
            codes = gptq(w, grid, statistics.damped(settings.damping)) if settings.rounding == "gptq" else grid.codes(w)
            found.packed[name] = grid.pack(codes, transform, activation)


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
