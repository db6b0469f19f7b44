import math

import pytest
import torch

from qs_compiler import Recipe, attach
from qs_compiler.demo import metrics
from qs_compiler.demo.model import load_model
from qs_compiler.packed_linear import PackedLinear


def test_a_clip_against_itself():
    clip = torch.rand(3, 2, 16, 16)
    found = metrics.compare(clip, clip)
    assert found.psnr == metrics.HIGHEST_PSNR
    assert found.ssim == pytest.approx(1)
    assert found.relative_l2 == 0


def test_a_constant_offset_has_the_psnr_and_distance_of_its_size():
    twin = torch.full((3, 2, 16, 16), 0.5)
    found = metrics.compare(twin + 0.1, twin)
    assert found.psnr == pytest.approx(20, abs=1e-4)
    assert found.relative_l2 == pytest.approx(0.2, abs=1e-6)


def test_likeness_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    twin = torch.rand(3, 4, 16, 16, generator=generator)
    noise = torch.randn(twin.shape, generator=generator)
    near, far = (metrics.compare(twin + size * noise, twin) for size in (0.02, 0.1))
    assert near.psnr > far.psnr + 10
    assert near.ssim > far.ssim + 0.02
    assert far.relative_l2 == pytest.approx(5 * near.relative_l2, rel=1e-4)


# t(0.975) of tables; the expansion is within 1 % from three degrees of freedom on.
@pytest.mark.parametrize(("count", "quantile"), [(4, 3.182), (6, 2.571), (16, 2.131), (64, 1.998)])
def test_interval_is_students(count, quantile):
    values = [float(i) for i in range(count)]
    mean, half = metrics.mean_interval(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    assert mean == (count - 1) / 2
    assert half == pytest.approx(quantile * deviation / math.sqrt(count), rel=0.01)


def test_two_values_have_no_interval():
    assert metrics.mean_interval([1.0, 2.0]) == (1.5, None)


def test_weight_bytes_before_count_every_parameter_once(tiny_folder):
    model, _ = load_model(folder=tiny_folder)
    sizes = metrics.weight_bytes(model)
    fp32 = [p for n, p in model.named_parameters() if set(n.split(".")) & set(model._keep_in_fp32_modules)]
    assert sum(sizes.values()) == sum(2 * p.numel() for p in model.parameters()) + sum(2 * p.numel() for p in fp32)
    block = model.blocks[0]
    assert block.scale_shift_table.numel() * 2 * 4 < sizes[metrics.EMBEDDERS]
    assert sizes[metrics.OTHER] == 0
    half, _ = load_model(dtype=torch.bfloat16, folder=tiny_folder)
    assert metrics.weight_bytes(half) == sizes, "what it computes in must not matter"
    assert sum(p.nbytes for p in half.parameters()) == sum(sizes.values())


def test_weight_bytes_after_are_those_of_the_packed_tensors(tiny_folder):
    model, _ = load_model(folder=tiny_folder)
    before = metrics.weight_bytes(model)
    attach(model, recipe=Recipe.parse("w4a8"))
    after = metrics.weight_bytes(model)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert after[metrics.LINEARS] == sum(t.nbytes for m in packed for t in m.packed.tensors().values())
    assert 3 < before[metrics.LINEARS] / after[metrics.LINEARS] < 4
    assert {k: v for k, v in after.items() if k != metrics.LINEARS} == {
        k: v for k, v in before.items() if k != metrics.LINEARS
    }
