"""Distillation: fake-quantised linears are what will run, losses fall, no gradient goes where it does not belong."""

import pytest
import torch
from torch import nn

import qs_compiler as qs
from qs_compiler.calibration import fake_linear
from qs_compiler.calibration.closed_form import packed_forward
from qs_compiler.calibration.fake_linear import FakeLinear, LearnedTransform, RoundedLinear, fake_quantize_rows
from qs_compiler.calibration.transforms import Transform, hadamard
from qs_compiler.calibration.weight_grid import GridForm, search_grid
from qs_compiler.options import Recipe

from ..tolerances import assert_close
from .models import make_forwards, make_model
from .test_attention_maps import Largest, Live

FORMATS = ["w4a8", "w8a8", "fp8", "w4fp8", "w6a6"]
LEARN = {"rounding": "nearest", "epochs": 15, "lr_transform": 2e-2, "lr_range": 0.2}  # few steps: larger ones
SMALL = {"stride": 8, "salient": 8, "progress": False, "recipe": {"format": "w4a8", "group_size": 32}}


def linear_and_choice(name: str):
    torch.manual_seed(0)
    linear, recipe = nn.Linear(128, 48), Recipe(name, group_size=32)
    transform = Transform(torch.rand(128) + 0.5, hadamard(64, torch.device("cpu")))
    form = GridForm.of(recipe)
    return linear, transform, search_grid(transform.of_weight(linear.weight.detach()), form, form.groups(128, recipe))


@pytest.mark.parametrize("name", FORMATS)
def test_the_fake_linear_computes_what_the_packed_one_will(name):
    linear, transform, grid = linear_and_choice(name)
    activation = Recipe(name).activation_format
    fake = FakeLinear(linear, grid, LearnedTransform(transform, 128, torch.device("cpu")), activation)
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
        settled, x = fake.transform.settled(), torch.randn(5, 7, 128)
        learned = fake.grid()
        packed = learned.pack(learned.codes(settled.of_weight(linear.weight)), settled, activation)
        assert_close(fake(x), packed_forward(packed, x, linear.bias), 2e-3)  # fp8 codes at ties of a float product
        codes = learned.unrounded(settled.of_weight(linear.weight))
        rounded = RoundedLinear(linear, codes, learned, settled, activation)
        assert_close(rounded(x), packed_forward(rounded.pack(), x, linear.bias), 2e-3)


def test_an_untouched_fake_linear_starts_on_the_grid_that_it_was_given():
    linear, transform, grid = linear_and_choice("w4a8")
    fake = FakeLinear(linear, grid, LearnedTransform(transform, 128, torch.device("cpu")), "int8")
    assert_close(fake.grid().steps, grid.steps)


def test_every_choice_gets_a_gradient():
    linear, transform, grid = linear_and_choice("w4a8")
    fake = FakeLinear(linear, grid, LearnedTransform(transform, 128, torch.device("cpu")), "int8")
    x = torch.randn(9, 128, requires_grad=True)
    parameters = dict(fake.named_parameters())
    assert set(parameters) == {"clip", "transform.log_smooth", "transform.skew"}
    for gradient in torch.autograd.grad(fake(x).square().sum(), [x, *parameters.values()]):
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


@pytest.mark.parametrize("activation", ["int8", "fp8", "int4", "none"])
def test_rows_are_rounded_as_at_run_time(activation):
    x = torch.randn(20, 64) * torch.logspace(-3, 3, 20)[:, None]
    assert_close(fake_quantize_rows(x, activation), Transform().quantized_input(x, activation))


@pytest.mark.parametrize(
    "options",
    [
        {**LEARN},
        {**LEARN, "lambda_global": 0},
        {**LEARN, "lambda_local": 0},
        {**LEARN, "lr_transform": 0},
        {**LEARN, "lr_range": 0},
        {"rounding": "learned", "epochs_rounding": 15, "lr_rounding": 1e-2},
    ],
    ids=str,
)
def test_the_loss_falls_with_every_choice_of_terms(options):
    artifact = qs.calibrate(make_model(blocks=1), make_forwards(4), **SMALL, **options)
    for measured in artifact.metrics["blocks"].values():
        losses = measured["losses_rounding" if options["rounding"] == "learned" else "losses"]
        used = [1.0, options.get("lambda_global", 1), options.get("lambda_local", 1)]
        before, after = (
            sum(w * v / b for w, v, b in zip(used, losses[k], losses["before"], strict=True) if w)
            for k in ("before", "after")
        )
        assert after < 0.97 * before
        assert all((v > 0) == (w > 0) for w, v in zip(used, losses["before"], strict=True))


def test_distillation_helps_where_it_has_not_looked():
    from .test_calibrate import compressed_error

    model, unseen = make_model(blocks=1), make_forwards(4, seed=7)
    plain, distilled, rounded = (
        qs.calibrate(model, make_forwards(8), **SMALL, **options).layers
        for options in (
            {"rounding": "nearest"},
            LEARN,
            {"rounding": "learned", "epochs_rounding": 15, "lr_rounding": 1e-2},
        )
    )
    errors = [compressed_error(model, layers, unseen) for layers in (plain, distilled, rounded)]
    assert errors[1] < 0.95 * errors[0] and errors[2] < 0.8 * errors[0]


def test_the_model_gets_no_gradients_and_keeps_its_weights():
    model = make_model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    qs.calibrate(model, make_forwards(2), **SMALL, epochs=1, rounding="learned", epochs_rounding=1)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_maps_cost_little_memory_beside_what_distillation_takes_without_them():
    length = 1024
    (args, kwargs), = make_forwards(1, tokens=length)
    data = [((args[0][:1],), {k: v[:1] for k, v in kwargs.items()})]
    peaks = []
    for maps in ({"lambda_global": 0, "lambda_local": 0}, {"stride": 128, "salient": 64}):
        with Largest() as largest, Live() as live:
            qs.calibrate(make_model(blocks=1), data, progress=False, recipe=SMALL["recipe"], epochs=1, **maps)
        assert largest.elements < length * length
        peaks.append(live.peak)
    assert peaks[1] < 1.15 * peaks[0]
    assert peaks[1] - peaks[0] < 8 * (4 * 64 * length)  # the local map of one head, some times over


def test_rows_that_are_taken_in_parts_give_the_same_and_hold_less(monkeypatch):
    linear, transform, grid = linear_and_choice("w4a8")
    learned = LearnedTransform(transform, 128, torch.device("cpu"))
    x, found, peaks = torch.randn(4, 512, 128), [], []
    for rows in (2048, 100):
        monkeypatch.setattr(fake_linear, "ROWS", rows)
        fake, own = FakeLinear(linear, grid, learned, "int8"), x.clone().requires_grad_()
        with Live() as live:
            gradients = torch.autograd.grad(fake(own).square().sum(), [own, *fake.parameters()])
        found.append(gradients)
        peaks.append(live.peak)
    for whole, parts in zip(*found, strict=True):
        assert_close(parts, whole)
    assert peaks[1] < 0.6 * peaks[0]
