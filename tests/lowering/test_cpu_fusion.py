"""On a CPU: what is meant to be one kernel is one, in the generated code, and the numbers are the reference's."""

import torch
from torch.nn.functional import gelu, layer_norm

from qs_compiler.lowering import collect_fallbacks
from tests.lowering.compiled import compiled, kernels, library_calls
from tests.tolerances import assert_close

quantsparse = torch.ops.quantsparse
bf16 = torch.bfloat16


def test_layer_norm_modulate_quantize_is_one_kernel():
    def function(x, shift, scale):
        h = layer_norm(x.float(), (x.shape[-1],)) * (1 + scale) + shift
        return quantsparse.quantize_rows(h.to(x.dtype).float(), None, None, "int8")

    args = torch.randn(2, 65, 96, dtype=bf16), torch.randn(96), torch.randn(96)
    (codes, scales), code = compiled(function, *args)
    assert len(kernels(code)) == 1 and library_calls(code) == []
    wanted, wanted_scales = function(*args)
    assert codes.dtype == torch.int8
    # The fused kernel does not round the modulated rows to bf16 before it quantises them.
    assert_close(codes * scales[..., None], wanted * wanted_scales[..., None], 8e-3)


def test_dequantise_bias_gelu_gate_residual_is_one_kernel():
    def function(xq, xs, wq, ws, bias, gate, residual):
        return residual + gate * gelu(quantsparse.linear(xq, xs, wq, ws, bias, bf16), approximate="tanh")

    for depth in (160, 2500):
        xq, wq = (torch.randint(-127, 128, (rows, depth), dtype=torch.int8) for rows in (65, 33))
        args = xq, torch.rand(65) * 1e-4, wq, torch.rand(33), *(torch.randn(33, dtype=bf16) for _ in range(2))
        args = *args, torch.randn(65, 33, dtype=bf16)
        with collect_fallbacks() as fallbacks:
            result, code = compiled(function, *args)
        widen, epilogue = kernels(code)  # one kernel before the product, one after it
        assert "gelu" in epilogue and "gelu" not in widen
        assert library_calls(code) == ["extern_kernels.mm"] * (1 if depth == 160 else 3)
        assert fallbacks == []
        assert_close(result, function(*args))


def test_quantise_and_two_linears_share_one_quantiser():
    def function(x, *weights):
        xq, xs = quantsparse.quantize_rows(x, None, None, "int8")
        return [
            quantsparse.linear(xq, xs, wq, ws, None, bf16) for wq, ws in zip(weights[::2], weights[1::2], strict=True)
        ]

    weights = [torch.randint(-127, 128, (16, 64), dtype=torch.int8), torch.rand(16)] * 2
    args = torch.randn(7, 64), *(w.clone() for w in weights)
    results, code = compiled(function, *args)
    assert code.count(".round()") == 1
    for got, wanted in zip(results, function(*args), strict=True):
        assert_close(got, wanted)


def test_exactness_beyond_2_to_the_24():
    """A float32 accumulator over the whole depth would round these sums."""

    def function(xq, wq):
        ones = torch.ones(xq.shape[0]), torch.ones(wq.shape[0])
        return quantsparse.linear(xq, ones[0], wq, ones[1], None, torch.float32)

    xq = torch.full((3, 4101), 127, dtype=torch.int8)
    wq = torch.full((2, 4101), 127, dtype=torch.int8)
    wq[0, 0], xq[0, 1:1500] = 126, -127
    result, _ = compiled(function, xq, wq)
    exact = xq.long() @ wq.long().t()
    assert exact.abs().max() > 2**24 and (exact % 2 == 1).any()
    assert torch.equal(result, exact.float())


def test_dynamic_rows_compile_once():
    def function(x, wq, ws):
        xq, xs = quantsparse.quantize_rows(x, None, None, "int8")
        return quantsparse.linear(xq, xs, wq, ws, None, torch.float32)

    wq, ws = torch.randint(-127, 128, (16, 2500), dtype=torch.int8), torch.rand(16)
    x = torch.randn(63, 2500)
    torch._dynamo.mark_dynamic(x, 0)
    result, code = compiled(function, x, wq, ws, dynamic=None)
    assert "s" in code.split("args.clear()")[1].split("\n")[1]
    assert_close(result, function(x, wq, ws))
