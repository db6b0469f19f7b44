"""The CUDA lowering of quantsparse::linear, without a GPU: generated text, offline compilation, interpreted numbers."""

from unittest import mock

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from qs_compiler._compat import select_algorithm
from qs_compiler.lowering import collect_fallbacks, linear_choices
from tests.fake_h100 import DEVICE_SHARED_MEMORY, SHARED_MEMORY, cuda_code
from tests.kernel_text import check_specialized_warps, compile_offline, kernel_sources
from tests.lowering.compiled import EPILOGUES, gate_joins_product, library_calls
from tests.lowering.interpret import interpret
from tests.tolerances import TANH_GELU_ERROR, assert_close

quantsparse = torch.ops.quantsparse
fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def operands(rows, columns, depth, code=torch.int8):
    xq, wq = (torch.randint(-127, 128, (n, depth), dtype=torch.int8).to(code) for n in (rows, columns))
    return xq, torch.rand(rows) * 1e-3, wq, torch.rand(columns)


@pytest.mark.parametrize("code", (torch.int8, fp8))
def test_numbers_over_odd_shapes(code, tmp_path):
    """Rows around the tile, a depth that TMA takes (96) and one that it does not (100), every dtype, with bias and
    without. int8 is bit-exact."""
    cases, wanted = [], []
    for i, rows in enumerate((1, 63, 65, 127, 129, 257)):
        dtype, depth = FLOATS[i % 3], (96, 100)[i // 3]
        bias = torch.randn(33).to(dtype) if i % 2 else None
        args = (*operands(rows, 33, depth, code), bias)

        def function(*args, dtype=dtype):
            return (quantsparse.linear(*args, dtype),)

        text = cuda_code(function, *args)
        assert list(kernel_sources(text)) == ["triton_tem_fused_0"]
        assert f"TMA : tl.constexpr = {depth == 96}" in text
        cases.append((text, args))
        wanted += function(*args)
    for (got,), expected in zip(interpret(cases, tmp_path), wanted, strict=True):
        assert got.dtype == expected.dtype
        if code == torch.int8:
            assert torch.equal(got, expected)
        else:
            assert_close(got, expected)


def block(x, shift, scale, wq, ws, bias, gate, residual):
    h = layer_norm(x.float(), (x.shape[-1],)) * (1 + scale) + shift
    xq, xs = quantsparse.quantize_rows(h.to(x.dtype), None, None, "int8")
    return (residual + gate * gelu(quantsparse.linear(xq, xs, wq, ws, bias, x.dtype), approximate="tanh"),)


def block_operands(tokens=65, width=96, columns=64, batch=1):
    wq = torch.randint(-127, 128, (columns, width), dtype=torch.int8)
    rows = [torch.randn(n).to(bf16) for n in (width, width, columns, columns)]
    x, residual = torch.randn(batch, tokens, width).to(bf16), torch.randn(batch, tokens, columns).to(bf16)
    return x, *rows[:2], wq, torch.rand(columns) * 0.01, *rows[2:], residual


@pytest.mark.parametrize("batch", (1, 2))
def test_two_kernels_from_layer_norm_to_residual(batch, tmp_path):
    """Norm, modulation and quantiser are one kernel; product, scales, bias, GELU, gate and residual are the other."""
    args = block_operands(batch=batch)
    with collect_fallbacks() as fallbacks:
        text = cuda_code(block, *args)
    sources = list(kernel_sources(text).values())
    assert (len(sources) == 2) == gate_joins_product(batch)
    assert "rsqrt" in sources[0] and "nearbyint" in sources[0]
    if gate_joins_product(batch):
        assert "code_product" in sources[1] and "tanh" in sources[1]
    assert library_calls(text) == [] and fallbacks == []
    [got] = interpret([(text, args)], tmp_path)[0]
    # bf16 rounding between norm and quantiser may differ; one code is 1/127 of the row's largest value
    assert_close(got, block(*args)[0])


def test_rows_may_be_symbolic(tmp_path):
    """One source text serves every number of rows."""
    short, long = block_operands(tokens=65), block_operands(tokens=129)
    text = cuda_code(block, *short, dynamic=(65,))
    assert len(kernel_sources(text)) == 2
    for args, [got] in zip((short, long), interpret([(text, short), (text, long)], tmp_path), strict=True):
        assert_close(got, block(*args)[0])


B200 = (10, 0)
TARGETS = [(code, target) for code in (torch.int8, fp8) for target in SHARED_MEMORY if code != fp8 or target > (8, 0)]
CASES = [(*target, rows) for target in TARGETS for rows in (1, 512, 40_000)]
CASES += [(code, B200, 40_000) for code in (torch.int8, fp8)]


@pytest.mark.parametrize("epilogue", ("gelu", "gate and residual"))
@pytest.mark.parametrize(("code", "capability", "rows"), CASES)
def test_every_tile_compiles_and_fits(rows, capability, code, epilogue, tmp_path):
    """Tensor cores are used, nothing spills, shared memory suffices."""

    def function(xq, xs, wq, ws, bias, gate, residual):
        return (EPILOGUES[epilogue](quantsparse.linear(xq, xs, wq, ws, bias, bf16), gate, residual),)

    with torch.device("meta"):
        xq, wq, residual = (
            torch.empty(s, dtype=d) for s, d in (((rows, 1024), code), ((3072, 1024), code), ((rows, 3072), bf16))
        )
        bias = gate = torch.empty(3072, dtype=bf16)
        args = xq, torch.empty(rows), wq, torch.empty(3072), bias, gate, residual
    [source] = kernel_sources(cuda_code(function, *args, capability=capability)).values()
    compiled = compile_offline(source, tmp_path, capability)
    # Triton has no int8 for the tensor cores of compute capability 10: those of before
    core = {(9, 0): "wgmma", B200: "mma.sync" if code == torch.int8 else "tcgen05.mma"}.get(capability, "mma.sync")
    assert core in compiled.ptx
    assert ("cp.async.bulk" in compiled.ptx) == (capability >= (9, 0))
    assert compiled.shared_memory <= DEVICE_SHARED_MEMORY[capability]
    specialized = capability == (9, 0) and code == torch.int8 and rows == 40_000
    assert ("warp_specialize=SPECIALIZED" in source and "SPECIALIZED : tl.constexpr = True" in source) == specialized
    assert compiled.spilled_bytes <= (64 if specialized else 0)  # its multiplying warps keep a few addresses in memory
    if specialized:
        check_specialized(compiled)


def check_specialized(compiled):
    tile = linear_choices.SPECIALIZED
    check_specialized_warps(compiled, operands=tile.stages * (tile.m + tile.n) * tile.k, stages=tile.stages)


@pytest.mark.parametrize("dtype", (bf16, torch.float32))
@pytest.mark.parametrize("after", EPILOGUES)
def test_whatever_follows_fits_into_shared_memory(after, dtype, tmp_path):
    """The specialised tile is one piece in the epilogue; float32 has the tile of halves."""

    def function(*args):
        y = EPILOGUES[after](quantsparse.linear(*args[:5], dtype), *args[5:])
        return y if isinstance(y, tuple) else (y,)

    args = shaped(40_000, 3072, 1024, torch.int8)
    with torch.device("meta"):
        args = *args, torch.empty(3072, dtype=bf16), torch.empty(40_000, 3072, dtype=bf16)
    sources = [s for s in kernel_sources(cuda_code(function, *args)).values() if "code_product" in s]
    [compiled] = [compile_offline(source, tmp_path, (9, 0)) for source in sources]
    assert compiled.shared_memory <= DEVICE_SHARED_MEMORY[9, 0]
    if dtype == bf16:
        check_specialized(compiled)


def test_numbers_of_the_specialized_tile(tmp_path):
    def function(*args):
        return (quantsparse.linear(*args, bf16),)

    args = *operands(2051, 300, 192), torch.randn(300).to(bf16)
    text = cuda_code(function, *args)
    assert "SPECIALIZED : tl.constexpr = True" in text
    [[got]] = interpret([(text, args)], tmp_path)
    assert torch.equal(got, function(*args)[0])


def shaped(rows, columns, depth, code, out=bf16):
    with torch.device("meta"):
        xq, wq = torch.empty(rows, depth, dtype=code), torch.empty(columns, depth, dtype=code)
        return xq, torch.empty(rows), wq, torch.empty(columns), torch.empty(columns, dtype=out)


def test_the_library_is_called_where_the_table_says_so():
    """Only fp8 at measured shapes on the measured card, bf16 out, and where no epilogue would be lost."""

    def plain(*args):
        return (quantsparse.linear(*args, args[-1].dtype).view(1, -1, args[2].shape[0]),)

    def activated(*args):
        return (gelu(plain(*args)[0], approximate="tanh"),)

    for function, capability, args, library in (
        (plain, (9, 0), shaped(4096, 3072, 3072, fp8), True),
        (plain, (9, 0), shaped(32_760, 8960, 1536, fp8), True),
        (activated, (9, 0), shaped(4096, 3072, 3072, fp8), False),
        (plain, (9, 0), shaped(119_056, 3072, 3072, fp8), True),
        (plain, (9, 0), shaped(119_056, 12288, 3072, fp8), False),
        (plain, (9, 0), shaped(75_600, 5120, 5120, fp8), False),
        (plain, (9, 0), shaped(4096, 3072, 3072, torch.int8), False),
        (plain, (9, 0), shaped(4096, 3064, 3072, fp8), False),
        (plain, (9, 0), shaped(4096, 3072, 3072, fp8, torch.float16), False),
        (plain, (8, 9), shaped(4096, 3072, 3072, fp8), False),
    ):
        text = cuda_code(function, *args, capability=capability)
        assert library_calls(text) == ["extern_kernels.quantsparse_scaled_mm"] * library, (capability, args[0].shape)
        assert len(kernel_sources(text)) == (not library)


def test_max_autotune_searches_the_tiles_and_the_library():
    def function(*args):
        return (quantsparse.linear(*args, bf16),)

    seen = []

    def take_last(name, choices, nodes, layout, **_):
        seen.append([type(choice).__name__ for choice in choices])
        return choices[-1].output_node()

    with mock.patch.object(select_algorithm, "autotune_select_algorithm", take_last):
        for code in (fp8, torch.int8):
            args = shaped(119_056, 3072, 3072, code)
            assert len(kernel_sources(cuda_code(function, *args, config={"max_autotune": True}))) == 1
    library, tiles = ["ExternKernelCaller"], ["TritonTemplateCaller"] * len(linear_choices.SEARCH)
    assert seen == [library + tiles, [*tiles, "TritonTemplateCaller"]]  # int8 has the specialised tile too


def test_float8_falls_back_where_the_device_has_none():
    def function(x, wq, ws):
        return (quantsparse.linear(*quantsparse.quantize_rows(x, None, None, "fp8"), wq, ws, None, bf16),)

    args = torch.randn(8, 64), torch.zeros(16, 64, dtype=fp8), torch.rand(16)
    with collect_fallbacks() as fallbacks:
        text = cuda_code(function, *args, capability=(8, 0))
    assert [op for op, _ in fallbacks] == ["quantize_rows", "linear"]
    assert all("compute capability 8.9, this device has 8.0" in reason for _, reason in fallbacks)
    assert "torch.ops.quantsparse.linear.default" in library_calls(text)


def test_gelu_takes_the_hardware_tanh_behind_a_quantised_linear_alone(tmp_path):
    def function(xq, xs, wq, ws, x):
        y = quantsparse.linear(xq, xs, wq, ws, None, bf16).view(1, 65, 33)
        return gelu(y, approximate="tanh"), gelu(y), gelu(x, approximate="tanh")

    args = *operands(65, 33, 96), torch.randn(7, 7).to(bf16)
    text = cuda_code(function, *args)
    sources = kernel_sources(text).values()
    product = next(s for s in sources if "code_product" in s)
    other = next(s for s in sources if "libdevice.tanh" in s)
    assert product.count("tanh.approx.f32") == 1 and "libdevice.tanh" not in product
    assert "tanh.approx" not in other
    y = quantsparse.linear(*args[:4], None, bf16).view(1, 65, 33).double()
    exact = gelu(y, approximate="tanh")
    rounding = 2**-8 * exact.abs()
    got, _, plain = interpret([(text, args)], tmp_path)[0]
    error = (got.double() - exact).abs()
    assert (error <= TANH_GELU_ERROR * y.abs() + rounding + 1e-6).all() and (error > rounding + 1e-6).any()
    assert_close(plain, function(*args)[2])


def test_variance_is_a_mean_of_squares():
    """Welford's update divides at every element."""

    def function(x, weight, bias):
        return (layer_norm(x, (3072,), weight, bias),)

    with torch.device("meta"):
        args = torch.empty(40_000, 3072, dtype=bf16), torch.empty(3072, dtype=bf16), torch.empty(3072, dtype=bf16)
    [source] = kernel_sources(cuda_code(function, *args)).values()
    assert "welford" not in source and "rsqrt" in source
