"""Ranges, transforms and roundings, against formulas and against torchao's where it is installed."""

import warnings

import pytest
import torch

from qs_compiler.calibration.gptq import InputStatistics, gptq
from qs_compiler.calibration.smoothing import search_smoothing
from qs_compiler.calibration.transforms import Transform, cayley, hadamard
from qs_compiler.calibration.weight_grid import GridForm, WeightGrid, representable, search_grid
from qs_compiler.options import FORMATS, Recipe
from qs_compiler.packing import pack_weight

from ..tolerances import assert_close, relative_error

PACKABLE = [name for name in FORMATS if name != "off"]


def weight(rows: int = 24, columns: int = 256, seed: int = 0) -> torch.Tensor:
    """Rows of unlike size with heavy tails, so that clipping pays; one row of zeros."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=draw) ** 3 * torch.logspace(-3, 1, rows)[:, None]
    w[5] = 0
    return w


def correlated_rows(rows: int = 2000, columns: int = 256, seed: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns // 8, generator=draw) @ torch.randn(columns // 8, columns, generator=draw) + (
        0.3 * torch.randn(rows, columns, generator=draw)
    )


def grid_of(w: torch.Tensor, recipe: Recipe, importance: torch.Tensor | None = None) -> WeightGrid:
    form = GridForm.of(recipe)
    return search_grid(w, form, form.groups(w.shape[1], recipe), importance)


# --- ranges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKABLE)
def test_a_searched_range_beats_the_largest_magnitude_and_packs_to_the_same_values(name):
    w, recipe = weight(), Recipe(name)
    grid = grid_of(w, recipe)
    codes = grid.codes(w)
    packed = grid.pack(codes, Transform(), recipe.activation_format)
    assert_close(packed.dequantize(), grid.values(codes))
    plain = pack_weight(w, recipe)
    assert {n: t.dtype for n, t in packed.tensors().items()} == {n: t.dtype for n, t in plain.tensors().items()}
    error, before = ((p.dequantize() - w).square().sum(1) for p in (packed, plain))
    assert (error <= before * (1 + 1e-5)).all()
    if recipe.weight_format == "int4":  # finer formats hold these tails unclipped
        assert error.sum() < 0.97 * before.sum()


def test_importance_moves_the_range_to_where_it_counts():
    w, recipe = weight(columns=128), Recipe("w4a8")
    importance = torch.ones(128)
    importance[:8] = 1000.0
    plain, weighted = (grid_of(w, recipe, i) for i in (None, importance))
    miss = [((g.values(g.codes(w)) - w).square() * importance).sum() for g in (plain, weighted)]
    assert miss[1] < 0.9 * miss[0]


@pytest.mark.parametrize("name", ["w4a8", "w4fp8", "w8a8"])
def test_representable_steps_are_the_nearest_and_pass_gradients(name):
    form = GridForm.of(Recipe(name))
    steps = torch.rand(16, 1 if form.multipliers is None else 4).add(0.05).requires_grad_()
    grid = representable(steps, form)
    if form.multipliers is None:
        assert torch.equal(grid.steps, steps)
    else:
        allowed = torch.tensor(form.multipliers, dtype=torch.float32)
        best = (steps[..., None] - grid.ws[:, None, None] * allowed).abs().amin(-1)
        assert torch.allclose((grid.steps - steps).abs(), best, atol=1e-6)
    gradient = torch.autograd.grad(grid.steps.sum(), steps)[0]
    largest = steps == steps.amax(1, keepdim=True)  # it sets the row's scale, so it moves the others' rounding too
    assert torch.allclose(gradient[~largest], torch.ones(())) and (gradient[largest] > 0).all()


@pytest.mark.parametrize(("name", "qmax"), [("w8a8", 127), ("w6a6", 31), ("w4a8", 7)])
def test_codes_agree_with_torchao(name, qmax):
    torchao = pytest.importorskip("torchao.quantization.quant_primitives", exc_type=ImportError)
    w, form = weight(), GridForm.of(Recipe(name))
    group = 128 if form.multipliers else 256
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scale, zero = torchao.choose_qparams_affine(
            w, torchao.MappingType.SYMMETRIC, (1, group), torch.int8, -qmax, qmax, eps=1e-30
        )
        theirs = torchao.quantize_affine(w, (1, group), scale, zero, torch.int8, -qmax, qmax)
    assert not zero.any()
    grid = WeightGrid(form, torch.ones(len(w)), scale.view(len(w), -1))
    largest = w.unflatten(1, (-1, group)).abs().amax(-1).clamp(min=1e-30) / qmax
    assert torch.allclose(scale.view(len(w), -1), largest, rtol=1e-6)
    differ = grid.codes(w) != theirs
    ties = ((w / scale.view(len(w), -1).repeat_interleave(group, 1)).frac().abs() - 0.5).abs() < 1e-4
    assert not (differ & ~ties).any(), "only ties may round to the other side"


# --- transforms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 64, 128])
def test_hadamard_is_orthogonal_with_entries_of_one_size(size):
    matrix = hadamard(size, torch.device("cpu"))
    assert torch.allclose(matrix @ matrix.t(), torch.eye(size), atol=1e-5)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_cayley_starts_where_it_is_told_and_stays_orthogonal():
    start = hadamard(16, torch.device("cpu"))
    assert torch.allclose(cayley(torch.zeros(16, 16), start), start)
    turned = cayley(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)), start)
    assert torch.allclose(turned @ turned.t(), torch.eye(16), atol=1e-5)
    assert (turned - start).norm() > 1


def test_a_transform_of_both_sides_leaves_the_product():
    x, w = correlated_rows(10), weight()
    transform = Transform(torch.rand(256) + 0.5, hadamard(64, torch.device("cpu")))
    assert_close(transform.of_input(x) @ transform.of_weight(w).t(), x @ w.t(), 1e-5)


def test_smoothing_gives_precision_to_channels_that_carry_the_output():
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    w, recipe = weight(columns=128), Recipe("w4a8")
    x[:, 3] *= 60
    smooth = search_smoothing([w], [recipe], x, x, None)
    assert smooth is not None and smooth[3] < smooth.median() / 2
    errors = []
    for transform in (Transform(), Transform(smooth)):
        rotated = transform.of_weight(w)
        grid = grid_of(rotated, recipe)
        y = transform.quantized_input(x, "int8") @ grid.values(grid.codes(rotated)).t()
        errors.append(relative_error(y, x @ w.t()))
    assert errors[1] < 0.7 * errors[0]


def test_smoothing_is_left_out_where_it_gains_nothing():
    """One channel: any scale of it is undone by the range."""
    x, w = torch.ones(16, 1), torch.ones(4, 1)
    assert search_smoothing([w], [Recipe("w8a8")], x, x, None) is None


# --- rounding ----------------------------------------------------------------------------------------------------


def statistics_of(full: torch.Tensor, quantized: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(full.shape[1], full.device)
    for a, b in zip(full.split(300), quantized.split(300), strict=True):
        statistics.add(a, b)
    return statistics


@pytest.mark.parametrize("name", ["w4a8", "w8a8", "fp8", "w4fp8"])
def test_gptq_loses_far_less_than_nearest_on_correlated_inputs(name):
    w, x, recipe = weight(), correlated_rows(), Recipe(name)
    grid = grid_of(w, recipe)
    codes = grid.form.round(gptq(w, grid, statistics_of(x, x).damped(0.01)))
    assert codes.abs().max() <= grid.form.qmax
    error, before = (relative_error(x @ grid.values(c).t(), x @ w.t()) for c in (codes, grid.codes(w)))
    assert error < 0.6 * before


def test_gptq_without_correlation_is_rounding_to_nearest():
    w, recipe = weight(), Recipe("w4a8")
    grid = grid_of(w, recipe)
    codes = grid.form.round(gptq(w, grid, torch.eye(256, dtype=torch.float64)))
    assert torch.equal(codes, grid.codes(w))


def test_the_corrected_weight_is_the_least_squares_answer_to_disturbed_inputs():
    w, x = weight(), correlated_rows()
    y = x + 0.3 * x.roll(1, 1) + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    corrected = statistics_of(x, y).corrected(w, 0.01)
    # Ridge regression: rows that want the weight to stay as it is.
    pull = ((0.01 + 256 / 2000) * 2000 * y.square().mean().double()).sqrt() * torch.eye(256, dtype=torch.float64)
    inputs, outputs = torch.cat([y.double(), pull]), torch.cat([(x @ w.t()).double(), pull @ w.t().double()])
    assert relative_error(corrected, torch.linalg.lstsq(inputs, outputs).solution.t()) < 1e-3
    assert relative_error(y @ corrected.t(), x @ w.t()) < 0.5 * relative_error(y @ w.t(), x @ w.t())
