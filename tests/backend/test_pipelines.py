"""attach() under real pipelines: each announces its steps in its own way."""

from __future__ import annotations

import functools
import threading

import diffusers
import pytest
import torch

import qs_compiler as qs
from tests.backend.pipelines import PIPELINES, run

pytestmark = [
    pytest.mark.usefixtures("eager_graphs"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*"),
]
RECIPE = {"density": 0.5, "block_size": 64, "interval": 4}
# 8 steps, warm-up 1, interval 4: refreshes at 1 and 5. Wan calls twice a step; the second expert of Wan 2.2 starts
# where the first one's caches are not its own, so it refreshes at its first step.
CALLS = {
    "wan": {"dense": 2, "refresh": 4, "sparse": 10},
    "wan 2.2": {"dense": 2, "refresh": 6, "sparse": 8},
    "cogvideox": {"dense": 1, "refresh": 2, "sparse": 5},
    "ltx": {"dense": 1, "refresh": 2, "sparse": 5},
    "hunyuan": {"dense": 1, "refresh": 2, "sparse": 5},
    "hunyuan 1.5": {"dense": 36, "refresh": 8, "sparse": 20},  # of 2 blocks in 2 branches, and 2 graphs around them
}


def attached(name: str):
    pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return qs.attach(pipe, recipe=RECIPE)


def calls_since(count: int, blocks: bool = False) -> dict[str, int]:
    """Calls of the graphs compiled since; `blocks`: of those that hold an attention which may run sparse."""
    total = {"dense": 0, "refresh": 0, "sparse": 0}
    for report in [r for r in qs.reports()[count:] if r.attentions[0] or not blocks]:
        for phase, number in report.calls.items():
            total[phase] += number
    return total


@functools.cache
def fresh(name: str, **call: object) -> torch.Tensor:
    """A video from a pipeline that has made no other."""
    torch._dynamo.reset()
    return run(name, attached(name), **call)


def interrupt(name: str, pipe, at: int = 3) -> None:
    """Start a video and give it up before the end of step `at`, when its caches are full."""
    step, left = pipe.scheduler.step, iter(range(at))

    def stop(*args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    pipe.scheduler.step = stop
    with pytest.raises(KeyboardInterrupt):
        run(name, pipe, seed=2)
    pipe.scheduler.step = step


@pytest.mark.parametrize("name", PIPELINES)
def test_steps_are_heard_and_every_video_is_a_fresh_one(name: str) -> None:
    count = len(qs.reports())
    pipe = attached(name)
    run(name, pipe)
    assert calls_since(count) == CALLS[name]
    interrupt(name, pipe)
    before = calls_since(count)
    compiled = [len(report.passes) for report in qs.reports()]
    with torch.compiler.set_stance("fail_on_recompile"):
        second = run(name, pipe, seed=1)
    assert [len(report.passes) for report in qs.reports()] == compiled, "no phase was built again"
    assert {phase: n - before[phase] for phase, n in calls_since(count).items()} == CALLS[name]
    assert torch.equal(second, fresh(name, seed=1))


@pytest.mark.parametrize(
    ("name", "more", "calls"),
    [
        ("wan", {"guidance_scale": 1.0}, {"dense": 1, "refresh": 2, "sparse": 5}),
        ("ltx", {"guidance_scale": 1.0}, {"dense": 1, "refresh": 2, "sparse": 5}),
        (
            "hunyuan",
            {"true_cfg_scale": 3.0, "negative_prompt": "monkey"},
            {"dense": 2, "refresh": 4, "sparse": 10},
        ),
    ],
    ids=["wan without guidance", "ltx without guidance", "hunyuan with a second branch"],
)
def test_other_kinds_of_guidance(name: str, more: dict, calls: dict[str, int]) -> None:
    pipe = attached(name)
    run(name, pipe)  # another kind of guidance, before
    count = calls_since(0)
    got = run(name, pipe, seed=1, **more)
    assert {phase: n - count[phase] for phase, n in calls_since(0).items()} == calls
    assert torch.equal(got, fresh(name, seed=1, **more))


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_layers_skipped_by_a_step_cache(name: str) -> None:
    """FirstBlockCache breaks the graph: the first block always runs, the others when its output has changed."""

    def cached(seed: int, videos: tuple[int, ...]) -> tuple[torch.Tensor, dict[str, int]]:
        torch._dynamo.reset()
        count, pipe = len(qs.reports()), attached(name)
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.15))
        for video in videos:
            run(name, pipe, seed=video)
        before = calls_since(count, blocks=True)
        out = run(name, pipe, seed=seed)
        return out, {phase: n - before[phase] for phase, n in calls_since(count, blocks=True).items()}

    got, calls = cached(1, (0, 2))
    want, alone = cached(1, ())
    assert torch.equal(got, want) and calls == alone
    assert calls["sparse"] > 0
    assert sum(calls.values()) < 2 * sum(CALLS[name].values()), "some blocks were meant to be skipped"


def test_two_pipelines_interleaved() -> None:
    want = {seed: fresh("wan", seed=seed) for seed in (1, 2)}
    torch._dynamo.reset()
    pipes = {seed: attached("wan") for seed in (1, 2)}
    inside = {}

    def other_video(pipeline, step, timestep, tensors):
        if step == 4:
            inside[2] = run("wan", pipes[2], seed=2)
        return tensors

    outside = run("wan", pipes[1], seed=1, callback_on_step_end=other_video)
    assert torch.equal(outside, want[1])
    assert torch.equal(inside[2], want[2])


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
        assert torch.equal(got[seed], want[seed])


def test_a_cache_budget_that_is_too_small_is_refused() -> None:
    pipe = PIPELINES["wan"]()
    pipe.set_progress_bar_config(disable=True)
    qs.attach(pipe, recipe=RECIPE, memory_budget=1000)
    with pytest.raises(qs.QuantSparseError, match=r"residual caches .* memory_budget"):
        run("wan", pipe)
