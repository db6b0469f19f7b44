"""Every op's CUDA form, compiled and run on the device, against its reference on the CPU."""

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from qs_compiler._compat import inductor_config
from qs_compiler.lowering import collect_fallbacks, linear_choices, row_kernels
from qs_compiler.ops import pack_int4
from qs_compiler.ops.formats import FORMATS
from tests.lowering.compiled import EPILOGUES, compiled, gate_joins_product, library_calls
from tests.ops.attention_cases import block_lists, random_qkv
from tests.tolerances import FP8_WEIGHTS_ERROR, RELATIVE_ERROR, assert_close, codes_apart

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
quantsparse = torch.ops.quantsparse
bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
NAMES = [name for name, form in FORMATS.items() if form.dtype != fp8 or HAS_FP8]
CODES = [torch.int8, *([fp8] if HAS_FP8 else [])]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def to_cuda(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def run(function, *args, fallbacks=(), dynamic=False):
    """Compiled results on the device, references' results on the CPU, generated code; fallbacks must be as given."""
    with collect_fallbacks() as found:
        got, code = compiled(function, *map(to_cuda, args), dynamic=dynamic)
    assert tuple(op for op, _ in found) == tuple(fallbacks), found
    return [t.cpu() for t in got], list(function(*args)), code


def compare(got, wanted, tolerance=None):
    for result, expected in zip(got, wanted, strict=True):
        assert result.dtype == expected.dtype
        assert_close(result, expected, tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_rows(name, dtype):
    def function(x, long, smooth):
        return *quantsparse.quantize_rows(x, smooth, None, name), *quantsparse.quantize_rows(long, None, None, name)

    x = torch.randn(257, 96).to(dtype)
    x[3] = 0
    long, smooth = torch.randn(2, 129, 5120).to(dtype), torch.rand(96)
    got, wanted, code = run(function, x, long, smooth)
    assert library_calls(code) == []
    sources = x.double() * smooth.double(), long.double()
    for source, codes, scales, wanted_scales in zip(sources, got[::2], got[1::2], wanted[1::2], strict=True):
        assert_close(scales, wanted_scales, 1e-6)
        quotient = source / scales.double()[..., None]
        if FORMATS[name].dtype == torch.int8:
            # torch 2.11 divides with 2 ulp of error, so a quotient that lies on a tie may go either way.
            assert (codes.double() - quotient).abs().max() <= 0.5 + 127 * 2**-21
        else:  # half a unit in the last of e4m3's 3 bits, or half the smallest number
            limit = (quotient.abs() * 2**-4).clamp(min=2**-10) * (1 + 2**-19)
            assert ((codes.double() - quotient).abs() <= limit).all()


def test_rotation():
    def function(x, smooth, rotation, wq, ws):
        codes, scales = quantsparse.quantize_rows(x, smooth, rotation, "int8")
        weight = quantsparse.dequantize(wq, ws, None, smooth, rotation, "int8", torch.float32)
        return codes * scales[..., None], scales, weight

    wq, ws = torch.randint(-127, 128, (65, 256), dtype=torch.int8), torch.rand(65)
    args = torch.randn(2, 129, 256), torch.rand(256) + 0.5, torch.linalg.qr(torch.randn(128, 128)).Q, wq, ws
    got, wanted, _ = run(function, *args)
    compare(got, wanted, 1e-3)


@pytest.mark.parametrize("name", [n for n in ("int8", "fp8") if n in NAMES])
def test_rotated_rows_in_one_kernel(name, monkeypatch):
    monkeypatch.setattr(linear_choices, "ROTATED_IN_ONE_KERNEL", frozenset({torch.cuda.get_device_capability()}))

    def function(x, smooth, rotation):
        return quantsparse.quantize_rows(x, smooth, rotation, name)

    args = torch.randn(2, 2049, 256).to(bf16), torch.rand(256) + 0.5, torch.linalg.qr(torch.randn(128, 128)).Q
    got, wanted, code = run(function, *args)
    assert "rotated_tile" in code and library_calls(code) == []
    assert_close(got[1], wanted[1], 2**-11)
    # Operands are rounded to TF32, so codes near a tie may go either way: held is the error that the codes make.
    x, smooth, rotation = (a.double() for a in args)
    source = ((x * smooth).unflatten(-1, (2, 128)) @ rotation).flatten(-2)
    error, wanted_error = ((c.double() * s.double()[..., None] - source).norm() for c, s in (got, wanted))
    assert error < 1.002 * wanted_error


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="a rule for H100"
)
def test_the_library_gives_what_the_template_gives():
    def function(*args):
        return (quantsparse.linear(*args, bf16),)

    xq, wq = (torch.randn(n, 3072).to(fp8) for n in (1024, 3072))
    args = xq, torch.rand(1024) * 1e-3, wq, torch.rand(3072), torch.randn(3072).to(bf16)
    got, wanted, code = run(function, *args)
    assert library_calls(code) == ["extern_kernels.quantsparse_scaled_mm"]
    compare(got, wanted)
    with inductor_config.patch(max_autotune=True):
        compare(run(function, *args)[0], wanted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("after", [name for name in EPILOGUES if name != "two results"])
@pytest.mark.parametrize("code", CODES)
def test_every_element_of_many_tiles(code, after, dtype):
    """More tiles than programs, the last ones short: no element is wrong or left as it was."""
    rows, columns, depth = 20_017, 3000, 1040

    def function(xq, xs, wq, ws, bias, gate, residual):
        return EPILOGUES[after](quantsparse.linear(xq, xs, wq, ws, bias, dtype), gate, residual)

    xq, wq = ((torch.randn(n, depth, device="cuda") * 40).round().clamp(-127, 127).to(code) for n in (rows, columns))
    xs, ws = torch.rand(rows, device="cuda") * 1e-3, torch.rand(columns, device="cuda")
    bias, gate = torch.randn(2, columns, device="cuda", dtype=dtype)
    residual = torch.randn(rows, columns, device="cuda", dtype=dtype)
    sums = torch.mm(xq.to(bf16), wq.to(bf16).T, out_dtype=torch.float32)  # bfloat16 holds the codes
    product = (sums * xs[:, None] * ws + bias).to(dtype)
    wanted = EPILOGUES[after](product, gate, residual).float()
    # float8 sums of this depth err by 0.7 % of the largest. What follows enlarges that, and the plain form rounds each
    # of its up to three steps, which the kernel does not. int8 in float32 is exact.
    large = product.abs() + product.float().norm() / product.numel() ** 0.5
    limit = (0.01 + 2 * torch.finfo(dtype).eps) * EPILOGUES[after](large, gate.abs(), residual.abs()).float()

    def elements_off(got):
        return int((~((got.float() - wanted).abs() <= limit)).sum())

    args = xq, xs, wq, ws, bias, gate, residual
    torch.full_like(residual, float("nan"))  # what the result's memory may hold before
    got, text = compiled(function, *args)
    assert "code_product" in text and elements_off(got) == 0
    again = torch.compile(function, fullgraph=True, dynamic=False)  # finds what `compiled` has compiled
    for _ in range(2):
        torch.full_like(residual, float("nan"))
        assert elements_off(again(*args)) == 0


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("depth", (64, 100, 3072))
def test_linear(code, depth):
    def function(xs, ws, bias, wq, *rows):
        scales = [xs[: len(x)] for x in rows]
        return [
            quantsparse.linear(x, s, wq, ws, bias if i % 2 else None, FLOATS[i % 3])
            for i, (x, s) in enumerate(zip(rows, scales, strict=True))
        ]

    rows = [torch.randint(-127, 128, (n, depth), dtype=torch.int8).to(code) for n in (1, 63, 65, 127, 129, 257, 2049)]
    wq = torch.randint(-127, 128, (321, depth), dtype=torch.int8).to(code)
    got, wanted, code_text = run(function, torch.rand(2049) * 1e-5, torch.rand(321), torch.randn(321), wq, *rows)
    assert library_calls(code_text) == []
    for i, (result, expected) in enumerate(zip(got, wanted, strict=True)):
        assert result.dtype == expected.dtype
        # The tensor core adds float8 products with fewer bits than float32 has.
        assert_close(result, expected, 2e-3 if code == fp8 and FLOATS[i % 3] == torch.float32 else None)


@pytest.mark.parametrize("name", [n for n in ("int8", "fp8") if n in NAMES])
@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("batch", (1, 2))
def test_block_from_layer_norm_to_residual_is_two_kernels(name, dynamic, batch):
    def function(x, shift, scale, wq, ws, bias, gate, residual):
        h = layer_norm(x.float(), (x.shape[-1],)) * (1 + scale) + shift
        xq, xs = quantsparse.quantize_rows(h.to(x.dtype), None, None, name)
        return (residual + gate * gelu(quantsparse.linear(xq, xs, wq, ws, bias, x.dtype), approximate="tanh"),)

    wq = torch.randint(-127, 128, (1024, 512), dtype=torch.int8).to(FORMATS[name].dtype)
    vectors = [torch.randn(n).to(bf16) for n in (512, 512, 1024, 1024)]
    x, residual = torch.randn(batch, 1100, 512).to(bf16), torch.randn(batch, 1100, 1024).to(bf16)
    args = x, *vectors[:2], wq, torch.rand(1024) * 1e-3, *vectors[2:], residual
    got, wanted, code = run(function, *args, dynamic=dynamic)
    assert library_calls(code) == [] and (code.count(".run(") == 2) == gate_joins_product(batch)
    compare(got, wanted, 2e-2)


@pytest.mark.parametrize("name", [n for n in ("int8", "fp8") if n in NAMES])
@pytest.mark.parametrize("channels", (1536, 3072, 5120))
def test_rows_behind_layer_norm_are_held_in_registers(channels, name):
    def function(x, shift, scale):
        return quantsparse.quantize_rows(layer_norm(x, x.shape[-1:]) * (1 + scale) + shift, None, None, name)

    args = [torch.randn(*shape, channels).to(bf16) for shape in ((3, 1367), (3, 1), (3, 1))]
    (codes, scales), _, code = run(function, *args)
    long = name == "int8" and channels > row_kernels.INT8_CHANNELS
    held = torch.cuda.get_device_capability() in row_kernels.HELD_ROWS and not long
    assert code.count("fixed_config(") == held and code.count(".run(") == 1
    wanted_codes, wanted_scales = function(*(t.float() for t in args))
    assert codes_apart(codes, wanted_codes) <= 1
    assert_close(scales, wanted_scales)


@pytest.mark.parametrize("dtype", CODES)
def test_weights(dtype):
    def function(packed, multipliers, ws, smooth):
        wide = quantsparse.expand_w4(packed, multipliers, dtype)
        direct = quantsparse.dequantize(packed, ws, multipliers, smooth, None, "int8", bf16)
        return wide.float(), direct, quantsparse.dequantize(wide, ws, None, None, None, "none", torch.float32)

    multipliers = torch.tensor([1, 2, 4, 8, 16], dtype=torch.uint8)[torch.randint(5, (257, 8))]
    args = pack_int4(torch.randint(-7, 8, (257, 512), dtype=torch.int8)), multipliers, torch.rand(257), torch.rand(512)
    got, wanted, _ = run(function, *args)
    assert all(torch.equal(result, expected) for result, expected in zip(got, wanted, strict=True))


@pytest.mark.parametrize("form", (torch.float32, torch.bfloat16, torch.uint8, *CODES))
def test_add_residual(form):
    def function(o, residual, scale, left, right, gain):
        return (quantsparse.add_residual(o, residual, scale, left, right, gain),)

    shape = (1, 3, 129, 64)
    codes = torch.randint(-7, 8, shape, dtype=torch.int8)
    residual = pack_int4(codes) if form == torch.uint8 else codes.to(form)
    scale = torch.rand(shape[:3]) if form not in FLOATS else None
    factors = torch.randn(1, 3, 129, 16), torch.randn(1, 3, 16, 64), torch.rand(3)
    compare(*run(function, torch.randn(shape).to(bf16), residual, scale, *factors)[:2])


def attend(q, k, v, lists, *, scales=(None, None, None), kv_len=None, state=(None, None), block=128, dtype=None):
    """A function of tensors and None, and its arguments."""

    def function(*tensors):
        return quantsparse.sparse_attention(*tensors, 0.1, block, dtype or q.dtype)

    return function, (q, k, v, *scales, *lists, kv_len, *state)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("depth", "block"), ((64, 128), (80, 64), (128, 128), (256, 16), (24, 128)))
@pytest.mark.parametrize("tokens", (1, 129, 1025))
def test_sparse_attention(dtype, depth, block, tokens):
    keys = tokens + 17
    lists = block_lists(2, 4, -(-tokens // block), -(-keys // block))
    function, args = attend(*random_qkv(2, 4, 2, tokens, keys, depth, dtype), lists, block=block)
    got, wanted, _ = run(function, *args)
    compare(got, wanted, 2 * RELATIVE_ERROR[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
def test_sparse_attention_with_lengths_states_and_poison(dtype):
    q, k, v = random_qkv(3, 2, 2, 300, 520, 64, dtype)
    counts, indices = block_lists(3, 2, 3, 5, dtype=torch.int16)
    counts[0, 0, 0] = 0
    kv_len = torch.tensor([520, 200, 0], dtype=torch.int32)
    for b, length in enumerate(kv_len):
        k[b, :, length:], v[b, :, length:] = float("nan"), float("nan")
    state_o, state_lse = torch.randn(3, 2, 300, 64), torch.randn(3, 2, 300)
    state_lse[:, 0, :140], state_o[:, 0, :140] = float("-inf"), float("nan")
    for state in ((None, None), (state_o.to(dtype), state_lse)):
        function, args = attend(q, k, v, (counts, indices), kv_len=kv_len, state=state)
        got, wanted, _ = run(function, *args)
        compare(got, wanted, 2 * RELATIVE_ERROR[dtype])


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("per", ("token", "block"))
def test_sparse_attention_of_codes(code, per):
    q, k, v = (x.mul(40).clamp(-120, 120).to(code) for x in random_qkv(1, 4, 2, 600, 700, 128, torch.float32))
    q_scale, k_scale = torch.rand(1, 4, 600) * 0.01, torch.rand(1, 2, 700) * 0.01
    if per == "block":
        q_scale, k_scale = q_scale[..., :5].contiguous(), k_scale[..., :6].contiguous()
    lists = block_lists(1, 1, 5, 6, least=1)
    function, args = attend(q, k, v, lists, scales=(q_scale, k_scale, torch.rand(1, 2, 128)), dtype=bf16)
    got, wanted, _ = run(function, *args)
    compare(got[:1], wanted[:1], FP8_WEIGHTS_ERROR)
    compare(got[1:], wanted[1:], 1e-3)


@pytest.mark.parametrize("dynamic", (False, True))
def test_sparse_step_of_strided_heads_is_one_kernel(dynamic):
    def function(q, k, v, counts, indices, residual):
        q, k, v = (x.unflatten(2, (4, 64)).transpose(1, 2) for x in (q, k, v))
        o = quantsparse.sparse_attention(
            q, k, v, None, None, None, counts, indices, None, None, None, 0.1, 128, q.dtype
        )[0]
        return (quantsparse.add_residual(o, residual, None, None, None, None).transpose(1, 2).flatten(2),)

    q, k, v = (torch.randn(1, 1000, 256).to(bf16) for _ in "qkv")
    args = q, k, v, *block_lists(1, 4, 8, 8), torch.randn(1, 4, 1000, 64).to(bf16)
    got, wanted, code = run(function, *args, dynamic=dynamic)
    assert code.count(".run(") == 1 and library_calls(code) == []
    compare(got, wanted)


def test_what_has_no_kernel_runs_its_reference_and_says_so():
    def function(q, k, v):
        counts, indices = quantsparse.select_blocks(quantsparse.block_scores(q, k, None, 0.1, 128), None, 2)
        shared = q, k, v, None, None, None, counts, indices, None
        refresh = quantsparse.refresh_attention(*shared, None, "complement", 0.1, 128, torch.float32)
        o, lse = quantsparse.sparse_attention(*shared, refresh[2], refresh[3], 0.1, 128, torch.float32)
        left, right = quantsparse.low_rank(refresh[2], 4)
        return *refresh, o, lse, left @ right

    names = ("refresh_attention", "sparse_attention")
    got, wanted, _ = run(function, *random_qkv(1, 2, 2, 300, 520, 320, torch.float32), fallbacks=names)
    compare(got, wanted, 1e-3)
    compare(got[5:6], got[:1], 1e-3)  # resumed from the complement, the sparse output is the dense one


def test_templates_replay_in_a_cuda_graph():
    def function(x, wq, ws, q, counts, indices):
        y = quantsparse.linear(*quantsparse.quantize_rows(x, None, None, "int8"), wq, ws, None, bf16)
        o = quantsparse.sparse_attention(q, q, q, None, None, None, counts, indices, None, None, None, 0.1, 128, bf16)
        return y, *o

    args = torch.randn(300, 256), torch.randint(-127, 128, (128, 256), dtype=torch.int8), torch.rand(128) * 1e-3
    args = *args, torch.randn(1, 2, 300, 64).to(bf16), *block_lists(1, 2, 3, 3)
    device_args = [to_cuda(a) for a in args]
    replayed = torch.compile(function, options={"triton.cudagraphs": True, "fx_graph_cache": False})
    for _ in range(4):
        compare([t.cpu() for t in replayed(*device_args)], function(*args), 2 * RELATIVE_ERROR[bf16])
