"""The CUDA form of the ops that share their Inductor IR with the CPU, without a GPU."""

import torch

from qs_compiler.lowering import collect_fallbacks
from qs_compiler.ops import pack_int4
from qs_compiler.ops.formats import FORMATS
from tests.fake_h100 import cuda_code
from tests.kernel_text import kernel_sources
from tests.lowering.compiled import library_calls
from tests.lowering.interpret import interpret
from tests.ops.attention_cases import BLOCK, random_qkv
from tests.tolerances import assert_close

quantsparse = torch.ops.quantsparse
fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16


def generated(function, args, folder):
    with collect_fallbacks() as fallbacks:
        text = cuda_code(function, *args)
    assert fallbacks == [] and not any("quantsparse" in name for name in library_calls(text))
    return text, interpret([(text, args)], folder)[0]


def test_quantize_rows_is_bit_exact(tmp_path):
    def function(x, long, smooth):
        smoothed = [quantsparse.quantize_rows(x, smooth, None, name) for name in FORMATS]
        return [t for pair in smoothed for t in pair] + list(quantsparse.quantize_rows(long, None, None, "int8"))

    x = torch.randn(65, 96).to(bf16)
    x[3] = 0
    args = x, torch.randn(2, 3, 1500), torch.rand(96)
    _, got = generated(function, args, tmp_path)
    for result, wanted in zip(got, function(*args), strict=True):
        assert result.dtype == wanted.dtype and torch.equal(result.float(), wanted.float())


def test_rotation_is_a_product_and_a_kernel(tmp_path):
    def function(x, smooth, rotation):
        return quantsparse.quantize_rows(x, smooth, rotation, "int8")

    args = torch.randn(2, 65, 96), torch.rand(96) + 0.5, torch.linalg.qr(torch.randn(32, 32)).Q
    text, (codes, scales) = generated(function, args, tmp_path)
    assert library_calls(text) == ["extern_kernels.mm"]
    wanted, wanted_scales = function(*args)
    assert (codes.int() - wanted.int()).abs().max() <= 1
    assert_close(scales, wanted_scales)


def test_weights(tmp_path):
    def function(packed, multipliers, ws, smooth):
        wide = [quantsparse.expand_w4(packed, multipliers, dtype) for dtype in (torch.int8, fp8)]
        direct = quantsparse.dequantize(packed, ws, multipliers, smooth, None, "int8", bf16)
        return *wide, direct, *(quantsparse.dequantize(w, ws, None, None, None, "none", torch.float32) for w in wide)

    multipliers = torch.tensor([1, 2, 4, 8, 16], dtype=torch.uint8)[torch.randint(5, (65, 6))]
    args = pack_int4(torch.randint(-7, 8, (65, 96), dtype=torch.int8)), multipliers, torch.rand(65), torch.rand(96)
    _, got = generated(function, args, tmp_path)
    for result, wanted in zip(got, function(*args), strict=True):
        assert result.dtype == wanted.dtype and torch.equal(result.float(), wanted.float())


def test_add_residual_in_every_cache_format(tmp_path):
    def function(o, scale, left, right, gain, *residuals):
        coded = [quantsparse.add_residual(o, r, scale, None, None, None) for r in residuals[1:]]
        factors = quantsparse.add_residual(o, None, None, left, right, None)
        return *coded, factors, quantsparse.add_residual(o, residuals[0], None, left, right, gain)

    codes = torch.randint(-7, 8, (1, 2, 65, 16), dtype=torch.int8)
    residuals = torch.randn(1, 2, 65, 16), codes, codes.to(fp8), pack_int4(codes)
    factors = torch.randn(1, 2, 65, 4), torch.randn(1, 2, 4, 16), torch.rand(2)
    args = torch.randn(1, 2, 65, 16), torch.rand(1, 2, 65), *factors, *residuals
    _, got = generated(function, args, tmp_path)
    for result, wanted in zip(got, function(*args), strict=True):
        assert_close(result, wanted)


def test_pack_values_is_bit_exact(tmp_path):
    def function(v, strided, kv_len):
        plain = *quantsparse.pack_values(v), *quantsparse.pack_values(strided)
        return *plain, *quantsparse.pack_values(v, kv_len)

    v = torch.randn(2, 3, 129, 24)
    v[0, 1] = 0
    args = v, torch.randn(1, 37, 2, 16).to(bf16).transpose(1, 2), torch.tensor([129, 70])
    _, got = generated(function, args, tmp_path)
    for result, wanted in zip(got, function(*args), strict=True):
        assert result.dtype == wanted.dtype and torch.equal(result, wanted)


def test_quantize_keys_reads_each_block_in_one_kernel(tmp_path):
    def function(k, kv_len):
        return quantsparse.quantize_keys(k, kv_len, BLOCK)

    args = torch.randn(2, 75, 3, 16).to(bf16).transpose(1, 2) + 3, torch.tensor([75, 40])
    text, (codes, *scales) = generated(function, args, tmp_path)
    # The sums over the tokens with what is made of them; the maxima with their scales and codes.
    assert len(kernel_sources(text)) == 2
    wanted, *wanted_scales = function(*args)
    assert codes.dtype == torch.int8 and (codes.int() - wanted.int()).abs().max() <= 1  # sums in another order
    for scale, wanted_scale in zip(scales, wanted_scales, strict=True):
        assert_close(scale, wanted_scale)


def test_references_on_cuda_are_reported():
    def function(q, k, v):
        lists = quantsparse.select_blocks(quantsparse.block_scores(q, k, None, 0.2, BLOCK), None, 2)
        many = quantsparse.refresh_attention(
            q, k, v, None, None, None, *lists, None, None, "residual", 0.2, BLOCK, q.dtype
        )
        return quantsparse.low_rank(many[2], 4)

    with collect_fallbacks() as outer, collect_fallbacks() as fallbacks:
        text = cuda_code(function, *random_qkv(1, 2, 2, 96, 96, 320, bf16))
    assert [op for op, _ in fallbacks] == ["refresh_attention"] and "head width 320" in fallbacks[0][1]
    assert outer == [] and "torch.ops.quantsparse.refresh_attention.default" in library_calls(text)
