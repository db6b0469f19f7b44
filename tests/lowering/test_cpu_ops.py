"""Every op compiled on a CPU against its reference, over formats, dtypes and odd shapes."""

import pytest
import torch

from qs_compiler.lowering import collect_fallbacks
from qs_compiler.ops import pack_int4
from qs_compiler.ops.formats import FORMATS
from tests.lowering.compiled import compiled, library_calls
from tests.ops.attention_cases import BLOCK, block_lists, random_qkv
from tests.tolerances import assert_close, codes_apart

quantsparse = torch.ops.quantsparse
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 63, 65, 127, 129, 257)


@pytest.mark.parametrize("name", FORMATS)
def test_quantize_rows(name):
    """Codes and scales equal the reference's bit for bit, extreme and empty rows included."""

    def function(smooth, *inputs):
        plain = [quantsparse.quantize_rows(x, None, None, name) for x in inputs]
        return plain, [quantsparse.quantize_rows(x, smooth, None, name) for x in inputs]

    inputs = [torch.randn(rows, 96).to(FLOATS[i % 3]) for i, rows in enumerate(ROWS)]
    limits = torch.zeros(3, 96)
    limits[1], limits[2, :3] = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    ties = torch.cat((torch.arange(-47.5, 47.5), torch.tensor([FORMATS[name].qmax])))[None]
    inputs += [limits, ties, torch.randn(4, 96, 3).transpose(1, 2)]
    smooth = torch.rand(96)  # below 1: the largest floats must stay finite
    got, code = compiled(function, smooth, *inputs)
    assert library_calls(code) == []
    for variants, wanted in zip(got, function(smooth, *inputs), strict=True):
        for (codes, scales), (wanted_codes, wanted_scales) in zip(variants, wanted, strict=True):
            assert codes.dtype == FORMATS[name].dtype
            assert torch.equal(codes.float(), wanted_codes.float()) and torch.equal(scales, wanted_scales)


def test_rotated_rows_and_weights():
    def function(x, wq, ws, smooth, rotation):
        rows = quantsparse.quantize_rows(x, smooth, rotation, "int8")
        return *rows, quantsparse.dequantize(wq, ws, None, smooth, rotation, "int8", torch.float32)

    rotation = torch.linalg.qr(torch.randn(32, 32)).Q
    args = torch.randn(2, 65, 96), torch.randint(-127, 128, (24, 96), dtype=torch.int8), torch.rand(24)
    args = *args, torch.rand(96) + 0.5, rotation
    with collect_fallbacks() as fallbacks:
        (codes, scales, weight), code = compiled(function, *args)
    assert library_calls(code) == ["extern_kernels.mm"] * 2 and fallbacks == []
    wanted_codes, wanted_scales, wanted_weight = function(*args)
    assert (codes.int() - wanted_codes.int()).abs().max() <= 1
    assert_close(codes * scales[..., None], wanted_codes * wanted_scales[..., None], 1e-3)
    assert_close(weight, wanted_weight)


@pytest.mark.parametrize("name", ("int8", "fp8"))
def test_quantize_keys(name):
    def function(kv_len, *inputs):
        plain = [quantsparse.quantize_keys(x, None, BLOCK, name) for x in inputs]
        return [*plain, quantsparse.quantize_keys(inputs[0], kv_len, BLOCK, name)]

    inputs = [3 + torch.randn(2, 2, rows, 24).to(FLOATS[i % 3]) for i, rows in enumerate(ROWS[::-1])]
    args = torch.tensor([257, 70]), *inputs
    got, code = compiled(function, *args)
    assert library_calls(code) == []
    for (codes, *scales), (wanted, *wanted_scales) in zip(got, function(*args), strict=True):
        assert codes.dtype == FORMATS[name].dtype and codes_apart(codes, wanted) <= 1  # sums in another order
        for scale, wanted_scale in zip(scales, wanted_scales, strict=True):
            assert_close(scale, wanted_scale, 1e-4)  # of keys less a mean of the same size


def test_linear():
    def function(*operands):
        groups = [operands[i : i + 5] for i in range(0, len(operands), 5)]
        return [quantsparse.linear(*group, dtype) for group, dtype in zip(groups, FLOATS * 4, strict=True)]

    operands = []
    for i, rows in enumerate(ROWS * 2):
        xq, wq = (
            torch.randint(-127, 128, (rows, 96), dtype=torch.int8),
            torch.randint(-127, 128, (33, 96), dtype=torch.int8),
        )
        if i >= 6:
            xq, wq = xq.to(torch.float8_e4m3fn), wq.to(torch.float8_e4m3fn)
        operands += [
            xq,
            torch.rand(rows) * 1e-4,
            wq,
            torch.rand(33),
            torch.randn(33).to(FLOATS[i % 3]) if i % 2 else None,
        ]
    got, _ = compiled(function, *operands)
    for result, wanted in zip(got, function(*operands), strict=True):
        assert result.dtype == wanted.dtype
        assert_close(result, wanted)


@pytest.mark.parametrize("dtype", (torch.int8, torch.float8_e4m3fn))
def test_expanded_and_dequantized_weights(dtype):
    def function(packed, multipliers, ws, smooth):
        wide = quantsparse.expand_w4(packed, multipliers, dtype)
        floats = [quantsparse.dequantize(packed, ws, multipliers, smooth, None, "int8", d) for d in FLOATS]
        return wide, floats, quantsparse.dequantize(wide, ws, None, None, None, "none", torch.float32)

    multipliers = torch.tensor([1, 2, 4, 8, 16], dtype=torch.uint8)[torch.randint(5, (65, 6))]
    args = pack_int4(torch.randint(-7, 8, (65, 96), dtype=torch.int8)), multipliers, torch.rand(65), torch.rand(96)
    (wide, floats, direct), code = compiled(function, *args)
    wanted_wide, wanted_floats, wanted_direct = function(*args)
    assert library_calls(code) == []
    assert wide.dtype == dtype and torch.equal(wide.float(), wanted_wide.float())
    assert torch.equal(direct, wanted_direct)
    for got, wanted in zip(floats, wanted_floats, strict=True):
        assert torch.equal(got, wanted)


def test_add_residual():
    forms = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.uint8)

    def function(left, right, gain, scale, half, *tensors):
        outputs, residuals = tensors[:3], tensors[3:]
        plain = [
            quantsparse.add_residual(
                outputs[0], r, None if r.dtype.is_floating_point and r.itemsize > 1 else scale, None, None, None
            )
            for r in residuals
        ]
        both = [quantsparse.add_residual(o, residuals[0], None, left, right, gain) for o in outputs]
        factors = [quantsparse.add_residual(o, None, None, *half, None) for o in outputs]
        return plain, both, factors

    shape = (2, 3, 65, 16)
    values = torch.randn(shape)
    codes = torch.randint(-7, 8, shape, dtype=torch.int8)
    residuals = [pack_int4(codes) if f == torch.uint8 else (codes if f == torch.int8 else values).to(f) for f in forms]
    outputs = [torch.randn(shape).to(d) for d in FLOATS]
    for gain in (torch.tensor(0.5), torch.tensor([0.0, 0.5, -1.0])):
        factors = torch.randn(2, 3, 65, 4), torch.randn(2, 3, 4, 16)
        half = tuple(x.bfloat16() for x in factors)
        args = *factors, gain, torch.rand(2, 3, 65), half, *outputs, *residuals
        got, _ = compiled(function, *args)
        for variants, wanted in zip(got, function(*args), strict=True):
            for result, expected in zip(variants, wanted, strict=True):
                assert result.dtype == expected.dtype
                assert_close(result, expected)


def test_attention_ops_call_their_references_which_is_no_fallback_here():
    def function(q, k, v, always):
        scores = quantsparse.block_scores(q, k, None, 0.2, BLOCK)
        lists = quantsparse.select_blocks(scores, always, 2)
        shared = q, k, v, None, None, None, *lists, None
        refresh = quantsparse.refresh_attention(*shared, None, "complement", 0.2, BLOCK, q.dtype)
        sparse = quantsparse.sparse_attention(*shared, refresh[2], refresh[3], 0.2, BLOCK, q.dtype)
        left, right = quantsparse.low_rank(refresh[2].float(), 4)
        return *refresh, *sparse, (left @ right).permute(0, 2, 1, 3).flatten(2), lists[1]

    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(2, 4, 2, 65, 97, 16, torch.bfloat16))
    args = q, k, v, torch.eye(3, 4, dtype=torch.bool)
    with collect_fallbacks() as fallbacks:
        got, code = compiled(function, *args)
    assert fallbacks == []
    assert [name.split(".")[3] for name in library_calls(code) if "quantsparse" in name] == [
        "block_scores",
        "select_blocks",
        "refresh_attention",
        "sparse_attention",
        "low_rank",
    ]
    for result, wanted in zip(got, function(*args), strict=True):
        assert_close(result.float(), wanted.float(), 1e-3)


def test_int16_lists_and_lengths_pass_through():
    def function(q, k, v, counts, indices, kv_len):
        return quantsparse.sparse_attention(
            q, k, v, None, None, None, counts, indices, kv_len, None, None, 0.2, BLOCK, torch.bfloat16
        )

    q, k, v = random_qkv(1, 2, 2, 65, 65, 16, torch.float32)
    lists = block_lists(1, 1, 3, 3, dtype=torch.int16)
    args = q, k, v, *lists, torch.tensor([50], dtype=torch.int32)
    for got, wanted in zip(compiled(function, *args)[0], function(*args), strict=True):
        assert torch.equal(got, wanted)
