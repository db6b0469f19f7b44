"""mask="mass": the mass that ranks the blocks is that of the refresh before, of the same video."""

from __future__ import annotations

import pytest
import torch

import qs_compiler as qs
from qs_compiler.passes import quantize_attention
from qs_compiler.runtime.cache_layout import block_budget, cache_bytes
from tests.backend.models import RECIPE, clip, make
from tests.tolerances import assert_close, relative_error

STEPS = 5
MASS = {**RECIPE, "format": "off", "interval": 2, "correction": "first_order", "mask": "mass"}  # refreshes at 0, 2, 4
HEADS, BLOCK = 2, RECIPE["block_size"]
# Scores reach 10 by design and int8 codes hold them to 1/250 of that: weights, hence masses, are off by up to 4 %.
INT8_MASS_ERROR = 0.04


def compiled(blocks: int = 1, **recipe: object):
    """A small model. The mode makes each video take over the caches of the one before as they are."""
    torch._dynamo.reset()
    options = {"recipe": {**MASS, **recipe}, "mode": "reduce-overhead"}
    model = make(blocks=blocks)
    # Keys with a large mean, which 8-bit keys lose: it moves the log-sum-exps of each step.
    model.blocks[0].qkv.bias.data[32:64] = 4 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    return torch.compile(model, backend="quantsparse", options=options, dynamic=False)


class Video:
    """What one denoising run gave: outputs and the last layer's caches after each step."""

    def __init__(self, model, seed: int) -> None:
        self.out, self.caches, self.tensors = [], [], {}
        with qs.denoising(model, STEPS) as run:
            for step, inputs in enumerate(clip(seed, STEPS)):
                run.step(step)
                self.out.append(model(**inputs))
                entry = run.caches()[-1]
                self.tensors = entry.tensors
                self.caches.append({name: tensor.clone() for name, tensor in entry.tensors.items()})

    def same(self, other: Video) -> bool:
        pairs = [*zip(self.out, other.out, strict=True)]
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            pairs += [(mine[name], theirs[name]) for name in mine]
        return all(torch.equal(a, b) for a, b in pairs)


def exact(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (1, H, S, S) and log-sum-exps of the layer at one step of video 7: no attention comes before it."""
    model, found = compiled()._orig_mod, []
    hook = model.blocks[0].qkv.register_forward_hook(lambda module, args, out: found.append(out))
    model(**clip(7, STEPS)[step])
    hook.remove()
    q, k, _ = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in found[0].chunk(3, dim=-1))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return torch.softmax(scores, -1), torch.logsumexp(scores, -1)


@pytest.mark.usefixtures("eager_graphs")
def test_two_refreshes_rank_by_pooled_scores_and_the_third_by_mass() -> None:
    video, pooled = Video(compiled(), 7), Video(compiled(mask="pooled"), 7)
    assert dict(qs.reports()[-1].calls) == {"dense": 0, "refresh": 3, "sparse": 2}
    assert (video.caches[0]["block_mass"] == 0).all(), "no log-sum-exps to estimate it by"
    (weights, lse), (_, before) = exact(2), exact(0)
    assert_close(video.caches[0]["lse_prev"], before)
    assert_close(video.caches[2]["lse_prev"], lse)
    counts = torch.exp(lse - before)[..., None]
    mass = (weights * counts).unflatten(2, (-1, BLOCK)).unflatten(4, (-1, BLOCK)).sum((3, 5))
    assert_close(video.caches[2]["block_mass"], mass / mass.sum(-1, keepdim=True))

    lists = [caches["kv_indices"] for caches in video.caches]
    of_pooled = [caches["kv_indices"] for caches in pooled.caches]
    assert torch.equal(lists[0], of_pooled[0]) and torch.equal(lists[2], of_pooled[2])
    own, budget = torch.eye(mass.shape[-1], dtype=torch.bool), block_budget(RECIPE["density"], mass.shape[-1])
    ranked = torch.ops.quantsparse.select_blocks(video.caches[2]["block_mass"].float(), own, budget)[1]
    assert (video.caches[4]["kv_num_blocks"] == budget).all()
    assert torch.equal(lists[4], ranked[..., : lists[4].shape[-1]].short())
    assert not torch.equal(lists[4][..., :budget], of_pooled[4][..., :budget])
    assert torch.equal(video.caches[3]["block_mass"], video.caches[2]["block_mass"]), "a sparse step changes nothing"


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("attention", ["16bit", "int8"])
def test_a_video_uses_nothing_of_the_one_before(attention: str) -> None:
    model = compiled(attention=attention)
    a, b, again = (Video(model, seed) for seed in (7, 8, 7))
    for name in ("block_mass", "lse_prev"):
        assert again.tensors[name] is a.tensors[name], "the tensors held the other video's values"
        assert (b.caches[-1][name] != 0).any()
    assert again.same(a) and not b.same(a)


@pytest.mark.usefixtures("eager_graphs")
def test_second_order_keeps_its_first_mask_so_it_caches_no_mass() -> None:
    mass, pooled = ({**MASS, "correction": "second_order", "mask": mask} for mask in ("mass", "pooled"))
    video, other = (Video(compiled(**recipe), 7) for recipe in (mass, pooled))
    assert video.tensors.keys() == other.tensors.keys() and video.same(other)
    assert len({cache_bytes(qs.Recipe.parse(recipe), (1, HEADS, 80, 16)) for recipe in (mass, pooled)}) == 1


def test_compiled_a_video_uses_nothing_of_the_one_before() -> None:
    model = compiled(blocks=2, attention="int8")  # two blocks, so that they share a body
    a, b, again = (Video(model, seed) for seed in (7, 8, 7))
    outlined = [p.matched for p in qs.reports()[-1].passes if p.name == "outline_repeated_blocks"]
    assert outlined == [2, 2, 2]
    assert again.tensors["block_mass"] is a.tensors["block_mass"]
    assert again.same(a) and not b.same(a)
    sums = a.caches[2]["block_mass"].float().sum(-1)
    assert (a.caches[0]["block_mass"] == 0).all()
    assert_close(sums, torch.ones_like(sums), 2**-8)  # the rounding of bfloat16


@pytest.mark.usefixtures("eager_graphs")
def test_int8_keys_estimate_the_same_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, got = (Video(compiled(attention=name), 7).caches[2] for name in ("16bit", "int8"))
    assert_close(got["lse_prev"], wanted["lse_prev"], INT8_MASS_ERROR)
    assert_close(got["block_mass"], wanted["block_mass"], INT8_MASS_ERROR)
    monkeypatch.setattr(quantize_attention, "_lse_shift", lambda codes, scales, *_: 0 * scales)
    without = Video(compiled(attention="int8"), 7).caches[2]
    assert relative_error(without["block_mass"], wanted["block_mass"]) > 10 * INT8_MASS_ERROR
