"""Which step is it: every signal, and that a wrong or missing one never gives a sparse step.

Each case is held against a run with fresh state, and the phases are counted.
"""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn

import qs_compiler as qs
from qs_compiler.errors import SignalError
from qs_compiler.runtime.schedule import Schedule
from tests.backend.models import RECIPE, clip, make

pytestmark = pytest.mark.usefixtures("eager_graphs")
STEPS = 6  # refreshes at 0 and 4
NO_SIGNAL = "ignore:recipe .* runs dense while nothing says:UserWarning"


def compiled(seed: int = 1, **recipe: object) -> nn.Module:
    return torch.compile(make(seed), backend="quantsparse", options={"recipe": {**RECIPE, **recipe}})


def denoise(model: nn.Module, video: int, steps: int = STEPS) -> list[torch.Tensor]:
    with qs.denoising(model, steps) as run:
        out = []
        for i, inputs in enumerate(clip(video, steps)):
            run.step(i)
            out.append(model(**inputs))
    return out


def phases() -> dict[str, int]:
    return dict(qs.reports()[-1].calls)


def test_one_branch() -> None:
    denoise(compiled(), 7)
    assert phases() == {"dense": 0, "refresh": 2, "sparse": 4}


def built() -> list[str]:
    """The phases that were compiled, in their order."""
    return [p.phase for p in qs.reports()[-1].passes if p.name == "sparsify_attention"]


@pytest.mark.filterwarnings(NO_SIGNAL)
def test_every_phase_of_a_run_is_compiled_in_its_first_step() -> None:
    model = compiled(warmup=0.5)
    model(**clip(6, 1)[0])  # nobody says that more than a dense forward will come
    assert built() == ["dense"]
    with qs.denoising(model, STEPS) as run:
        for i, inputs in enumerate(clip(7, STEPS)):
            run.step(i)
            with torch.compiler.set_stance("fail_on_recompile"):
                model(**inputs)
            assert built() == ["dense", "refresh", "sparse"]
            assert phases()["dense"] == 1 + min(i + 1, 3)


def test_a_run_of_dense_steps_alone_compiles_no_other_phase() -> None:
    denoise(compiled(warmup=1.0), 7)
    assert built() == ["dense"] and phases() == {"dense": STEPS, "refresh": 0, "sparse": 0}


def test_warmup_and_interval_come_from_the_options() -> None:
    model = torch.compile(make(), backend="quantsparse", options={"recipe": RECIPE, "warmup": 0.5, "interval": 2})
    denoise(model, 7)
    assert phases() == {"dense": 3, "refresh": 2, "sparse": 1}


def test_sequential_guidance_keeps_a_cache_a_branch() -> None:
    model, out = compiled(), {"cond": [], "uncond": []}
    with qs.denoising(model, STEPS) as run:
        for i, (a, b) in enumerate(zip(clip(7, STEPS), clip(8, STEPS), strict=True)):
            for branch, inputs in (("cond", a), ("uncond", b)):
                run.step(i, branch=branch)
                out[branch].append(model(**inputs))
    assert phases() == {"dense": 0, "refresh": 4, "sparse": 8}
    for branch, video in (("cond", 7), ("uncond", 8)):
        torch._dynamo.reset()
        torch.testing.assert_close(out[branch], denoise(compiled(), video))


def test_two_calls_in_one_step_without_a_branch_have_caches_of_their_own() -> None:
    model, out = compiled(), ([], [])
    with qs.denoising(model, STEPS) as run:
        for i, pair in enumerate(zip(clip(7, STEPS), clip(8, STEPS), strict=True)):
            run.step(i)
            for results, inputs in zip(out, pair, strict=True):
                results.append(model(**inputs))
    for results, video in zip(out, (7, 8), strict=True):
        torch._dynamo.reset()
        torch.testing.assert_close(results, denoise(compiled(), video))


def test_batched_guidance_runs_as_one_branch() -> None:
    model = compiled()
    with qs.denoising(model, STEPS) as run:
        for i, inputs in enumerate(clip(7, STEPS, batch=2)):
            run.step(i)
            model(**inputs)
    assert phases() == {"dense": 0, "refresh": 2, "sparse": 4}


@pytest.mark.filterwarnings(NO_SIGNAL)
def test_a_second_video_starts_with_a_refresh() -> None:
    model = compiled()
    denoise(model, 7)
    second = denoise(model, 8)
    torch._dynamo.reset()
    torch.testing.assert_close(second, denoise(compiled(), 8))


def test_an_exception_in_mid_video_leaves_nothing_behind() -> None:
    model, inputs = compiled(), clip(7, STEPS)
    with pytest.raises(KeyboardInterrupt), qs.denoising(model, STEPS) as run:
        for i in range(3):
            run.step(i)
            model(**inputs[i])
            if i == 2:
                raise KeyboardInterrupt
    again = denoise(model, 8)
    torch._dynamo.reset()
    torch.testing.assert_close(again, denoise(compiled(), 8))


def test_interleaved_videos_of_one_model() -> None:
    model, out = compiled(), ([], [])
    with qs.denoising(model, STEPS) as one, qs.denoising(model, STEPS) as two:
        for i, pair in enumerate(zip(clip(7, STEPS), clip(8, STEPS), strict=True)):
            for run, results, inputs in zip((one, two), out, pair, strict=True):
                run.step(i)
                results.append(model(**inputs))
    assert phases()["sparse"] == 8
    for results, video in zip(out, (7, 8), strict=True):
        torch._dynamo.reset()
        torch.testing.assert_close(results, denoise(compiled(), video))


def test_two_threads_with_one_model() -> None:
    model, out, barrier = compiled(), {}, threading.Barrier(2)
    denoise(model, 9)  # compiled before the threads start: Dynamo's own compile is not what is tested

    def run(video: int) -> None:
        with torch.no_grad(), qs.denoising(model, STEPS) as steps:
            out[video] = []
            for i, inputs in enumerate(clip(video, STEPS)):
                steps.step(i)
                barrier.wait(30)
                out[video].append(model(**inputs))

    threads = [threading.Thread(target=run, args=(video,)) for video in (7, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for video in (7, 8):
        torch._dynamo.reset()
        torch.testing.assert_close(out[video], denoise(compiled(), video))


def test_shapes_that_change_in_mid_video_refresh() -> None:
    model = compiled()
    small, large = clip(7, STEPS), clip(7, STEPS, tokens=448)
    with qs.denoising(model, STEPS) as run:
        for i in range(STEPS):
            run.step(i)
            out = model(**(small if i < 2 else large)[i])
    want = make(1)(**large[STEPS - 1])
    assert (out - want).norm() / want.norm() < 0.5
    total = {k: sum(r.calls[k] for r in qs.reports()[-2:]) for k in ("dense", "refresh", "sparse")}
    assert total == {"dense": 0, "refresh": 3, "sparse": 3}


def test_a_layer_skipped_in_its_refresh_refreshes_later() -> None:
    model = make(1)
    for block in model.blocks:
        block.compile(backend="quantsparse", options={"recipe": RECIPE})
    inputs = clip(7, STEPS)
    model.blocks[1]._compiled_call_impl, kept = (lambda x, embedding: x), model.blocks[1]._compiled_call_impl
    with qs.denoising(model, STEPS) as run:
        for i in range(STEPS):
            if i == 2:
                model.blocks[1]._compiled_call_impl = kept
            run.step(i)
            model(**inputs[i])
    # One block: 2 refreshes, 4 sparse. The skipped one: late refresh at 2, sparse at 3, refresh at 4, sparse at 5.
    assert phases() == {"dense": 0, "refresh": 4, "sparse": 6}


def test_outside_a_run_there_is_no_signal() -> None:
    model = compiled()
    denoise(model, 7)
    before = phases()["dense"]
    for inputs in clip(7, 3):
        model(**inputs)
    assert phases() == {"dense": before + 3, "refresh": 2, "sparse": 4}


def test_no_signal_runs_dense_and_warns_once() -> None:
    model = compiled()
    with pytest.warns(UserWarning, match="runs dense while nothing says") as caught:
        for inputs in clip(7, 3):
            model(**{**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()})
    assert len([w for w in caught if "runs dense" in str(w.message)]) == 1
    assert phases() == {"dense": 3, "refresh": 0, "sparse": 0}


def test_strict_makes_a_missing_signal_an_error() -> None:
    model = make(1)
    keep = ["proj_*", "embed", "*modulation"]
    options = {"recipe": {**RECIPE, "format": "off", "keep": keep}, "strict": True}
    with pytest.raises(qs.QuantSparseError, match="denoising step"):
        torch.compile(model, backend="quantsparse", options=options)(**clip(7, 1)[0])


@pytest.mark.filterwarnings(NO_SIGNAL)
class TestGuessedFromTheInputs:
    def test_a_plain_loop_runs_sparse_after_its_first_steps(self) -> None:
        model = compiled()
        inputs = clip(7, 12)
        outputs = [model(**i) for i in inputs]
        calls = phases()
        assert calls["dense"] == 1 and calls["sparse"] > 0 and sum(calls.values()) == 12
        torch._dynamo.reset()
        dense = torch.compile(make(1), backend="quantsparse", options={"recipe": "w8a8"})
        for i in (0, 1, 4, 8):  # dense, and the refreshes
            want = dense(**inputs[i])
            assert (outputs[i] - want).norm() / want.norm() < 2e-3

    def test_the_warmup_is_told_by_the_timestep(self) -> None:
        model = compiled(warmup=0.5)
        for inputs in clip(7, 12):
            model(**inputs)
        assert phases()["dense"] == 6

    def test_alternating_videos_with_texts_of_their_own(self) -> None:
        model, out = compiled(), ([], [])
        for pair in zip(clip(7, 12), clip(8, 12), strict=True):
            for results, inputs in zip(out, pair, strict=True):
                results.append(model(**inputs))
        for results, video in zip(out, (7, 8), strict=True):
            torch._dynamo.reset()
            alone = compiled()
            torch.testing.assert_close(results, [alone(**i) for i in clip(video, 12)])

    @pytest.mark.parametrize("offset", [0, 1], ids=["same steps", "900, 890, 880 alternating"])
    def test_alternating_videos_with_one_text_run_dense(self, offset: int) -> None:
        model = compiled()
        text = clip(7, 1)[0]["encoder_hidden_states"]
        first, second = clip(7, 24), clip(8, 24)
        for i in range(0, 22, 2):
            for inputs in (first[i], second[i + offset]):
                model(**{**inputs, "encoder_hidden_states": text})
        assert phases()["sparse"] == 0 and phases()["refresh"] == 0

    def test_a_rising_or_repeated_timestep_is_a_new_video(self) -> None:
        model = compiled()
        inputs = clip(7, 12)
        for i in (0, 1, 2, 2):
            model(**inputs[i])
        assert phases()["sparse"] == 1  # 0 dense, 1 refresh, 2 sparse, 2 again: dense
        model(**inputs[0])
        assert phases() == {"dense": 3, "refresh": 1, "sparse": 1}

    def test_two_models_with_one_graph_have_streams_of_their_own(self) -> None:
        models = {seed: compiled(seed) for seed in (1, 2)}
        out = {1: [], 2: []}
        inputs = clip(7, 12)
        for step in inputs:
            for seed, model in models.items():
                out[seed].append(model(**step))
        for seed in (1, 2):
            torch._dynamo.reset()
            alone = compiled(seed)
            torch.testing.assert_close(out[seed], [alone(**i) for i in inputs])


class TestCallerErrors:
    @pytest.mark.parametrize("steps", [0, -1, 2.5, True, None])
    def test_num_steps(self, steps: object) -> None:
        with pytest.raises(SignalError, match="num_steps"), qs.denoising(make(), steps):
            pass

    @pytest.mark.parametrize("step", [-1, STEPS, 1.0, None])
    def test_step_out_of_range(self, step: object) -> None:
        with qs.denoising(make(), STEPS) as run, pytest.raises(SignalError, match="not within 0 to 5"):
            run.step(step)

    def test_a_falling_step(self) -> None:
        with qs.denoising(make(), STEPS) as run:
            run.step(3)
            with pytest.raises(SignalError, match="follows step 3"):
                run.step(2)

    def test_a_run_that_is_over(self) -> None:
        with qs.denoising(make(), STEPS) as run:
            pass
        with pytest.raises(SignalError, match="over"):
            run.step(0)

    def test_something_that_is_no_model(self) -> None:
        with pytest.raises(SignalError, match="neither a module"), qs.denoising("wan", STEPS):
            pass


def test_schedule_of_the_paper() -> None:
    schedule = Schedule(interval=5, warmup=0.1)
    assert schedule.counts(50) == {"dense": 5, "refresh": 9, "sparse": 36}
    assert schedule.average_density(0.15, 50) == pytest.approx((14 + 36 * 0.15) / 50)
    assert [schedule.refresh_step(i, 50) for i in (4, 5, 9, 10, 49)] == [None, 5, 5, 10, 45]


def test_explicit_steps_replace_interval_and_warmup() -> None:
    schedule = Schedule.of(qs.Recipe(density=0.25, interval=5, warmup=0.5, refresh_steps=[2, 5, 9]))
    uses = [None, None, 2, 2, 2, 5, 5, 5, 5, 9, 9, 9]
    assert [schedule.refresh_step(i, 12) for i in range(12)] == uses
    assert schedule.counts(12) == {"dense": 2, "refresh": 3, "sparse": 7}
    assert [schedule.tau(r, 12) for r in (2, 5, 9)] == [5, 3, 4]


def test_runs_of_few_steps_refresh_every_second_one() -> None:
    schedule = Schedule(interval=5, warmup=0.1)
    assert [schedule.refresh_step(i, 8) for i in range(8)] == [None, 1, 1, 3, 3, 5, 5, 7]
    assert schedule.tau(3, 8) == 2
    assert [schedule.refresh_step(i, 9) for i in range(9)] == [None, 1, 1, 1, 1, 1, 6, 6, 6]
    assert [Schedule(4, 0.0).refresh_step(i, 8) for i in (1, 3, 4)] == [0, 0, 4], "an interval of one's own is kept"
    assert Schedule(interval=1, warmup=0.0).counts(4) == {"dense": 0, "refresh": 4, "sparse": 0}
    assert schedule.refresh_step(6, 0) == 5, "a run of unknown length keeps its interval"


def test_explicit_steps_are_heard() -> None:
    model = compiled(refresh_steps=(1, 4))
    denoise(model, 7)
    assert qs.reports()[-1].calls == {"dense": 1, "refresh": 2, "sparse": STEPS - 3}


def test_no_step_recompiles() -> None:
    model = compiled()
    denoise(model, 7)
    count = len(qs.reports())
    with torch.compiler.set_stance("fail_on_recompile"), warnings.catch_warnings():
        denoise(model, 8)
    assert len(qs.reports()) == count
