"""The CUDA lowering of quantsparse::low_rank, without a GPU."""

import pytest
import torch

from qs_compiler.lowering import collect_fallbacks
from tests.fake_h100 import SHARED_MEMORY, cuda_code
from tests.kernel_text import compile_offline, kernel_sources
from tests.lowering.compiled import library_calls
from tests.lowering.interpret import interpret
from tests.tolerances import RELATIVE_ERROR, assert_close

quantsparse = torch.ops.quantsparse
CALLS = ["torch.ops.aten._linalg_eigh.default", "extern_kernels.bmm"]


def factors(rank):
    def function(delta):
        return quantsparse.low_rank(delta, rank)

    return function


def check(cases, folder, dynamic=()):
    """Interpret the generated code of [(rank, delta)]: signs of singular vectors are free, so compare the products."""
    texts = []
    for rank, delta in cases:
        with collect_fallbacks() as fallbacks:
            texts.append(cuda_code(factors(rank), delta))
        assert fallbacks == [] and library_calls(texts[-1]) == CALLS
    results = interpret([(text, [delta]) for text, (_, delta) in zip(texts, cases, strict=True)], folder)
    for (rank, delta), got in zip(cases, results, strict=True):
        compare(got, factors(rank)(delta))


def compare(got, wanted):
    (left, right), (wanted_left, wanted_right) = got, wanted
    assert (left.dtype, right.dtype, left.shape, right.shape) == (
        *(wanted_left.dtype, wanted_right.dtype),
        *(wanted_left.shape, wanted_right.shape),
    )
    # The Gram matrix squares what its sum rounds; a 16-bit projection also starts from rounded vectors.
    tolerance = 1e-4 if left.dtype == torch.float32 else RELATIVE_ERROR[left.dtype]
    assert_close(left.double() @ right.double(), wanted_left.double() @ wanted_right.double(), tolerance)
    norms = left.float().norm(dim=2)
    assert (norms[..., :-1] >= norms[..., 1:] * (1 - tolerance)).all()


def residual(*shape, dtype):
    """A residual whose singular values fall apart, so that its best approximation is one."""
    return (torch.randn(shape) * torch.logspace(0, -2, shape[-1])).to(dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_odd_sizes_and_head_widths(dtype, tmp_path):
    shapes = (1, 2, 5, 8), (2, 2, 150, 16), (1, 1, 333, 40), (1, 1, 140, 160)
    cases = [(rank, residual(*shape, dtype=dtype)) for shape, rank in zip(shapes, (1, 4, 16, 4), strict=True)]
    strided = residual(2, 130, 3, 16, dtype=dtype).transpose(1, 2)
    check([*cases, (16, strided)], tmp_path)


def test_tokens_may_be_symbolic(tmp_path):
    given = [residual(1, 2, n, 16, dtype=torch.float32) for n in (640, 65)]
    text = cuda_code(factors(4), given[0], dynamic=(640,))
    for delta, got in zip(given, interpret([(text, [d]) for d in given], tmp_path), strict=True):
        compare(got, factors(4)(delta))


def test_a_residual_of_zeros_has_finite_factors(tmp_path):
    delta = torch.zeros(1, 2, 40, 16)
    left, right = interpret([(cuda_code(factors(4), delta), [delta])], tmp_path)[0]
    assert (left == 0).all() and torch.isfinite(right).all()


def test_delta_is_read_in_its_own_dtype():
    """No float32 copy of it: the largest buffer is the sum's parts."""
    with torch.device("meta"):
        delta = torch.empty(1, 24, 119056, 128, dtype=torch.bfloat16)
    text = cuda_code(factors(16), delta)
    buffers = [line for line in text.splitlines() if "= empty_strided_cuda" in line]
    assert [b for b in buffers if "119056" in b and "(24, 119056, 16)" not in b] == []
    assert any("(11, 24, 128, 128)" in b for b in buffers), buffers  # 2 programs for each of 132 multiprocessors


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("depth", (40, 128, 256))
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_sum_compiles_and_fits(capability, depth, dtype, tmp_path):
    with torch.device("meta"):
        delta = torch.empty(1, 4, 4096, depth, dtype=dtype)
    source = kernel_sources(cuda_code(factors(16), delta, capability=capability))["triton_tem_fused_0"]
    compiled = compile_offline(source, tmp_path, capability)
    assert compiled.shared_memory <= SHARED_MEMORY[capability]
    if dtype == torch.bfloat16:
        assert compiled.spilled_bytes == 0
        assert {(9, 0): "wgmma", (10, 0): "tcgen05"}.get(capability, "mma.sync") in compiled.ptx
