"""The whole backend on the device: phases, modes, moves and threads, against the same model run there in other ways."""

import threading

import pytest
import torch

import qs_compiler as qs
from qs_compiler import _compat
from qs_compiler.runtime.cache_layout import cache_bytes
from tests.backend.models import CACHES, RECIPE, TOKENS, clip, make
from tests.gpu.one_tile import assert_same_bits, one_tile_a_reduction

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 6  # refreshes at 0 and 4


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def on_device(inputs, device="cuda"):
    return {name: x.to(device) for name, x in inputs.items()}


def denoise(model, video, device="cuda"):
    """The outputs of one run, copied: a CUDA graph writes each over the last."""
    with qs.denoising(model, STEPS) as run:
        out = []
        for i, inputs in enumerate(clip(video, STEPS)):
            run.step(i)
            out.append(model(**on_device(inputs, device)).clone())
    return torch.stack(out)


def compiled(device="cuda", **options):
    return torch.compile(make().to(device), backend="quantsparse", options={"recipe": RECIPE, **options})


@pytest.fixture
def one_tile():
    with one_tile_a_reduction():
        yield


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


def test_phases_follow_the_schedule_and_stay_near_eager():
    model = make().cuda()
    eager = torch.stack([model(**on_device(inputs)) for inputs in clip(7, STEPS)])
    out = denoise(compiled(), 7)
    assert qs.reports()[-1].calls == {"dense": 0, "refresh": 2, "sparse": 4}
    refreshes, sparse = [0, 4], [1, 2, 3, 5]
    assert relative_error(out[refreshes], eager[refreshes]) < 0.05  # W8A8 of a model of 32 channels
    torch._dynamo.reset()
    with _compat.eager_graphs():  # the references, on the CPU; a mask may differ by a block of equal scores
        wanted = denoise(compiled("cpu"), 7, "cpu")
    assert relative_error(out[sparse].cpu(), wanted[sparse]) < 0.1


def test_cuda_graphs_compute_the_same():
    want = [denoise(compiled(), video) for video in (7, 8)]
    torch._dynamo.reset()
    model = compiled(mode="reduce-overhead")
    for round_ in range(3):  # recorded, warmed up, replayed
        for video, expected in zip((7, 8), want, strict=True):
            torch.testing.assert_close(denoise(model, video), expected, msg=lambda m, r=round_: f"round {r}: {m}")
    assert qs.reports()[-1].calls["sparse"] == 24


def test_cuda_graphs_replay_in_every_phase(monkeypatch):
    """Once recorded, no step of a video captures anew, none is skipped, and every call is a replay."""
    counts = {"capture_begin": 0, "replay": 0}
    for name in counts:
        original = getattr(torch.cuda.CUDAGraph, name)

        def counted(self, *args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.cuda.CUDAGraph, name, counted)
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    model = compiled(mode="reduce-overhead")
    for video in (7, 8, 7):
        denoise(model, video)
        print("after a video", counts)
    before = dict(counts)
    denoise(model, 8)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skips
    assert counts["capture_begin"] == before["capture_begin"]
    assert counts["replay"] - before["replay"] >= STEPS


@pytest.mark.parametrize("correction", ["second_order", "complement"])
def test_cuda_graphs_with_each_correction(correction):
    recipe = {**RECIPE, "correction": correction}
    want = denoise(compiled(recipe=recipe), 7)
    torch._dynamo.reset()
    model = compiled(recipe=recipe, mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(denoise(model, 7), want)


@pytest.mark.usefixtures("one_tile")
@pytest.mark.parametrize("fields", CACHES, ids=lambda f: f"{f['correction']}-{f['cache_format']}")
def test_host_memory_changes_no_bit(fields):
    recipe = qs.Recipe.parse({**RECIPE, **fields})
    model = compiled(recipe=recipe)
    want = denoise(model, 7)
    assert qs.reports()[-1].cache_place == "device"
    # Else a kernel or a library call sums in another order from run to run, and the place of caches is not to blame.
    assert_same_bits(denoise(model, 7), want, "caches on the device, run again")
    torch._dynamo.reset()
    staging = 2 * cache_bytes(recipe, (1, 2, TOKENS, 16))
    model = compiled(recipe=recipe, memory_budget=staging)
    for video in ("the first video", "the second, with buffers of the first"):
        assert_same_bits(denoise(model, 7), want, video)
    report = qs.reports()[-1]
    assert report.cache_place == "host" and report.calls["sparse"] == 8 and report.fallbacks == []


@pytest.mark.usefixtures("one_tile")
def test_blocks_compiled_alone_fill_the_device_before_the_host():
    def in_blocks(**options):
        model = make(blocks=6).cuda()
        for block in model.blocks:
            block.compile(backend="quantsparse", options={"recipe": RECIPE, **options})
        return model

    want = denoise(in_blocks(), 7)
    torch._dynamo.reset()
    layer = cache_bytes(qs.Recipe.parse(RECIPE), (1, 2, TOKENS, 16))
    model = in_blocks(memory_budget=4 * layer + layer // 2)  # two layers, and staging buffers for two
    out = []
    with qs.denoising(model, STEPS) as run:
        for i, inputs in enumerate(clip(7, STEPS)):
            run.step(i)
            out.append(model(**on_device(inputs)))
        hosts = [bool(entry.hosts) for entry in run.caches()]
    assert hosts == [False, False, True, True, True, True]
    assert_same_bits(torch.stack(out), want, "six blocks")


def test_caches_in_host_memory_exclude_cuda_graphs():
    model = compiled(mode="reduce-overhead", memory_budget=60_000)
    with pytest.raises(qs.QuantSparseError, match="exclude CUDA graphs"):
        denoise(model, 7)


def test_a_model_moved_after_it_was_compiled():
    want = denoise(compiled(), 7)
    torch._dynamo.reset()
    model = compiled("cpu")
    with pytest.warns(UserWarning, match="runs dense while nothing says which denoising step"):
        model(**clip(9, 1)[0])
    torch.testing.assert_close(denoise(model.to("cuda"), 7), want)


def test_inputs_on_another_device():
    with pytest.raises(Exception, match="device"):
        compiled()(**clip(7, 1)[0])


def test_a_kernel_may_start_in_any_thread():
    model = compiled()
    want, got = denoise(model, 7), {}

    def run():
        with torch.no_grad():
            got["out"] = denoise(model, 7)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(120)
    torch.testing.assert_close(got["out"], want)
