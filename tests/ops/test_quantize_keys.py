"""quantsparse::quantize_keys: what is subtracted, whose scale a code has, and that attention does not see the shift."""

import pytest
import torch

from qs_compiler.ops.attention_inputs import token_scale
from qs_compiler.ops.formats import FORMATS
from qs_compiler.ops.library import OpInputError
from tests.tolerances import assert_close, codes_apart

quantize_keys = torch.ops.quantsparse.quantize_keys
BLOCK = 32
# Of the keys: int8 errs by half a step, 1/254 of a block's largest; float8 by 2^-4 of each key at most.
RELATIVE_ERROR = {"int8": 1e-2, "fp8": 2**-4}
formats = pytest.mark.parametrize("format", RELATIVE_ERROR)


def keys(batch=1, heads=2, tokens=80, depth=16):
    """With a bias and an outlier channel, as real ones have."""
    k = torch.randn(batch, heads, tokens, depth) + 5 * torch.randn(1, heads, 1, depth)
    k[..., 3] *= 8
    return k


def evened(k):
    """Less their mean, each channel divided by the square root of its standard deviation; and that root."""
    k = k.double()
    smooth = k.var(2, correction=0).sqrt().sqrt()
    return ((k - k.mean(2, keepdim=True)) / smooth[:, :, None]).float(), smooth.float()


def largest_error(format, values, step):
    """Of codes of these values: half the distance of two codes. float8: 4 bits, or multiples of 2^-9 below 2^-6."""
    return (values.abs() / 16).maximum(step * 2**-10) if format == "fp8" else 0.5 * step


@formats
@pytest.mark.parametrize("tokens", (31, 32, 33, 80))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_codes_are_the_keys_less_their_mean(tokens, dtype, format):
    k = keys(batch=2, tokens=tokens).to(dtype)
    codes, scale, smooth = quantize_keys(k, None, BLOCK, format)
    assert codes.dtype == FORMATS[format].dtype and codes.shape == k.shape
    assert scale.shape == (2, 2, -(-tokens // BLOCK))
    wanted, wanted_smooth = evened(k)
    assert_close(smooth, wanted_smooth, 1e-4)
    wanted = wanted * (wanted_smooth / smooth)[:, :, None]  # sums of squares in float32 need not be exact
    step = token_scale(scale, tokens, BLOCK)[..., None]
    assert ((codes.float() * step - wanted).abs() <= 1.002 * largest_error(format, wanted, step)).all()
    for block, largest in zip(wanted.split(BLOCK, 2), scale.unbind(2), strict=True):
        assert_close(largest, block.abs().amax((-2, -1)) / FORMATS[format].qmax)


def test_channels_that_vary_more_take_fewer_codes_from_the_others():
    """Scores are nearer to the exact ones than those of codes of the keys as they are."""
    k, q = torch.randn(1, 1, 512, 64), torch.randn(1, 1, 64, 64)
    k[..., ::32] *= 16
    exact = q @ (k - k.mean(2, keepdim=True)).mT
    blocks = (k - k.mean(2, keepdim=True)).unflatten(2, (-1, BLOCK))
    step = blocks.abs().amax((-2, -1), keepdim=True) / 127
    plain = (torch.round(blocks / step) * step).flatten(2, 3)
    error, plain_error = ((q @ decoded.mT - exact).norm() for decoded in (restored(k, "int8"), plain))
    assert error < 0.5 * plain_error


def restored(k, format):
    """What the codes say of the keys less their mean."""
    codes, scale, smooth = quantize_keys(k, None, BLOCK, format)
    return codes.float() * token_scale(scale, k.shape[2], BLOCK)[..., None] * smooth[:, :, None]


@formats
def test_what_all_keys_share_costs_nothing(format):
    k = keys()
    centred = k - k.mean(2, keepdim=True)
    shifted = k + 1000 * torch.randn(1, 2, 1, 16)
    for given in (k, shifted):  # float32 keys of size 1000 hold 4 digits of what is left
        assert_close(restored(given, format), centred, RELATIVE_ERROR[format])


@formats
def test_padding_takes_no_part(format):
    k, kv_len = keys(batch=3), torch.tensor([80, 50, 0])
    poisoned = k.clone()
    poisoned[1, :, 50:] = float("nan")
    poisoned[2] = float("inf")
    codes, scale, smooth = quantize_keys(poisoned, kv_len, BLOCK, format)
    alone, alone_scale, alone_smooth = quantize_keys(k[1:2, :, :50], None, BLOCK, format)
    assert codes_apart(codes[1:2, :, :50], alone) <= 1  # sums in another order
    for got, wanted in ((scale[1:2, :, :2], alone_scale), (smooth[1:2], alone_smooth)):
        assert_close(got, wanted, 1e-6)
    assert (codes[1, :, 50:].float() == 0).all() and (codes[2].float() == 0).all()
    assert torch.isfinite(scale).all() and torch.isfinite(smooth).all()
    assert codes_apart(codes[0], quantize_keys(k[:1], None, BLOCK, format)[0][0]) == 0


@formats
def test_equal_keys_and_empty_shapes(format):
    for k in (torch.full((1, 1, 40, 8), 3.0), torch.randn(1, 1, 1, 8), torch.zeros(1, 1, 33, 8)):
        codes, scale, smooth = quantize_keys(k, None, BLOCK, format)
        assert (codes.float() == 0).all() and (scale > 0).all() and (smooth > 0).all()
    codes, scale, smooth = quantize_keys(torch.empty(0, 2, 40, 8), None, BLOCK, format)
    assert codes.shape == (0, 2, 40, 8) and scale.shape == (0, 2, 2) and smooth.shape == (0, 2, 8)


@formats
def test_huge_keys_stay_finite(format):
    k = 1e30 * keys()
    codes, scale, smooth = quantize_keys(k, None, BLOCK, format)
    assert torch.isfinite(scale).all() and torch.isfinite(smooth).all()
    assert torch.isfinite(codes.float()).all() and (codes.float() != 0).any()
    k = 1e12 * keys()
    assert_close(restored(k, format), k - k.mean(2, keepdim=True), RELATIVE_ERROR[format])


@formats
def test_opcheck(format):
    torch.library.opcheck(quantize_keys.default, (keys(), None, BLOCK, format))
    torch.library.opcheck(quantize_keys.default, (keys(batch=2), torch.tensor([80, 7]), BLOCK, format))


def test_int8_is_the_default():
    torch.library.opcheck(quantize_keys.default, (keys(), None, BLOCK))
    assert quantize_keys(keys(), None, BLOCK)[0].dtype == torch.int8


@pytest.mark.parametrize(
    ("args", "text"),
    (
        ((torch.randn(2, 3, 4), None, BLOCK), "k has shape"),
        ((torch.zeros(1, 1, 16, 8, dtype=torch.int8), None, BLOCK), "k is int8"),
        ((keys(), None, 0), "block_size is 0"),
        ((keys(), torch.tensor([1, 2]), BLOCK), "kv_len has shape"),
        ((keys(), torch.tensor([1.0]), BLOCK), "kv_len is float32"),
        ((keys(), None, BLOCK, "fp4"), "format 'fp4' is not known. Use one of int8, fp8"),
    ),
)
def test_bad_input(args, text):
    with pytest.raises(OpInputError, match=text):
        quantize_keys(*args)
