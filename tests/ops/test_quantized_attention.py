"""Attention of 8-bit operands, made as the pass makes them, beside float64 attention of what they were made of."""

import pytest
import torch

from qs_compiler.options import ATTENTIONS
from qs_compiler.passes.quantize_attention import quantize_queries
from tests.ops.attention_cases import attention, biased_qkv, block_lists, dense_mask

quantsparse = torch.ops.quantsparse
BLOCK, TOKENS, KEPT = 128, 777, 700
BLOCKS = -(-TOKENS // BLOCK)
# The scores of these keys deviate by 1.1 to 1.2, and weights are off by what scores are off. int8 codes of a row err by
# 1 % of the row's deviation, those of a block's keys too, so scores by 0.02. float8 values err by 2.6 %, which the
# output does too. float8 q and k err by 2.6 % each, so scores by 0.045; a cosine is 1 - error^2 / 2, here doubled.
LEAST_COSINE = {"int8": 0.9995, "int8-fp8": 0.999, "fp8": 0.997}
kinds = pytest.mark.parametrize("kind", LEAST_COSINE)


def operands(kind, q, k, v, kv_len):
    """Codes, or v as it is, and their scales."""
    formats = ATTENTIONS[kind]
    k, k_scale, smooth = quantsparse.quantize_keys(k, kv_len, BLOCK, formats.qk)
    q, q_scale = quantize_queries(q, smooth, formats.qk)
    v, v_scale = (v, None) if formats.v is None else quantsparse.pack_values(v, kv_len)
    return q, k, v, q_scale, k_scale, v_scale


def cosine(x, y):
    return torch.nn.functional.cosine_similarity(x.double().flatten(), y.double().flatten(), 0)


def test_every_form_has_a_bound():
    assert set(LEAST_COSINE) == set(ATTENTIONS) - {"16bit"}


@kinds
@pytest.mark.parametrize("depth", (64, 128))
@pytest.mark.parametrize("gain", (1, 3))
def test_outputs_and_corrections_stay_near_those_of_float64(kind, depth, gain):
    """Keys and values past kv_len are NaN. Scores that are `gain` times as large are off by as many times as much."""
    q, k, v = biased_qkv(4, TOKENS, depth)
    q, apart = gain * q, gain**2 * (1 - LEAST_COSINE[kind])
    k, v, kv_len = k[:, :2].contiguous(), v[:, :2].contiguous(), torch.tensor([KEPT])
    lists = block_lists(1, 4, BLOCKS, BLOCKS, least=1, complete=True)
    counts = (torch.arange(TOKENS) < KEPT).expand(1, 4, TOKENS, TOKENS)
    kept = dense_mask(*lists, 1, 4, TOKENS, TOKENS, BLOCK)
    wanted, sparse, dropped = (attention(q, k, v, mask & counts, depth**-0.5)[0] for mask in (counts, kept, ~kept))
    k[:, :, KEPT:], v[:, :, KEPT:] = float("nan"), float("nan")
    shared = *operands(kind, q, k, v, kv_len), *lists, kv_len
    options = depth**-0.5, BLOCK, torch.float32
    o, _ = quantsparse.sparse_attention(*shared, None, None, *options)
    assert 0 < 1 - cosine(o, sparse) <= apart
    for correction in ("residual", "complement"):
        o, _, fix, _, mass = quantsparse.refresh_attention(*shared, None, correction, *options)
        assert 0 < 1 - cosine(o, wanted) <= apart
        exact = wanted - sparse if correction == "residual" else dropped
        assert (fix - exact).norm() <= 2 * (2 * apart) ** 0.5 * wanted.norm()  # of two outputs
        torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:3]))


@kinds
def test_opcheck(kind):
    q, k, v = biased_qkv(2, 140, 32)
    kv_len = torch.tensor([130])
    shared = *operands(kind, q, k[:, :1], v[:, :1], kv_len), *block_lists(1, 2, 2, 2, complete=True), kv_len
    options = 0.2, BLOCK, torch.bfloat16
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if shared[0].dtype != torch.float8_e4m3fn:  # torch multiplies the arguments to see whether they change
        checks.append("test_schema")
    for op, args in (
        (quantsparse.sparse_attention, (*shared, None, None, *options)),
        (quantsparse.refresh_attention, (*shared, None, "residual", *options)),
    ):
        torch.library.opcheck(op, args, test_utils=checks)
