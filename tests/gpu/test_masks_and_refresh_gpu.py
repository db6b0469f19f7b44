"""Refresh, mask and low-rank kernels, compiled and run on the device, against the references on the CPU."""

import pytest
import torch

from qs_compiler.lowering import refresh_attention
from tests.gpu.test_kernels_gpu import compare, run
from tests.lowering.compiled import compiled
from tests.ops.attention_cases import block_lists, random_qkv
from tests.tolerances import FP8_WEIGHTS_ERROR, RELATIVE_ERROR, assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
quantsparse = torch.ops.quantsparse
bf16 = torch.bfloat16


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def refresh(q, k, v, lists, correction, *, scales=(None, None, None), kv_len=None, dtype=None, outputs=5):
    def function(q, k, v, counts, indices, *rest):
        rest = iter(rest)
        given = [None if s is None else next(rest) for s in (*scales, kv_len)]
        return quantsparse.refresh_attention(
            q, k, v, *given[:3], counts, indices, given[3], None, correction, 0.1, 128, dtype or q.dtype
        )[:outputs]

    return function, (q, k, v, *lists, *(s for s in (*scales, kv_len) if s is not None))


def complete(batch, heads, tokens, keys):
    return block_lists(batch, heads, -(-tokens // 128), -(-keys // 128), complete=True)


def check(function, args, tolerance):
    got, wanted, _ = run(function, *args)
    compare(got[:2], wanted[:2], tolerance)
    assert (got[2].double() - wanted[2].double()).norm() <= 2 * tolerance * wanted[0].double().norm()
    compare(got[3:], wanted[3:], tolerance)


@pytest.mark.parametrize("dtype", (torch.float32, bf16))
@pytest.mark.parametrize("correction", ("residual", "complement"))
@pytest.mark.parametrize("tokens", (1, 63, 129, 1025))
def test_refresh(dtype, correction, tokens):
    depth = 64 if tokens == 129 else 128
    case = refresh(*random_qkv(1, 4, 2, tokens, 900, depth, dtype), complete(1, 4, tokens, 900), correction)
    check(*case, 2 * RELATIVE_ERROR[dtype] if dtype == bf16 else 1e-3)


def test_refresh_of_codes_and_packed_values():
    q, k, v = random_qkv(1, 4, 4, 1000, 1000, 128, bf16)
    (q, q_scale), (k, k_scale) = (quantsparse.quantize_rows(x, None, None, "int8") for x in (q, k))
    v, v_scale = quantsparse.pack_values(v)
    scales = q_scale, k_scale, v_scale
    check(*refresh(q, k, v, complete(1, 4, 1000, 1000), "residual", scales=scales, dtype=bf16), FP8_WEIGHTS_ERROR)


def test_refresh_does_not_read_past_the_length():
    q, k, v = random_qkv(2, 2, 2, 300, 520, 128, bf16)
    kv_len = torch.tensor([520, 200], dtype=torch.int32)
    k[1, :, 200:], v[1, :, 200:] = float("nan"), float("nan")
    check(*refresh(q, k, v, complete(2, 2, 300, 520), "complement", kv_len=kv_len), 2 * RELATIVE_ERROR[bf16])


@pytest.mark.parametrize("correction", ("residual", "complement"))
@pytest.mark.parametrize("tokens", (1, 129, 1025))
def test_refresh_in_two_launches(correction, tokens, monkeypatch):
    monkeypatch.setattr(refresh_attention, "LAUNCHES", 2)
    q, k, v = random_qkv(2, 4, 4, tokens, 900, 128, bf16)
    lists, kv_len = complete(2, 4, tokens, 900), torch.tensor([900, 200], dtype=torch.int32)
    check(*refresh(q, k, v, lists, correction, kv_len=kv_len, outputs=4), 2 * RELATIVE_ERROR[bf16])
    (q, q_scale), (k, k_scale) = (quantsparse.quantize_rows(x, None, None, "int8") for x in (q, k))
    v, v_scale = quantsparse.pack_values(v)
    options = {"scales": (q_scale, k_scale, v_scale), "kv_len": kv_len, "dtype": bf16, "outputs": 4}
    check(*refresh(q, k, v, lists, correction, **options), FP8_WEIGHTS_ERROR)


@pytest.mark.parametrize("drift", (0.0, 0.5))
@pytest.mark.parametrize("tokens", (65, 1000, 20_000))
def test_block_mass_estimated_in_one_pass(drift, tokens, monkeypatch):
    """Exact by the log-sum-exps of the step itself; off by about what moved them apart otherwise."""
    q, k, v = (x.cuda() for x in random_qkv(1, 2, 2, tokens, tokens, 128, bf16))
    lists = tuple(x.cuda() for x in complete(1, 2, tokens, tokens))

    def function(q, k, v, counts, indices, lse_prev):
        return quantsparse.refresh_attention(
            q, k, v, None, None, None, counts, indices, None, lse_prev, "residual", 0.1, 128, bf16
        )

    exact = compiled(function, q, k, v, *lists, None)[0]
    monkeypatch.setattr(refresh_attention, "LAUNCHES", 2)
    lse_prev = exact[1] + drift * torch.randn_like(exact[1])
    mass = compiled(function, q, k, v, *lists, lse_prev)[0][4]
    assert_close(mass.sum(-1), torch.ones_like(mass.sum(-1)), 1e-5)
    assert_close(mass, exact[4], 1e-3 if drift == 0 else 0.2)


@pytest.mark.parametrize("dtype", (torch.float32, bf16))
@pytest.mark.parametrize("tokens", (1, 127, 1000))
def test_block_scores(dtype, tokens):
    def function(q, k, kv_len):
        return (quantsparse.block_scores(q, k, kv_len, 0.1, 128),)

    q, k, _ = random_qkv(2, 4, 2, tokens, 700, 128, dtype)
    kv_len = torch.tensor([700, 300], dtype=torch.int32)
    got, wanted, _ = run(function, q, k, kv_len)
    assert_close(got[0], wanted[0], 1e-4)


@pytest.mark.parametrize("blocks", (1, 7, 930))
def test_select_blocks_is_exact(blocks):
    def function(scores, always):
        return *quantsparse.select_blocks(scores, always, budget), *quantsparse.select_blocks(scores, None, budget)

    budget = max(1, blocks // 4)
    scores = torch.rand(2, 3, blocks, blocks).mul(50).round()  # many ties
    got, wanted, _ = run(function, scores, torch.eye(blocks, dtype=torch.bool))
    for result, expected in zip(got, wanted, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", (torch.float32, bf16))
def test_low_rank(dtype):
    def function(delta):
        left, right = quantsparse.low_rank(delta, 16)
        return (left.float() @ right.float(),)

    delta = torch.randn(1, 4, 1000, 16) @ torch.randn(1, 4, 16, 128) + 0.1 * torch.randn(1, 4, 1000, 128)
    got, wanted, _ = run(function, delta.to(dtype))
    assert_close(got[0], wanted[0], 2e-2 if dtype == bf16 else 1e-3)
