"""The whole backend on the device: phases, modes, moves and threads, against the same model run there in other ways."""

import threading

import pytest
import torch

import qs_compiler as qs
from qs_compiler import _compat
from tests.backend.models import RECIPE, clip, make

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


def test_a_model_moved_after_it_was_compiled():
    want = denoise(compiled(), 7)
    torch._dynamo.reset()
    model = compiled("cpu")
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
