import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qs_compiler.ops.library import OpInputError
from qs_compiler.ops.linear import integer_product
from tests.tolerances import assert_close

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
linear = torch.ops.quantsparse.linear


def operands(rows, n, k, dtype=torch.int8):
    if dtype == torch.int8:
        xq, wq = (torch.randint(-127, 128, (m, k), dtype=dtype) for m in (rows, n))
    else:
        xq, wq = (torch.randn(m, k).mul(50).to(dtype) for m in (rows, n))
    return xq, (torch.rand(rows) + 0.1) * 0.01, wq, (torch.rand(n) + 0.1) * 0.01


@pytest.mark.parametrize("rows", (1, 63, 65, 127, 129, 257))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("code", (torch.int8, torch.float8_e4m3fn))
def test_scaled_product(rows, dtype, code):
    xq, xs, wq, ws = operands(rows, 33, 96, code)
    bias = torch.randn(33).to(dtype)
    wanted = (xq.double() @ wq.double().t()) * xs.double()[:, None] * ws + bias.double()
    assert_close(linear(xq, xs, wq, ws, bias, dtype), wanted)
    assert_close(linear(xq, xs, wq, ws, None, dtype), wanted - bias.double())


@pytest.mark.parametrize("k", (1023, 1024, 1025, 1040, 5000))
def test_integer_products_are_exact_at_any_depth(k):
    """All codes at their extreme: float32 sums over the whole of K would round from 2^24 on."""
    x = torch.full((3, k), 127, dtype=torch.int8)
    w = torch.full((2, k), -127, dtype=torch.int8)
    w[1, 0] = -126
    product = integer_product(x, w)
    assert product.dtype == torch.int32
    assert product[0].tolist() == [-127 * 127 * k, -127 * 127 * k + 127]
    x, w = (torch.randint(-128, 128, (m, k), dtype=torch.int8) for m in (5, 7))
    assert torch.equal(integer_product(x, w).long(), x.long() @ w.long().t())


def test_leading_dimensions_and_empty_batch():
    xq, xs, wq, ws = operands(12, 5, 16)
    flat = linear(xq, xs, wq, ws, None, torch.float32)
    assert torch.equal(linear(xq.view(3, 4, 16), xs.view(3, 4), wq, ws, None, torch.float32), flat.view(3, 4, 5))
    assert linear(xq[:0], xs[:0], wq, ws, None, torch.float32).shape == (0, 5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    xq, xs, wq, ws = operands(6, 8, 32)
    torch.library.opcheck(linear, (xq, xs, wq, ws, torch.randn(8), dtype))
    torch.library.opcheck(linear, (xq.view(2, 3, 32), xs.view(2, 3), wq, ws, None, dtype))


def test_flops():
    xq, xs, wq, ws = operands(12, 5, 16)
    with FlopCounterMode(display=False) as counter:
        linear(xq.view(3, 4, 16), xs.view(3, 4), wq, ws, None, torch.float32)
    assert counter.get_total_flops() == 2 * 12 * 5 * 16


def test_bad_input_is_named():
    xq, xs, wq, ws = operands(4, 8, 32)
    with pytest.raises(OpInputError, match=r"wq has shape \(8, 31\).*\(any, 32\)"):
        linear(xq, xs, wq[:, :31], ws, None, torch.float32)
    with pytest.raises(OpInputError, match=r"xq is torch\.int8 and wq is torch\.float8_e4m3fn"):
        linear(xq, xs, wq.to(torch.float8_e4m3fn), ws, None, torch.float32)
    with pytest.raises(OpInputError, match=r"xs has shape \(3,\)"):
        linear(xq, xs[:3], wq, ws, None, torch.float32)
    with pytest.raises(OpInputError, match=r"bias has shape \(7,\)"):
        linear(xq, xs, wq, ws, torch.randn(7), torch.float32)
    with pytest.raises(OpInputError, match="dtype is int8"):
        linear(xq, xs, wq, ws, None, torch.int8)
