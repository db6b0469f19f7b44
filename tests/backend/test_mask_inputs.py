"""Masks that a graph is given: each is looked at once, and one that hides more than an end runs dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qs_compiler as qs
from qs_compiler.errors import UnsupportedError
from qs_compiler.passes import quantize_attention
from qs_compiler.runtime import graph as runtime_graph
from qs_compiler.runtime import prefix_masks
from tests.backend.diffusers_models import at_step, make
from tests.tolerances import RELATIVE_ERROR, assert_close, relative_error

SPARSE = {"format": "w8a8", "density": 0.25, "block_size": 64, "warmup": 0.2, "interval": 3}
STEPS, TOKENS, WIDTH = 6, 320, 32
KEPT = [9, 9, 4, 4, 12, 7]  # text tokens of each step
CODES = 2e-3  # float32 roundings move int8 codes, of dense steps that agree otherwise
PATTERN = "runs attention dense"


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing is known of any mask; what was found at each look."""
    found: list[int] = []

    def look(mask: torch.Tensor) -> int:
        found.append(shortest(mask))
        return found[-1]

    shortest = prefix_masks.shortest_prefix
    monkeypatch.setattr(prefix_masks, "shortest_prefix", look)
    monkeypatch.setattr(runtime_graph, "PREFIX_MASKS", prefix_masks.PrefixMasks())
    return found


def hunyuan_run(compile: bool | str, **options: object) -> list[torch.Tensor]:
    """Each step of a run whose padding changes from step to step."""
    torch._dynamo.reset()
    model, inputs = make("hunyuan")
    model = qs.attach(model, compile=compile, **{"recipe": SPARSE, **options})
    outputs = []
    with qs.denoising(model, STEPS) as run:
        for i, kept in enumerate(KEPT):
            run.step(i)
            step = {**at_step(inputs, i, STEPS), "encoder_attention_mask": (torch.arange(12) < kept)[None]}
            outputs.append(model(**step)[0])
    return outputs


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize(
    "more", [{"token_order": "rows"}, {"token_order": "tiles"}, {"attention": "int8"}], ids=["rows", "tiles", "int8"]
)
def test_blocks_of_hunyuan_run_as_the_whole_model(looks: list[int], more: dict) -> None:
    options = {"recipe": {**SPARSE, **more}, "grid": (5, 8, 8)}
    want = hunyuan_run(True, **options)
    assert looks == [], "the graph of the whole model proves it"
    count = len(qs.reports())
    got = hunyuan_run("blocks", **options)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    assert looks == [TOKENS + kept for kept in KEPT], "one look a forward"
    reports = qs.reports()[count:]
    assert len(reports) == 3, "a graph for each kind of block: no length compiled another"
    assert [r.attentions for r in reports] == [(1, 1)] * 3
    assert all(r.calls["sparse"] == r.calls["dense"] == r.calls["refresh"] > 0 for r in reports)


def test_compiled_blocks_of_hunyuan(monkeypatch: pytest.MonkeyPatch) -> None:
    got = hunyuan_run("blocks")
    assert qs.reports()[-1].calls == {"dense": 2, "refresh": 2, "sparse": 2}  # of the single blocks behind the first
    monkeypatch.setattr(qs._compat, "compile_graph", lambda module, inputs, patches, own_context: module.forward)
    for a, b in zip(got, hunyuan_run(True), strict=True):
        assert relative_error(a, b) < CODES


@pytest.mark.parametrize("more", [{"token_order": "rows"}, {}, {"attention": "int8"}], ids=["rows", "tiles", "int8"])
@pytest.mark.parametrize("compile", [True, "blocks"])
def test_hunyuan15_runs_sparse(looks: list[int], compile: bool | str, more: dict) -> None:
    """The outputs of dense steps and refreshes are those of texts without padding."""
    (model, inputs), count = make("hunyuan 1.5"), len(qs.reports())
    kept = [(9, 4), (9, 4), (3, 0), (12, 6), (1, 1), (7, 2)]
    short = [
        {name: text[:, :n] for n, end in zip(lengths, ("", "_2"), strict=True) for name, text in inputs.items()
         if name in (f"encoder_hidden_states{end}", f"encoder_attention_mask{end}")}
        for lengths in kept
    ]  # fmt: skip
    exact = make("hunyuan 1.5")[0]
    qs.attach(model, recipe={**SPARSE, "format": "off", **more}, compile=compile)
    with qs.denoising(model, STEPS) as run:
        for i, lengths in enumerate(kept):
            run.step(i)
            step = at_step(inputs, i, STEPS)
            masks = {
                f"encoder_attention_mask{end}": (torch.arange(n) < length)[None].long()
                for n, end, length in zip((12, 6), ("", "_2"), lengths, strict=True)
            }
            out = model(**{**step, **masks})[0]
            want = exact(**{**step, **{n: torch.ones_like(t) if "mask" in n else t for n, t in short[i].items()}})[0]
            error = relative_error(out, want)
            if i in (3, 4):
                assert 1e-3 < error < 0.02, f"sparse step {i}: {error}"
            else:
                exactly = i < 2 or "attention" not in more
                assert error < (RELATIVE_ERROR[torch.float32] if exactly else CODES), f"step {i}: {error}"
    assert looks == [sum(lengths) for lengths in kept], "one look a forward"
    (block,) = [report for report in qs.reports()[count:] if report.attentions[0]]
    assert block.attentions == (1, 1) and min(block.calls.values()) >= 4, "two blocks in each phase"
    (ordered,) = {p.matched for p in block.passes if p.name == "order_tokens"}
    assert ordered == (0 if more.get("token_order") == "rows" else 1)


class Block(nn.Module):
    """Masked self-attention; `square`: what is hidden does not ask either."""

    def __init__(self, square: bool = False) -> None:
        super().__init__()
        self.square = square
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        mask = mask[:, None, None]
        if self.square:
            mask = mask.repeat(1, 1, TOKENS, 1)
            mask = mask & mask.transpose(2, 3)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Masked(nn.Module):
    """Takes (x (B, S, C), mask (B, S) bool); the mask reaches its blocks as it came."""

    def __init__(self, square: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(square) for _ in range(3))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


X = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
ALWAYS = {**SPARSE, "warmup": 0.0}


def masked(square: bool = False, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return qs.attach(Masked(square).eval(), compile="blocks", **{"recipe": ALWAYS, **options})


def prefix(*lengths: int) -> torch.Tensor:
    return torch.arange(TOKENS) < torch.tensor(lengths)[:, None]


def holes() -> torch.Tensor:
    mask = prefix(300, 200)
    mask[1, 3] = False
    return mask


def steps(model: nn.Module, *masks: torch.Tensor, x: torch.Tensor = X) -> list[torch.Tensor]:
    with qs.denoising(model, len(masks)) as run:
        outputs = []
        for i, mask in enumerate(masks):
            run.step(i)
            outputs.append(model(x, mask))
    return outputs


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("square", [False, True])
def test_a_mask_that_is_no_prefix_runs_dense(looks: list[int], square: bool) -> None:
    masks = [prefix(300, 200), holes(), prefix(300, 200), prefix(310, 7)]
    want = steps(masked(square, recipe="w8a8"), *masks)
    assert looks == [], "a dense recipe takes nothing for a prefix"
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match=PATTERN) as warned:
        got = steps(masked(square), *masks)
    assert [str(w.message) for w in warned if PATTERN in str(w.message)] == [
        "recipe 'w8a8-d25' runs attention dense and in 16 bit with a mask that hides tokens before some that it keeps."
    ]
    assert qs.reports()[-1].calls == {"dense": 3, "refresh": 6, "sparse": 3}
    assert torch.equal(got[1], want[1])
    for refresh in (0, 3):
        assert relative_error(got[refresh], want[refresh]) < CODES
    assert 1e-7 < relative_error(got[2], want[2]) < 0.25
    assert looks == [200, prefix_masks.NO_PREFIX, 200, 7]


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["reference", "compiled"])
def test_a_dense_phase_that_takes_lengths_has_a_form_that_takes_masks(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, compiled: bool, square: bool
) -> None:
    """As on CUDA, where a long dense attention runs on our kernel; compiled, neither form gets the other's code."""
    if not compiled:
        request.getfixturevalue("eager_graphs")
    masks = [prefix(300, 200), holes(), prefix(TOKENS, TOKENS)]
    plain = masked(square, recipe="w8a8")
    want = [plain(X, mask) for mask in masks]
    monkeypatch.setattr(quantize_attention, "LEAST_TOKENS", 1)
    monkeypatch.setattr(quantize_attention, "LIBRARY_DEVICES", ())
    monkeypatch.setattr(quantize_attention, "HEADS", {"int8": range(1, 129), "16bit": range(1, 129)})
    for attention in ("int8", "16bit") if square else ("int8",):
        torch._dynamo.reset()
        monkeypatch.setattr(runtime_graph, "PREFIX_MASKS", prefix_masks.PrefixMasks())  # which warns once
        model = masked(square, recipe={"format": "w8a8", "attention": attention})
        with pytest.warns(UserWarning, match=PATTERN):
            got = [model(X, mask) for mask in masks]
        assert qs.reports()[-1].calls["dense"] == 9
        assert relative_error(got[1], want[1]) < (RELATIVE_ERROR[torch.float32] if compiled else 1e-7)
        least, most = (1e-6, 0.04) if attention == "int8" else (-1, CODES)
        assert all(least < relative_error(got[i], want[i]) < most for i in (0, 2)), "quantised, under the right mask"


@pytest.mark.usefixtures("eager_graphs")
def test_a_mask_that_is_written_into_is_looked_at_again(looks: list[int]) -> None:
    model, mask = masked(), prefix(300, 200)
    with qs.denoising(model, 4) as run, pytest.warns(UserWarning, match=PATTERN):
        for step, write in enumerate((None, None, lambda: mask[1].fill_(True), lambda: mask[0, 0].fill_(False))):
            if write is not None:
                write()
            run.step(step)
            model(X, mask)
    assert looks == [200, 300, prefix_masks.NO_PREFIX]


@pytest.mark.usefixtures("eager_graphs")
def test_inference_tensors_count_no_edits_and_are_looked_at_by_every_block(looks: list[int]) -> None:
    with torch.inference_mode():
        steps(masked(), prefix(300, 200), prefix(300, 100))
    assert looks == [200] * 3 + [100] * 3


@pytest.mark.usefixtures("eager_graphs")
def test_tiles_run_dense_under_a_mask_that_hides_video() -> None:
    options = {"recipe": {**ALWAYS, "token_order": "tiles"}, "grid": (5, 8, 8)}
    masks = [prefix(TOKENS, TOKENS), prefix(TOKENS, TOKENS), prefix(TOKENS, 300)]
    want = steps(masked(recipe="w8a8"), *masks)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="a mask that hides video tokens"):
        got = steps(masked(**options), *masks)
    assert qs.reports()[-1].calls == {"dense": 3, "refresh": 3, "sparse": 3}
    assert torch.equal(got[2], want[2])


@pytest.mark.usefixtures("eager_graphs")
def test_strict_refuses_such_a_mask() -> None:
    with pytest.raises(UnsupportedError, match=PATTERN):
        steps(masked(strict=True), prefix(300, 200), holes())


@pytest.mark.usefixtures("eager_graphs")
def test_what_a_mask_hides_does_not_matter() -> None:
    """Whole blocks of hidden tokens, so that no block of queries that count holds one."""
    mask = prefix(256, 192)
    got, want = (steps(masked(), *[mask] * 3, x=torch.where(mask[..., None], X, fill)) for fill in (1e6, 0.0))
    for a, b in zip(got, want, strict=True):
        assert_close(a[mask], b[mask])


@pytest.mark.usefixtures("eager_graphs")
def test_a_whole_model_that_is_given_its_mask_runs_sparse(looks: list[int]) -> None:
    torch.manual_seed(0)
    model = qs.attach(Masked().eval(), recipe=ALWAYS)
    steps(model, *(prefix(300, 200) for _ in range(3)))
    report = qs.reports()[-1]
    assert report.attentions == (3, 3) and report.calls == {"dense": 0, "refresh": 1, "sparse": 2}
    assert looks == [200] * 3


def test_looking() -> None:
    for mask, kept in (
        (prefix(300, 200), 200),
        (prefix(TOKENS, 0), 0),
        (prefix(7)[:, None, None], 7),
        (prefix(7)[0], 7),
        (torch.ones(2, 1, dtype=torch.bool), 1),
        (holes(), prefix_masks.NO_PREFIX),
        (~prefix(9, 9), prefix_masks.NO_PREFIX),
    ):
        assert prefix_masks.shortest_prefix(mask) == kept
