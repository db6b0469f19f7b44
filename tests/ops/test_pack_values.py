"""quantsparse::pack_values: the order of its slots, its scales, its rounding."""

import pytest
import torch

from qs_compiler.ops.library import OpInputError
from qs_compiler.ops.pack_values import unpack_values
from tests.tolerances import FP8_WEIGHTS_ERROR, assert_close

pack_values = torch.ops.quantsparse.pack_values


def test_slots_hold_the_tokens_that_the_docstring_says():
    v = torch.arange(1, 33.0)[None, None, :, None]  # small integers, exact in e4m3 up to one scale
    packed, scale = pack_values(v)
    codes = packed.view(torch.float8_e4m3fn).float() * scale[..., None]
    for g in range(2):
        for t in range(4):
            for a in range(2):
                for b in range(2):
                    slot, token = 16 * g + 4 * t + 2 * a + b, 16 * g + 8 * a + 2 * t + b
                    assert abs(codes[0, 0, 0, slot] - (token + 1)) <= 0.07 * (token + 1)


@pytest.mark.parametrize("tokens", (0, 1, 15, 16, 63, 129, 257))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_unpacked_values_are_close_and_padding_is_zero(tokens, dtype):
    v = torch.randn(2, 3, tokens, 24).to(dtype)
    v[:, 1] = 0
    packed, scale = pack_values(v)
    assert packed.shape == (2, 3, 24, (tokens + 15) // 16 * 16) and packed.is_contiguous()
    back = unpack_values(packed, tokens).float() * scale[:, :, None]
    assert_close(back, v.float(), FP8_WEIGHTS_ERROR)
    whole = unpack_values(packed, packed.shape[3]).float()
    assert (whole[:, :, tokens:] == 0).all()


def test_a_view_of_all_heads_packs_like_a_copy():
    v = torch.randn(2, 40, 3, 16).transpose(1, 2)
    for got, wanted in zip(pack_values(v), pack_values(v.contiguous()), strict=True):
        assert torch.equal(got, wanted)


def test_padding_takes_no_part():
    v, kv_len = torch.randn(2, 3, 70, 16), torch.tensor([70, 33])
    poisoned = v.clone()
    poisoned[1, :, 33:] = float("nan")
    packed, scale = pack_values(poisoned, kv_len)
    alone, alone_scale = pack_values(v[1:, :, :33])
    assert torch.equal(scale[1:], alone_scale) and torch.equal(packed[1:, ..., : alone.shape[-1]], alone)
    assert (packed[1, ..., alone.shape[-1] :] == 0).all()
    assert torch.equal(packed[:1], pack_values(v[:1])[0])


def test_opcheck():
    torch.library.opcheck(pack_values.default, (torch.randn(1, 2, 33, 8),))
    torch.library.opcheck(pack_values.default, (torch.randn(2, 2, 33, 8), torch.tensor([33, 5])))


@pytest.mark.parametrize(
    ("args", "text"),
    (
        ((torch.randn(2, 3, 4),), "v has shape"),
        ((torch.zeros(1, 1, 16, 8, dtype=torch.int8),), "v is int8"),
        ((torch.randn(1, 1, 16, 8), torch.tensor([1, 2])), "kv_len has shape"),
        ((torch.randn(1, 1, 16, 8), torch.tensor([1.0])), "kv_len is float32"),
    ),
)
def test_bad_input(args, text):
    with pytest.raises(OpInputError, match=text):
        pack_values(*args)
