"""When layers refresh, staggered or by drift: their caches are their own refresh's, whoever compiled them with whom."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn

import qs_compiler as qs
from qs_compiler.errors import RecipeError
from qs_compiler.runtime.schedule import Schedule
from tests.backend.models import RECIPE, clip, make

STEPS, BLOCKS = 7, 4
STAGGERED = {**RECIPE, "format": "off", "interval": 2, "refresh": "staggered"}
ADAPTIVE = {**RECIPE, "format": "off", "interval": 4, "refresh": "adaptive", "max_drift": 0.4}


class Runs:
    """A model and what its runs gave."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.ran = model, None

    def denoise(self, *videos: int, until: int = STEPS, leave_out: tuple[int, ...] = ()) -> list[list[torch.Tensor]]:
        """The outputs of each video, several of them as branches of one run; `stamps`, `drifts`: of each step."""
        self.stamps, self.drifts, out = [], [], [[] for _ in videos]
        before = collections.Counter() if self.ran is None else self.calls()
        clips = [clip(video, STEPS) for video in videos]
        with qs.denoising(self.model, STEPS) as run:
            for step in range(until):
                for branch, inputs in enumerate(clips):
                    if step not in leave_out:
                        run.step(step, branch=str(branch))
                        out[branch].append(self.model(**inputs[step]))
                entries = run.caches("0")
                self.stamps.append([entry.computed_at for entry in entries])
                self.drifts.append([float(e.tensors["drift"]) for e in entries if "drift" in e.tensors])
        self.ran = {name: n for name, n in (self.calls() - before).items() if n}
        return out

    def calls(self) -> collections.Counter[str]:
        return collections.Counter(qs.reports()[-1].calls)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize(
    "fields", [{"correction": "second_order", "rank": 2}, {"correction": "first_order", "mask": "mass"}]
)
def test_each_layer_refreshes_at_its_own_steps(fields: dict) -> None:
    options = {"recipe": {**STAGGERED, **fields}}
    blocks = Runs(make(blocks=BLOCKS))
    for block in blocks.model.blocks:
        block.compile(backend="quantsparse", options=options, dynamic=False)
    a, b = (blocks.denoise(video)[0] for video in (7, 8))  # a graph a block has no mixed form: each runs its own phase

    whole = Runs(torch.compile(make(blocks=BLOCKS), backend="quantsparse", options=options, dynamic=False))
    assert same(whole.denoise(7)[0], a)
    assert whole.stamps == blocks.stamps
    assert whole.stamps == [[0] * 4, [0, 0, 1, 1], [2, 2, 1, 1], [2, 2, 3, 3], [4, 4, 3, 3], [4, 4, 5, 5], [6, 6, 5, 5]]
    assert dict(qs.reports()[-1].calls) == {"dense": 0, "refresh": 1, "sparse": 0, "mixed": STEPS - 1}
    passes = [p for p in qs.reports()[-1].passes if p.phase == "mixed"]
    assert [p.matched for p in passes if p.name == "outline_repeated_blocks"] == [BLOCKS, BLOCKS], "two bodies a form"

    whole.denoise(7, until=4)  # given up and started again
    assert same(whole.denoise(8)[0], b)
    one, two = whole.denoise(7, 8)
    assert same(one, a) and same(two, b), "each branch has refreshes of its own"
    # Two layers refresh at step 3 only, or else have nothing valid for step 4: then all do.
    whole.denoise(7, until=5, leave_out=(3,))
    assert whole.ran == {"refresh": 2, "mixed": 2} and whole.stamps[-1] == [4] * 4


def test_staggered_schedule() -> None:
    staggered = Schedule(5, 0.1, staggered=True)
    assert [staggered.late(i, 8, 20) for i in range(8)] == [0, 0, 1, 1, 2, 3, 3, 4]
    assert [staggered.refresh_step(i, 20, late=3) for i in range(2, 12)] == [2, 2, 2, 5, 5, 5, 5, 5, 10, 10]
    assert staggered.tau(5, 20, late=3) == 3 and staggered.tau(10, 20, late=3) == 5 and staggered.tau(2, 20) == 5
    assert staggered.counts(20) == {"dense": 2, "refresh": 1, "mixed": 17}
    # Layers that are late by 1 or 2 refresh 5 times in 20 steps, those late by 3 or 4 and those on time 4 times.
    assert staggered.average_density(0.25, 20) == pytest.approx(1 - 0.75 * (14 * 3 + 13 * 2) / 5 / 20)
    with pytest.raises(RecipeError, match="give one"):
        qs.Recipe(refresh="staggered", refresh_steps=(2, 5))
    with pytest.raises(RecipeError, match=r"refresh 'stagered' is not known.*staggered"):
        qs.Recipe(refresh="stagered")


@pytest.mark.usefixtures("eager_graphs")
def test_a_refresh_comes_when_q_has_drifted() -> None:
    model, inputs = make(blocks=2), clip(7, STEPS)
    queries = []
    hook = model.blocks[0].qkv.register_forward_hook(lambda module, args, out: queries.append(out[..., :32].bfloat16()))
    for one in inputs:
        model(**one)
    hook.remove()
    first = [float((q - queries[0]).float().norm() / queries[0].float().norm()) for q in queries[:3]]

    options = {"recipe": ADAPTIVE}
    whole = Runs(torch.compile(model, backend="quantsparse", options=options))
    out = whole.denoise(7)[0]
    assert whole.stamps == [[at] * 2 for at in (0, 0, 0, 3, 3, 3, 6)] and whole.ran == {"refresh": 3, "sparse": 4}
    # Layer 0 sees nothing of an attention before it, so its q is the full model's.
    assert [d[0] for d in whole.drifts[:3]] == pytest.approx(first, rel=1e-3)
    above = [sum(d) / 2 > ADAPTIVE["max_drift"] for d in whole.drifts]
    assert above == [False, False, True, False, False, True, False], "each refresh comes a step later"
    assert same(whole.denoise(7)[0], out)

    blocks = Runs(make(blocks=2))
    for block in blocks.model.blocks:
        block.compile(backend="quantsparse", options=options)
    assert same(blocks.denoise(7)[0], out) and blocks.stamps == whole.stamps, "all graphs of a step decide alike"


def test_adaptive_schedule() -> None:
    schedule = Schedule.of(qs.Recipe(density=0.25, refresh="adaptive", interval=5, min_interval=3, max_drift=0.1))
    decisions, asked = [], []
    for step in range(2, 16):
        drift = 0.2 if step in (3, 4, 5, 12) else 0.05
        last = decisions[-1] if decisions else None
        one = schedule.decide(step, 20, last, lambda d=drift, s=step: asked.append(s) or d)
        assert schedule.decide(step, 20, one, lambda: 1.0) == one, "the same step again"
        decisions.append(one)
    assert [d.refresh for d in decisions] == [2, 2, 2, 5, 5, 5, 5, 5, 10, 10, 10, 10, 10, 15]
    assert [d.tau for d in decisions] == [5, 5, 5, 3, 3, 3, 3, 3, 5, 5, 5, 5, 5, 5]
    assert asked == [5, 8, 9, 13, 14], "the device is waited for only where its answer counts"
    for fields, text in (
        ({"max_drift": 0}, "max_drift must be a number above 0, a relative change, not 0"),
        ({"min_interval": 1}, "min_interval must be an integer of at least 2, not 1"),
        ({"refresh": "adaptive", "min_interval": 6}, "min_interval 6 is above interval 5"),
    ):
        with pytest.raises(RecipeError, match=text):
            qs.Recipe(**fields)
