"""What the caches take: predicted from recipe and shape, and what is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch._dynamo.utils import counters

import qs_compiler as qs
from qs_compiler import _compat
from qs_compiler.errors import DeviceError, UnsupportedError
from qs_compiler.lowering import fallbacks
from qs_compiler.options import CACHE_FORMATS, CORRECTIONS
from qs_compiler.runtime import graph, placement
from qs_compiler.runtime.cache_layout import cache_bytes, cache_slots
from tests.backend.models import CACHES, RECIPE, TOKENS, clip, make

GIB = 2**30
HUNYUAN_720P_129 = (1, 24, 119_056, 128)  # q of each of the 60 attentions


def allocated(recipe: dict) -> list[dict[str, torch.Tensor]]:
    """The cache tensors of each layer after the first refresh of a video."""
    model = torch.compile(make(), backend="quantsparse", options={"recipe": recipe})
    with qs.denoising(model, 4) as run:
        run.step(0)
        model(**clip(7, 4)[0])
        return [entry.tensors for entry in run.caches()]


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("mask", ["pooled", "mass"])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
def test_what_is_predicted_is_allocated(cache_format: str, correction: str, mask: str) -> None:
    fields = {**RECIPE, "format": "off", "cache_format": cache_format, "correction": correction, "mask": mask}
    recipe, shape = qs.Recipe.parse(fields), (1, 2, TOKENS, 16)
    layers = allocated(fields)
    assert len(layers) == 2
    slots = cache_slots(recipe, shape)
    for tensors in layers:
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
            name: (slot.shape, slot.dtype) for name, slot in slots.items()
        }
    assert sum(t.nbytes for tensors in layers for t in tensors.values()) == cache_bytes(recipe, shape, len(layers))


@pytest.mark.parametrize(
    ("fields", "gib"),
    [
        ({"cache_format": "bf16"}, 41.85),
        ({"cache_format": "int4"}, 11.5),
        ({"cache_format": "int4", "density": 0.25}, 11.7),
        ({"cache_format": "int4", "correction": "complement"}, 11.8),
        ({"cache_format": "int4", "correction": "first_order"}, 11.2),
        ({"cache_format": "rank32"}, 11.2),
        ({"cache_format": "rank16"}, 6.1),
        ({"cache_format": "int4", "mask": "mass"}, 14.5),
    ],
)
def test_a_video_of_129_frames_at_720p(fields: dict, gib: float) -> None:
    recipe = qs.Recipe.parse({"density": 0.15, **fields})
    assert cache_bytes(recipe, HUNYUAN_720P_129, layers=60) / GIB == pytest.approx(gib, abs=0.05)


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send the caches of a model on the CPU through host memory and back, as a GPU's are when they do not fit."""
    monkeypatch.setattr(graph, "belongs_on_host", lambda *_: True)


def denoise(recipe: dict, video: int = 7, steps: int = 10) -> list[torch.Tensor]:
    model = torch.compile(make(), backend="quantsparse", options={"recipe": recipe})
    with qs.denoising(model, steps) as run:
        out = []
        for i, inputs in enumerate(clip(video, steps)):
            run.step(i)
            out.append(model(**inputs))
    torch._dynamo.reset()
    return out


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("fields", CACHES, ids=lambda f: f"{f['correction']}-{f['cache_format']}")
def test_host_memory_changes_no_bit(fields: dict, request: pytest.FixtureRequest) -> None:
    recipe = {**RECIPE, **fields}
    want = denoise(recipe)
    assert qs.reports()[-1].cache_place == "device"
    request.getfixturevalue("on_host")
    got = denoise(recipe)
    report = qs.reports()[-1]
    assert report.cache_place == "host" and report.calls == {"dense": 0, "refresh": 3, "sparse": 7}
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_host_memory_compiled_and_all_phases_kept_in_torchs_caches(request: pytest.FixtureRequest) -> None:
    recipe = {**RECIPE, "format": "off", "correction": "second_order", "cache_format": "int8"}
    want = denoise(recipe)
    counters.clear()
    again = denoise(recipe)
    assert counters["inductor"]["fxgraph_cache_hit"] == counters["aot_autograd"]["autograd_cache_hit"] == 3
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
    request.getfixturevalue("on_host")
    got = denoise(recipe)
    report = qs.reports()[-1]
    assert report.calls["sparse"] == 7 and report.cache_place == "host"
    outlined = [p.matched for p in report.passes if p.name == "outline_repeated_blocks"]
    assert outlined == [2, 2, 2], "the handles are operands of the shared body"
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("place", ["device", "host"])
def test_where_caches_will_lie_is_foreseen_when_the_phases_are_compiled(
    place: str, request: pytest.FixtureRequest
) -> None:
    if place == "host":
        request.getfixturevalue("on_host")
    denoise({**RECIPE, "warmup": 0.3})
    report = qs.reports()[-1]
    assert report.calls == {"dense": 3, "refresh": 2, "sparse": 5} and report.cache_place == place
    compiled = [p.phase for p in report.passes if p.name == "quantize_linear"]
    assert compiled == ["dense", "refresh", "sparse"], "each once: what was foreseen is what the refresh found"


@pytest.mark.usefixtures("eager_graphs")
def test_blocks_compiled_apart_foresee_what_the_blocks_before_them_will_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's budget for two and a half of six layers."""
    layer = cache_bytes(qs.Recipe.parse(RECIPE), (1, 2, TOKENS, 16))

    def chosen(demand, device, budget, used, foreseen, cuda_graphs):
        return used + sum(p.demand.total for p in foreseen if not p.on_host) + demand.total > 2.5 * layer

    monkeypatch.setattr(graph, "belongs_on_host", chosen)
    model = make(blocks=6)
    for block in model.blocks:
        block.compile(backend="quantsparse", options={"recipe": {**RECIPE, "warmup": 0.3}})
    before = len(qs.reports())
    with qs.denoising(model, 10) as run:
        for i, inputs in enumerate(clip(7, 10)):
            run.step(i)
            model(**inputs)
            compiled = [p.phase for r in qs.reports()[before:] for p in r.passes if p.name == "quantize_linear"]
            assert compiled == ["dense", "refresh", "sparse", "refresh", "sparse"], f"step {i}: both places, in step 0"
        hosts = [bool(entry.hosts) for entry in run.caches()]
    assert hosts == [False, False, True, True, True, True]


@pytest.mark.usefixtures("eager_graphs")
def test_caches_that_fit_nowhere_are_refused_at_the_first_step() -> None:
    model = torch.compile(make(), backend="quantsparse", options={"recipe": RECIPE, "warmup": 0.5, "memory_budget": 9})
    with qs.denoising(model, 8) as run:
        run.step(0)  # a dense one
        with pytest.raises(DeviceError, match=r"need \d+ bytes .*2 attentions, w8a8-d40, cache_format bf16.*leaves 9 "):
            model(**clip(7, 8)[0])
    assert qs.reports()[-1].calls == {"dense": 0, "refresh": 0, "sparse": 0}


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_cuda_graphs_find_the_caches_where_they_were_recorded(mode: str | None) -> None:
    options = {"recipe": RECIPE} if mode is None else {"recipe": RECIPE, "mode": mode}
    model, tensors = torch.compile(make(), backend="quantsparse", options=options), []
    for video in (7, 8):
        with qs.denoising(model, 4) as run:
            for branch, inputs in zip(("cond", "uncond"), clip(video, 2), strict=True):
                run.step(0, branch)
                model(**inputs)
            tensors.append([t for b in ("cond", "uncond") for e in run.caches(b) for t in e.tensors.values()])
    assert [a is b for a, b in zip(*tensors, strict=True)] == 16 * [mode is not None]


@pytest.mark.parametrize(("fields", "recorded"), [({}, True), ({"correction": "second_order"}, False)])
def test_what_waits_for_the_device_is_not_recorded(fields: dict, recorded: bool, monkeypatch) -> None:
    seen = []

    def record(module, inputs, patches, own_context):
        seen.append(patches["triton.cudagraphs"])
        return module.forward

    monkeypatch.setattr(_compat, "compile_graph", record)
    options = {"recipe": {**RECIPE, **fields}, "mode": "reduce-overhead"}
    with qs.denoising(model := torch.compile(make(), backend="quantsparse", options=options), 4) as run:
        run.step(0)
        model(**clip(7, 1)[0])
    assert seen == [True, recorded, True]  # dense, refresh, sparse
    assert len(qs.reports()[-1].notes) == int(not recorded)


def test_a_reference_that_asks_the_device_is_not_recorded(monkeypatch) -> None:
    seen = []

    def without_a_kernel(module, inputs, patches, own_context):
        seen.append(patches["triton.cudagraphs"])
        if _compat.calls(module, torch.ops.quantsparse.sparse_attention.default):
            fallbacks.record("sparse_attention", "no tile fits")
        return module.forward

    monkeypatch.setattr(_compat, "compile_graph", without_a_kernel)
    options = {"recipe": RECIPE, "mode": "reduce-overhead"}
    with qs.denoising(model := torch.compile(make(), backend="quantsparse", options=options), 4) as run:
        run.step(0)
        model(**clip(7, 1)[0])
    report = qs.reports()[-1]
    assert seen == [True, True, True, False]  # dense, refresh, sparse, sparse again
    assert report.notes == ["sparse: no CUDA graph, since sparse_attention waits for the device"]
    assert report.fallbacks == [("sparse_attention", "no tile fits")]


class TestPlacement:
    """60 layers of 0.2 GiB, to keep on a GPU."""

    demand = placement.Demand((GIB // 5,) * 60, 15 * GIB, GIB // 2, "w4a8-d15, cache_format int4")

    def choose(
        self, budget: float | None, used: float = 0, foreseen: Sequence[placement.Place] = (), cuda_graphs: bool = False
    ) -> bool:
        device = torch.device("cuda", 0)
        given = None if budget is None else int(budget * GIB)
        return placement.belongs_on_host(self.demand, device, given, int(used * GIB), foreseen, cuda_graphs)

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(placement, "available_host_bytes", lambda: 64 * GIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 80 * GIB))
        self.free = 40 * GIB

    def test_on_the_device_while_it_fits(self) -> None:
        assert not self.choose(12.5)
        assert self.choose(12.5, used=1), "the other branch took its share"
        assert self.choose(0.5), "two staging buffers fit"

    def test_what_other_blocks_will_take_is_taken(self) -> None:
        def will(on_host: bool) -> placement.Place:
            return placement.Place(on_host, False, placement.Demand((GIB,), 45 * GIB, 0, "w4a8-d15"))

        assert not self.choose(13.5, foreseen=[will(False)])
        assert self.choose(13.5, foreseen=[will(False), will(False)])
        assert not self.choose(13.5, foreseen=[will(True)])
        self.choose(3, foreseen=[will(True)])
        with pytest.raises(DeviceError, match=r"need 15 GiB of pinned memory, of 0 bytes available"):
            self.choose(3, foreseen=[will(True), will(True)])
        self.free = 17 * GIB  # less 4 for what a refresh allocates, and two staging buffers
        assert not self.choose(None)
        with pytest.raises(DeviceError, match=r"cuda:0 has 12 GiB to spare"):
            self.choose(None, foreseen=[will(False)])

    def test_what_is_free_is_the_default(self) -> None:
        assert not self.choose(None)
        self.free = 16 * GIB  # 4 of them are for what a refresh allocates
        with pytest.raises(DeviceError, match=r"cuda:0 has 12 GiB to spare.*memory_budget=<bytes> keeps them"):
            self.choose(None)

    def test_neither_device_nor_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(DeviceError, match=r"need 12 GiB for a branch \(60 .*leaves 0.3 GiB.* 0.4 GiB on the"):
            self.choose(0.3)
        monkeypatch.setattr(placement, "available_host_bytes", lambda: 12 * GIB)
        monkeypatch.setattr(placement, "reusable_bytes", lambda: 2 * GIB)
        with pytest.raises(DeviceError, match=r"15 GiB of pinned memory, of 14 GiB available.*raise memory_budget"):
            self.choose(3)
        self.free = 8 * GIB
        with pytest.raises(DeviceError, match=r"cuda:0 has 4 GiB to spare.*smaller cache_format"):
            self.choose(None)
        monkeypatch.setattr(placement, "reusable_bytes", lambda: 3 * GIB)
        assert self.choose(3), "the last video left its memory"

    def test_cuda_graphs_need_them_on_the_device(self) -> None:
        assert not self.choose(12.5, cuda_graphs=True)
        with pytest.raises(UnsupportedError, match=r"exclude CUDA graphs.*raise memory_budget, or leave out the mode"):
            self.choose(3, cuda_graphs=True)
