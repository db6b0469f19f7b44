"""attach() under real pipelines: each announces its steps in its own way."""

from __future__ import annotations

import threading

import pytest
import torch

import qs_compiler as qs
from tests.backend.pipelines import PIPELINES, run

pytestmark = [
    pytest.mark.usefixtures("eager_graphs"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*"),
]
RECIPE = {"density": 0.5, "block_size": 64}
# 8 steps, warm-up 1, interval 5: refreshes at 1 and 6. Wan calls twice a step; the second expert of Wan 2.2 starts
# where the first one's caches are not its own, so it refreshes at its first step.
CALLS = {
    "wan": {"dense": 2, "refresh": 4, "sparse": 10},
    "wan 2.2": {"dense": 2, "refresh": 6, "sparse": 8},
    "cogvideox": {"dense": 1, "refresh": 2, "sparse": 5},
    "ltx": {"dense": 1, "refresh": 2, "sparse": 5},
    "hunyuan": {"dense": 1, "refresh": 2, "sparse": 5},
}


def attached(name: str):
    pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return qs.attach(pipe, recipe=RECIPE)


def calls_since(count: int) -> dict[str, int]:
    total = {"dense": 0, "refresh": 0, "sparse": 0}
    for report in qs.reports()[count:]:
        for phase, number in report.calls.items():
            total[phase] += number
    return total


@pytest.mark.parametrize("name", PIPELINES)
def test_steps_are_heard_and_a_second_video_is_a_fresh_one(name: str) -> None:
    count = len(qs.reports())
    pipe = attached(name)
    first = run(name, pipe)
    assert calls_since(count) == CALLS[name]
    torch.testing.assert_close(run(name, pipe), first, rtol=1e-4, atol=1e-4)
    assert calls_since(count) == {phase: 2 * number for phase, number in CALLS[name].items()}


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_an_interrupted_video_leaves_nothing_behind(name: str) -> None:
    pipe = attached(name)
    want = run(name, pipe, seed=1)

    def stop(pipeline, step, timestep, tensors):
        if step == 3:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        run(name, pipe, seed=2, callback_on_step_end=stop)
    torch.testing.assert_close(run(name, pipe, seed=1), want, rtol=1e-4, atol=1e-4)


def test_two_pipelines_interleaved() -> None:
    pipes = {seed: attached("wan") for seed in (1, 2)}
    want = {seed: run("wan", pipe, seed=seed) for seed, pipe in pipes.items()}
    inside = {}

    def other_video(pipeline, step, timestep, tensors):
        if step == 4:
            inside[2] = run("wan", pipes[2], seed=2)
        return tensors

    outside = run("wan", pipes[1], seed=1, callback_on_step_end=other_video)
    torch.testing.assert_close(outside, want[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inside[2], want[2], rtol=1e-4, atol=1e-4)


def test_one_model_in_two_threads() -> None:
    pipe = attached("wan")
    want = {seed: run("wan", pipe, seed=seed) for seed in (1, 2)}
    schedulers = {seed: type(pipe.scheduler).from_config(pipe.scheduler.config) for seed in want}
    got: dict[int, torch.Tensor] = {}

    def generate(seed: int) -> None:
        from qs_compiler.step_hook import HOOK, watch_scheduler

        twin = type(pipe)(**{**pipe.components, "scheduler": schedulers[seed]})
        twin.set_progress_bar_config(disable=True)
        registry = pipe.transformer._diffusers_hook
        watch_scheduler(twin.scheduler, registry.get_hook(HOOK)._signal)
        got[seed] = run("wan", twin, seed=seed)

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for seed in want:
        torch.testing.assert_close(got[seed], want[seed], rtol=1e-4, atol=1e-4)


def test_a_cache_budget_that_is_too_small_is_refused() -> None:
    pipe = PIPELINES["wan"]()
    pipe.set_progress_bar_config(disable=True)
    qs.attach(pipe, recipe=RECIPE, memory_budget=1000)
    with pytest.raises(qs.QuantSparseError, match=r"residual caches .* memory_budget"):
        run("wan", pipe)
