import pytest
import torch

from qs_compiler.ops.formats import FORMATS
from qs_compiler.ops.library import OpInputError
from tests.tolerances import assert_close

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
quantize_rows = torch.ops.quantsparse.quantize_rows


@pytest.mark.parametrize("rows", (1, 63, 65, 127, 129, 257))
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_nearest_to_the_scaled_rows(rows, name):
    x = torch.randn(rows, 48)
    codes, scales = quantize_rows(x, None, None, name)
    form = FORMATS[name]
    assert codes.dtype == form.dtype and scales.shape == (rows,)
    torch.testing.assert_close(scales, x.abs().amax(-1) / form.qmax)
    scaled = x.double() / scales.double()[:, None]
    assert codes.float().abs().amax(-1).eq(form.qmax).all()
    if name == "fp8":  # 4 significant bits above the smallest normal 2^-6, steps of 2^-9 below it
        assert ((codes.double() - scaled).abs() <= scaled.abs().clamp(min=2**-6) * 2**-4 * 1.0001).all()
    else:
        assert ((codes.double() - scaled).abs() <= 0.5001).all()


def test_ties_go_to_even():
    codes, _ = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]), None, None, "int8")
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_smooth_then_rotation(dtype):
    x = torch.randn(3, 5, 64).to(dtype)
    smooth = torch.rand(64) + 0.5
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    codes, scales = quantize_rows(x, smooth, rotation, "int8")
    wanted = (x.double() * smooth) @ torch.block_diag(*[rotation.double()] * 4)
    assert codes.shape == x.shape and scales.shape == (3, 5)
    assert ((codes * scales[..., None] - wanted).abs() <= scales[..., None] * 0.501).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", FORMATS)
def test_zero_and_extreme_rows_stay_finite(name, dtype):
    limits = torch.finfo(dtype)
    x = torch.zeros(4, 8, dtype=dtype)
    x[1] = limits.max
    x[2, 3] = limits.tiny
    x[3, 0], x[3, 1] = limits.max, -limits.max
    codes, scales = quantize_rows(x, None, None, name)
    assert torch.isfinite(scales).all() and torch.isfinite(codes.float()).all()
    assert (codes[0].float() == 0).all()
    assert_close(codes[1].double() * scales[1], x[1].double(), 1e-6)
    assert_close(codes[3].double() * scales[3], x[3].double(), 1e-6)


def test_rows_of_any_layout_and_none_at_all():
    x = torch.randn(8, 6, 10).transpose(0, 2)
    for got, wanted in zip(
        quantize_rows(x, None, None, "int8"), quantize_rows(x.contiguous(), None, None, "int8"), strict=True
    ):
        assert torch.equal(got, wanted) and got.is_contiguous()
    codes, scales = quantize_rows(torch.empty(0, 8), None, None, "int8")
    assert codes.shape == (0, 8) and scales.shape == (0,)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ("int8", "fp8"))
def test_opcheck(name, dtype):
    x = torch.randn(7, 64).to(dtype)
    torch.library.opcheck(quantize_rows, (x, None, None, name))
    torch.library.opcheck(quantize_rows, (x[None], torch.rand(64), torch.eye(32), name))


def test_bad_input_is_named():
    x = torch.randn(4, 64)
    with pytest.raises(OpInputError, match=r"format 'int9' is not known.*int8, fp8, int6, int4"):
        quantize_rows(x, None, None, "int9")
    with pytest.raises(OpInputError, match=r"smooth has shape \(63,\).*shape \(64\)"):
        quantize_rows(x, torch.ones(63), None, "int8")
    with pytest.raises(OpInputError, match=r"x has 64 channels.*multiple of 48"):
        quantize_rows(x, None, torch.eye(48), "int8")
    with pytest.raises(OpInputError, match=r"rotation has shape \(16, 8\)"):
        quantize_rows(x, None, torch.ones(16, 8), "int8")
    with pytest.raises(OpInputError, match="x is int32"):
        quantize_rows(x.int(), None, None, "int8")
