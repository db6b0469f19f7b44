"""Real architectures, compiled for real: transparent when off, near eager in W8A8, sparse within a run."""

from __future__ import annotations

import pytest
import torch

import qs_compiler as qs
from tests.backend.diffusers_models import MODELS, at_step, make
from tests.tolerances import relative_error

STEPS = 12
SPARSE = {"format": "w8a8", "density": 0.25, "block_size": 64}
# Linears in the blocks, which all are rewritten but those whose input is one row per clip.
LINEARS = {"wan": (20, 26), "hunyuan": (34, 60), "cogvideox": (12, 21), "ltx": (20, 27)}
SELF_ATTENTIONS = {"wan": 2, "hunyuan": 4, "cogvideox": 2, "ltx": 2}


@pytest.mark.parametrize("name", MODELS)
def test_off_equals_inductor(name: str) -> None:
    model, inputs = make(name)
    inductor = torch.compile(model, backend="inductor", fullgraph=True)(**inputs)[0]
    torch._dynamo.reset()
    off = torch.compile(model, backend="quantsparse", options={"recipe": "off"}, fullgraph=True)(**inputs)[0]
    # The same ATen ops in the same order; the outlined blocks are fused apart, which moves float32 roundings.
    assert relative_error(off, inductor) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_w8a8_is_within_two_percent_of_eager(name: str) -> None:
    model, inputs = make(name)
    eager = model(**inputs)[0]
    compiled = torch.compile(model, backend="quantsparse", fullgraph=True)(**inputs)[0]
    assert 1e-5 < relative_error(compiled, eager) < 0.02
    report = qs.reports()[-1]
    assert report.linears == LINEARS[name]
    assert report.fallbacks == []
    reasons = {reason for _, reason in report.skipped("quantize_linear")}
    assert reasons <= {"outside the repeated blocks", "one row per clip (time, guidance or modulation)"}


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_run(name: str) -> None:
    check_sparse_run(name)


def test_a_sparse_run_compiled() -> None:
    check_sparse_run("wan")
    assert set(qs.reports()[-1].compile_seconds) == {"dense", "refresh", "sparse"}


def check_sparse_run(name: str) -> None:
    """12 steps at 25 %: refreshes equal dense, sparse steps differ from it and stay near."""
    model, inputs = make(name)
    dense = torch.compile(model, backend="quantsparse", options={"recipe": "w8a8"})
    steps = [at_step(inputs, i, STEPS) for i in range(STEPS)]
    want = [dense(**step)[0] for step in steps]
    torch._dynamo.reset()
    sparse = torch.compile(model, backend="quantsparse", options={"recipe": SPARSE})
    with qs.denoising(sparse, STEPS) as run:
        for i, step in enumerate(steps):
            run.step(i)
            error = relative_error(sparse(**step)[0], want[i])
            if i < 2 or i in (2, 7):  # warm-up, refreshes
                assert error < 2e-3, f"step {i}: {error}"
            else:
                assert 1e-7 < error < 0.25, f"step {i}: {error}"
    report = qs.reports()[-1]
    assert report.calls == {"dense": 2, "refresh": 2, "sparse": 8}
    assert report.attentions[0] == SELF_ATTENTIONS[name]


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.filterwarnings("ignore:recipe .* runs dense while nothing says:UserWarning")
def test_the_padding_mask_of_hunyuan_is_proved_to_be_a_prefix() -> None:
    model, inputs = make("hunyuan")
    torch.compile(model, backend="quantsparse", options={"recipe": SPARSE})(**inputs)
    (report,) = [p for p in qs.reports()[-1].passes if p.name == "trim_padding_mask"]
    assert report.matched == 4
    assert [reason for _, reason in report.skipped] == ["the graph does not prove that the mask is a prefix"]
