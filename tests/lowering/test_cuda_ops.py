"""The CUDA form of the ops that share their Inductor IR with the CPU, without a GPU."""

import re

import pytest
import torch

from qs_compiler.lowering import collect_fallbacks, linear_choices, quantize_rows
from qs_compiler.ops import pack_int4
from qs_compiler.ops.formats import FORMATS
from tests.fake_h100 import SHARED_MEMORY, cuda_code
from tests.kernel_text import compile_offline, kernel_sources
from tests.lowering.compiled import library_calls
from tests.lowering.interpret import interpret
from tests.ops.attention_cases import BLOCK, random_qkv
from tests.tolerances import assert_close, codes_apart

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


@pytest.fixture
def rotated_in_one_kernel(monkeypatch):
    monkeypatch.setattr(linear_choices, "ROTATED_IN_ONE_KERNEL", frozenset(SHARED_MEMORY))
    monkeypatch.setattr(quantize_rows, "FEW_ROWS", 65)


def test_rotation_and_quantiser_are_one_kernel(rotated_in_one_kernel, tmp_path):
    """Both formats, with smoothing and without; a block that the template does not take stays a product."""

    def function(x, rotation, smooth, odd):
        forms = ("int8", smooth), ("int8", None), ("fp8", smooth)
        pairs = [quantsparse.quantize_rows(x, s, rotation, form) for form, s in forms]
        return [t for pair in (*pairs, quantsparse.quantize_rows(x, None, odd, "int8")) for t in pair]

    rotation, odd = (torch.linalg.qr(torch.randn(size, size)).Q for size in (32, 24))
    x, smooth = torch.randn(2, 65, 96).to(bf16), torch.rand(96) + 0.5
    x[0, 3] = 0
    args = x, rotation, smooth, odd
    text, got = generated(function, args, tmp_path)
    assert library_calls(text) == ["extern_kernels.mm"]  # the odd block
    assert ["rotated_tile" in s for s in kernel_sources(text).values()].count(True) == 3
    wanted = function(*args)
    for i, smoothed in enumerate((smooth, torch.ones(96), smooth)):
        source = ((x * smoothed).double().unflatten(-1, (3, 32)) @ rotation.double()).flatten(-2)
        (codes, scales), (right, right_scales) = got[2 * i : 2 * i + 2], wanted[2 * i : 2 * i + 2]
        assert codes.dtype == right.dtype
        assert_close(scales, right_scales, 2**-11)
        if codes.dtype == torch.int8:  # operands are rounded to TF32: a code near a tie may go either way
            assert (codes.int() - right.int()).abs().max() <= 1
        error, right_error = (
            (c.double() * s.double()[..., None] - source).norm() for c, s in ((codes, scales), (right, right_scales))
        )
        assert error < 1.002 * right_error


@pytest.mark.parametrize(("block", "capability"), ((16, (9, 0)), *((128, target) for target in SHARED_MEMORY)))
def test_rotated_rows_compile_and_fit(rotated_in_one_kernel, block, capability, tmp_path):
    def function(x, smooth, rotation):
        return quantsparse.quantize_rows(x, smooth, rotation, "int8")

    with torch.device("meta"):
        args = torch.empty(40_000, 3072, dtype=bf16), torch.empty(3072), torch.empty(block, block)
    [source] = kernel_sources(cuda_code(function, *args, capability=capability)).values()
    compiled = compile_offline(source, tmp_path, capability)
    assert "tf32" in compiled.ptx
    assert compiled.shared_memory <= SHARED_MEMORY[capability]
    assert compiled.spilled_bytes == 0


def test_one_scratch_serves_all_int4_linears():
    """Codes expanded for one product go back to the allocator before those of the next are taken: q, k, v, out, up."""

    def function(x, *weights):
        def linear(pair, w4, multipliers, ws):
            return quantsparse.linear(*pair, quantsparse.expand_w4(w4, multipliers, torch.int8), ws, None, bf16)

        q, k, v, out, up = (weights[i : i + 3] for i in range(0, 15, 3))
        rows = quantsparse.quantize_rows(x, None, None, "int8")
        y = linear(rows, *q) * linear(rows, *k) + linear(rows, *v)
        for weight in (out, up):
            y = linear(quantsparse.quantize_rows(y, None, None, "int8"), *weight)
        return (y,)

    def weight(columns):
        return torch.empty(columns, 256, dtype=torch.uint8), torch.empty(columns, 8, dtype=torch.uint8)

    with torch.device("meta"):
        weights = [t for n in (512, 512, 512, 512, 768) for t in (*weight(n), torch.empty(n))]
        text = cuda_code(function, torch.empty(4096, 512, dtype=bf16), *weights)
    alive: set[str] = set()
    for line in text[text.index("def call") :].splitlines():
        if made := re.search(r"(buf\d+) = empty_strided_cuda\(\((?:512|768), 512\).*int8\)", line):
            alive.add(made[1])
            assert len(alive) == 1, line
        for gone in re.findall(r"\bdel (buf\d+)", line):
            if gone in alive and (heir := re.search(r"(buf\d+) = (?:reinterpret_tensor\()?" + gone, line)):
                alive.add(heir[1])
            alive.discard(gone)
    assert "triton_tem" in text and not alive


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


@pytest.mark.parametrize("name", ("int8", "fp8"))
def test_quantize_keys_reads_each_block_in_one_kernel(name, tmp_path):
    def function(k, kv_len):
        return quantsparse.quantize_keys(k, kv_len, BLOCK, name)

    args = torch.randn(2, 75, 3, 16).to(bf16).transpose(1, 2) + 3, torch.tensor([75, 40])
    text, (codes, *scales) = generated(function, args, tmp_path)
    # The sums over the tokens with what is made of them; the maxima with their scales and codes.
    assert len(kernel_sources(text)) == 2
    wanted, *wanted_scales = function(*args)
    assert codes.dtype == FORMATS[name].dtype and codes_apart(codes, wanted) <= 1  # sums in another order
    for scale, wanted_scale in zip(scales, wanted_scales, strict=True):
        assert_close(scale, wanted_scale)


@pytest.mark.parametrize("name", ("int8", "fp8"))
def test_quantize_keys_compiles_for_many_channels_a_program(name, tmp_path):
    """Triton 3.6 fails on a reduction that stores smoothing, mean and the reciprocal of the smoothing."""
    with torch.device("meta"):
        k = torch.empty(2, 4, 4096, 128, dtype=bf16)
    sources = kernel_sources(cuda_code(lambda k: quantsparse.quantize_keys(k, None, 128, name), k))
    reductions = [source for name, source in sources.items() if name.startswith(("triton_per", "triton_red"))]
    assert len(reductions) >= 3
    for source in reductions:
        assert compile_offline(source, tmp_path, (9, 0), x_block=32).spilled_bytes == 0


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
