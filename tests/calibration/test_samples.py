"""Which forwards a model is calibrated on."""

import pytest
import torch
from torch import nn

from qs_compiler.calibration.samples import Sample, caught_samples, given_samples
from qs_compiler.errors import OptionError


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, step):
        return x


def denoise(model, steps, offset=0):
    for step in range(steps):
        model(torch.full((2,), float(step)), step=offset + step)


def test_the_kept_forwards_cover_a_run_evenly_and_depend_on_the_seed_alone():
    model = Seen()
    for count in (1, 4, 10):
        kept = caught_samples({"m": model}, [lambda: denoise(model, 40)], count, seed=3)["m"]
        steps = sorted(s.kwargs["step"] for s in kept)
        assert [int(step * count / 40) for step in steps] == list(range(count))
    again, other = (caught_samples({"m": model}, [lambda: denoise(model, 40)], 10, seed=s)["m"] for s in (3, 4))
    assert [s.kwargs["step"] for s in again] == [s.kwargs["step"] for s in kept]
    assert [s.kwargs["step"] for s in other] != [s.kwargs["step"] for s in kept]


def test_several_runs_share_the_noise_levels_among_them():
    model, done = Seen(), []
    runs = [lambda n=n: (done.append(n), denoise(model, 20, 100 * n)) for n in range(8)]
    kept = caught_samples({"m": model}, runs, 4, seed=0)["m"]
    assert done == [0, 1, 2, 3], "no run without a sample is done"
    assert sorted(s.kwargs["step"] // 100 for s in kept) == [0, 1, 2, 3]
    assert sorted(s.kwargs["step"] % 100 // 5 for s in kept) == [0, 1, 2, 3]


def test_each_expert_is_covered_by_its_own_forwards():
    first, second = Seen(), Seen()

    def run():
        denoise(first, 4)
        denoise(second, 12, 4)

    kept = caught_samples({"a": first, "b": second}, [run], 4, seed=0)
    assert sorted(s.kwargs["step"] for s in kept["a"]) == [0, 1, 2, 3]
    assert [(s - 4) // 3 for s in sorted(s.kwargs["step"] for s in kept["b"])] == [0, 1, 2, 3]


def test_inputs_are_copied_before_the_loop_edits_them_and_the_hooks_are_gone():
    model, x = Seen(), torch.zeros(2)

    def run():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            model(x, step=0)
        x.add_(1)

    (sample,) = caught_samples({"m": model}, [run], 1, seed=0)["m"]
    assert not sample.args[0].any() and not sample.args[0].is_inference()
    assert sample.autocast is torch.bfloat16
    assert not model._forward_pre_hooks


def test_the_digest_is_of_values_and_shapes():
    x = torch.arange(6.0)
    samples = [Sample((x,), {}), Sample((x.clone(),), {}), Sample((x.view(2, 3),), {}), Sample((x + 1,), {})]
    digests = [s.digest() for s in samples]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    assert Sample((torch.ones(()).expand(1),), {}).digest()


def test_given_forwards_are_pairs_or_keyword_arguments():
    x, device = torch.ones(2), torch.device("cpu")
    pair, named = given_samples([((x,), {"step": 1}), {"x": x, "step": 2}], device)
    assert pair.kwargs == {"step": 1} and named.args == () and named.kwargs["step"] == 2
    for wrong in ([x], [(x, x)], []):
        with pytest.raises(OptionError):
            given_samples(wrong, device)


def test_a_module_that_is_never_called_is_an_error():
    model = Seen()
    with pytest.raises(OptionError, match="never call 'm'"):
        caught_samples({"m": model}, [lambda: None], 2, seed=0)
