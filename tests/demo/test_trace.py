import dataclasses

import pytest
import torch

from qs_compiler import attach
from qs_compiler.demo.captions import EXAMPLE
from qs_compiler.demo.model import load_model
from qs_compiler.demo.trace import sample_traced, step_errors
from tests.tiny_demo import SETTING, SPARSE

pytestmark = pytest.mark.usefixtures("eager_graphs")


@pytest.fixture
def twin(tiny_folder):
    return sample_traced(*load_model(folder=tiny_folder), EXAMPLE, SETTING, 3, announce=False)


def compressed(tiny_folder, setting=SETTING, announce=True, **changes):
    model, text = load_model(folder=tiny_folder)
    attach(model, recipe=dataclasses.replace(SPARSE, **changes))
    return sample_traced(model, text, EXAMPLE, setting, 3, announce=announce)


def test_every_step_knows_its_phase_and_its_state(tiny_folder, twin):
    trace = compressed(tiny_folder)
    assert trace.phases == ["dense", "refresh", "sparse", "sparse"]
    assert twin.phases == [None] * 4
    assert [len(branches) for branches in trace.velocities] == [2] * 4
    assert torch.equal(trace.states[0], twin.states[0]), "the same noise"
    assert trace.clip.shape == (3, 16, 16, 16)


def test_kept_blocks_are_those_of_the_run(tiny_folder):
    trace = compressed(tiny_folder)
    assert [k.layer for k in trace.kept] == ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q"]
    for kept in trace.kept:
        assert kept.map.shape == (2, 4, 4)
        assert (kept.map.sum(-1) == 2).all(), "half of four blocks in every row"
        assert kept.map.diagonal(dim1=1, dim2=2).all()
        assert kept.density == 0.5


def test_without_the_signal_nothing_runs_sparse(tiny_folder):
    with pytest.warns(UserWarning, match="runs dense"):
        trace = compressed(tiny_folder, announce=False)
    assert "sparse" not in trace.phases
    assert trace.kept == []


def test_errors_start_with_the_first_sparse_step(tiny_folder, twin):
    errors = step_errors(compressed(tiny_folder, format="off", correction="none"), twin)
    assert [e.step for e in errors] == [0, 1, 2, 3]
    # Dense and refresh compute the same attention another way: float32 rounding.
    assert max(e.velocity for e in errors[:2]) < 1e-4
    assert errors[2].velocity > 10 * errors[1].velocity
    assert errors[3].state > errors[2].state > 0


def test_a_run_has_no_distance_to_itself(twin):
    assert all(e.velocity == e.state == 0 for e in step_errors(twin, twin))


def test_without_guidance_a_step_is_one_call(tiny_folder):
    trace = compressed(tiny_folder, dataclasses.replace(SETTING, guidance=1.0))
    assert [len(branches) for branches in trace.velocities] == [1] * 4
    assert trace.phases[-1] == "sparse"
