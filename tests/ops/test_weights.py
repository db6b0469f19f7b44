"""expand_w4, its packing, and dequantize."""

import pytest
import torch
from torch.nn.functional import linear

from qs_compiler.ops.expand_w4 import FP8_MULTIPLIERS, check_multipliers, pack_int4, unpack_int4
from qs_compiler.ops.library import OpInputError
from tests.tolerances import assert_close

expand_w4 = torch.ops.quantsparse.expand_w4
dequantize = torch.ops.quantsparse.dequantize


def int4_weight(n, k, group, dtype=torch.int8):
    values = torch.randint(-7, 8, (n, k), dtype=torch.int8)
    choices = torch.arange(1, 19) if dtype == torch.int8 else torch.tensor(FP8_MULTIPLIERS)
    multipliers = choices[torch.randint(len(choices), (n, k // group))].to(torch.uint8)
    return values, multipliers


def test_pack_and_unpack_are_inverse_and_low_nibble_is_even():
    values = torch.arange(-7, 8, dtype=torch.int8)[None].repeat(3, 2)
    assert torch.equal(unpack_int4(pack_int4(values)), values)
    assert pack_int4(torch.tensor([[1, -2]], dtype=torch.int8)).tolist() == [[0xE1]]
    assert unpack_int4(torch.tensor([[0x8F]], dtype=torch.uint8)).tolist() == [[-1, -8]]


@pytest.mark.parametrize("n", (1, 63, 65))
@pytest.mark.parametrize("group", (2, 16, 32))
@pytest.mark.parametrize("dtype", (torch.int8, torch.float8_e4m3fn))
def test_expansion_is_exact(n, group, dtype):
    values, multipliers = int4_weight(n, 96, group, dtype)
    wide = expand_w4(pack_int4(values), multipliers, dtype)
    assert wide.dtype == dtype
    assert torch.equal(wide.float(), values.float() * multipliers.float().repeat_interleave(group, 1))


def test_every_allowed_multiplier_is_exact_and_others_are_refused():
    values = torch.arange(-7, 8, dtype=torch.int8).repeat(2)[None]
    for dtype, allowed in ((torch.int8, range(1, 19)), (torch.float8_e4m3fn, FP8_MULTIPLIERS)):
        for multiplier in allowed:
            multipliers = torch.tensor([[multiplier]], dtype=torch.uint8)
            check_multipliers(multipliers, dtype)
            assert torch.equal(expand_w4(pack_int4(values), multipliers, dtype).float(), values.float() * multiplier)
    for dtype, multiplier in ((torch.int8, 19), (torch.int8, 0), (torch.float8_e4m3fn, 3)):
        with pytest.raises(OpInputError, match="not all exact"):
            check_multipliers(torch.tensor([[multiplier]], dtype=torch.uint8), dtype)


@pytest.mark.parametrize("stored", ("int8", "fp8", "int4"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dequantize_undoes_smooth_and_rotation(stored, dtype):
    n, k = 24, 64
    smooth = torch.rand(k) + 0.5
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    ws = torch.rand(n) * 0.01 + 0.01
    multipliers = None
    if stored == "int4":
        values, multipliers = int4_weight(n, k, 16, torch.float8_e4m3fn)
        wq, codes = pack_int4(values), values.float() * multipliers.float().repeat_interleave(16, 1)
    else:
        codes = torch.randint(-127, 128, (n, k)).float()
        wq = codes.to(torch.int8 if stored == "int8" else torch.float8_e4m3fn)
        codes = wq.float()
    w = dequantize(wq, ws, multipliers, smooth, rotation, "int8", dtype)
    packed = codes.double() * ws.double()[:, None]
    turn = torch.block_diag(*[rotation.double()] * 4)
    assert_close(w, packed @ turn.t() * smooth)
    x = torch.randn(5, k)
    wanted = (x.double() * smooth) @ turn @ packed.t()
    assert_close(linear(x.to(dtype), w), wanted, 2 * {torch.float32: 1e-5}.get(dtype, 8e-3))
    plain = dequantize(wq, ws, multipliers, None, None, "none", dtype)
    assert_close(plain, packed)


def test_opcheck():
    values, multipliers = int4_weight(6, 32, 16)
    packed = pack_int4(values)
    torch.library.opcheck(expand_w4, (packed, multipliers, torch.int8))
    ws = torch.rand(6)
    torch.library.opcheck(dequantize, (packed, ws, multipliers, None, None, "int8", torch.bfloat16))
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    torch.library.opcheck(dequantize, (values, ws, None, torch.rand(32), rotation, "none", torch.float32))


def test_bad_input_is_named():
    values, multipliers = int4_weight(6, 32, 16)
    packed, ws = pack_int4(values), torch.rand(6)
    with pytest.raises(OpInputError, match=r"multipliers has shape \(5, 2\).*\(6, any\)"):
        expand_w4(packed, multipliers[:5], torch.int8)
    with pytest.raises(OpInputError, match="3 groups for K = 32"):
        expand_w4(packed, torch.ones(6, 3, dtype=torch.uint8), torch.int8)
    with pytest.raises(OpInputError, match="dtype is float32"):
        expand_w4(packed, multipliers, torch.float32)
    with pytest.raises(OpInputError, match="without multipliers"):
        dequantize(packed, ws, None, None, None, "int8", torch.float32)
    with pytest.raises(OpInputError, match="with multipliers"):
        dequantize(values, ws, multipliers, None, None, "int8", torch.float32)
    with pytest.raises(OpInputError, match="activation 'w4' is not known"):
        dequantize(packed, ws, multipliers, None, None, "w4", torch.float32)
    with pytest.raises(OpInputError, match=r"smooth has shape \(16,\).*\(32\)"):
        dequantize(packed, ws, multipliers, torch.ones(16), None, "int8", torch.float32)
    with pytest.raises(OpInputError, match=r"values span -8\.\.7"):
        pack_int4(torch.tensor([[-8, 7]], dtype=torch.int8))
    with pytest.raises(OpInputError, match="K is 3"):
        pack_int4(torch.zeros(1, 3, dtype=torch.int8))
