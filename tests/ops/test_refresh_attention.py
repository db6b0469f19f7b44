import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qs_compiler.ops import refresh_attention as module
from qs_compiler.ops.library import OpInputError
from tests.ops.attention_cases import BLOCK, attention, block_lists, dense_mask, random_qkv
from tests.ops.test_sparse_attention import LargestTensor, blocks
from tests.tolerances import assert_close

refresh_attention = torch.ops.quantsparse.refresh_attention
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def call(q, k, v, lists, correction, *, scales=(None, None, None), kv_len=None, lse_prev=None, dtype=None):
    return refresh_attention(q, k, v, *scales, *lists, kv_len, lse_prev, correction, 0.2, BLOCK, dtype or q.dtype)


def naive_mass(weights, tokens, keys):
    """Mean over a block's rows of the mass on each key block, by loops. Rows of `weights` need not sum to 1."""
    mass = torch.zeros(*weights.shape[:2], blocks(tokens), blocks(keys), dtype=torch.float64)
    for i in range(blocks(tokens)):
        for j in range(blocks(keys)):
            tile = weights[:, :, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            mass[:, :, i, j] = tile.sum(-1).mean(-1)
    return mass


@pytest.mark.parametrize("tokens", (1, 63, 65, 127, 129, 257))
@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_output_corrections_and_mass(tokens, dtype):
    keys = tokens + 17
    q, k, v = random_qkv(2, 4, 2, tokens, keys, 24, dtype)
    lists = block_lists(2, 4, blocks(tokens), blocks(keys), complete=True)
    mask = dense_mask(*lists, 2, 4, tokens, keys)
    dense_o, dense_lse, weights = attention(q, k, v, torch.ones_like(mask), 0.2)
    kept_o, kept_lse, _ = attention(q, k, v, mask, 0.2)
    dropped_o, dropped_lse, _ = attention(q, k, v, ~mask, 0.2)
    wanted = {"residual": (dense_o - kept_o, kept_lse), "complement": (dropped_o, dropped_lse)}
    for correction, (fix_o, fix_lse) in wanted.items():
        o, lse, got_o, got_lse, mass = call(q, k, v, lists, correction)
        assert_close(o, dense_o)
        assert_close(lse, dense_lse, 1e-5)
        # Where a row keeps all blocks the residual is a difference of equals: measure it against the output.
        assert (got_o.double() - fix_o).norm() <= 0.01 * dense_o.norm()
        assert_close(got_lse, fix_lse, 1e-5)
        assert_close(mass, naive_mass(weights, tokens, keys))
        torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:3]))


@pytest.mark.parametrize("correction", module.CORRECTIONS)
def test_mass_is_estimated_by_the_log_sum_exps_of_an_earlier_step(correction):
    tokens, keys = 70, 100
    q, k, v = random_qkv(2, 4, 2, tokens, keys, 24, torch.float32)
    kv_len = torch.tensor([90, 0], dtype=torch.int32)
    lists = block_lists(2, 4, blocks(tokens), blocks(keys), complete=True)
    mask = (torch.arange(keys) < kv_len[:, None])[:, None, None].expand(2, 4, tokens, keys)
    _, lse, weights = attention(q, k, v, mask, 0.2)
    exact = call(q, k, v, lists, correction, kv_len=kv_len)
    same = call(q, k, v, lists, correction, kv_len=kv_len, lse_prev=exact[1])
    assert_close(same[4], exact[4])

    moved = lse + torch.randn(lse.shape, generator=torch.Generator().manual_seed(1))
    for row, nothing in enumerate((float("-inf"), float("inf"), float("nan"))):
        moved[0, :, row] = nothing  # rows without an earlier step
    moved[0, 1, BLOCK : 2 * BLOCK] = float("-inf")  # a whole block of them
    counts = torch.where(torch.isfinite(moved), torch.exp(lse - moved), 0)
    wanted = naive_mass(weights * counts[..., None], tokens, keys)
    total = wanted.sum(-1, keepdim=True)
    wanted = torch.where(total > 0, wanted / total, 0)
    assert (wanted[0, 1, 1] == 0).all() and (wanted[1] == 0).all() and (wanted[0, 0].sum(-1) > 0.99).all()
    got = call(q, k, v, lists, correction, kv_len=kv_len, lse_prev=moved.float())
    assert_close(got[4], wanted)
    assert (got[4] - exact[4]).abs().max() > 1e-2
    for one, other in zip(got[:4], exact[:4], strict=True):
        assert torch.equal(one, other), "nothing else depends on lse_prev"


@pytest.mark.parametrize("change", (-1e30, -300.0, 300.0, 1e30))
def test_estimated_mass_is_finite_wherever_the_earlier_step_was(change):
    q, k, v = random_qkv(1, 1, 1, 64, 96, 16, torch.float32)
    lists = block_lists(1, 1, 2, 3, complete=True)
    lse = call(q, k, v, lists, "residual")[1]
    mass = call(q, k, v, lists, "residual", lse_prev=lse + change)[4]
    assert torch.isfinite(mass).all()
    assert_close(mass.sum(-1), torch.full((1, 1, 2), 0.0 if change > 0 else 1.0))


def test_corrections_make_a_sparse_step_dense():
    """What a refresh leaves behind restores the dense output while nothing moves."""
    q, k, v = random_qkv(1, 2, 1, 100, 129, 16, torch.float32)
    lists = block_lists(1, 2, 4, 5, complete=True)
    sparse = (q, k, v, None, None, None, *lists, None)
    o, lse, residual, _, _ = call(q, k, v, lists, "residual")
    sparse_o, _ = torch.ops.quantsparse.sparse_attention(*sparse, None, None, 0.2, BLOCK, torch.float32)
    assert_close(torch.ops.quantsparse.add_residual(sparse_o, residual, None, None, None, None), o)
    _, _, state_o, state_lse, _ = call(q, k, v, lists, "complement")
    resumed = torch.ops.quantsparse.sparse_attention(*sparse, state_o, state_lse, 0.2, BLOCK, torch.float32)
    assert_close(resumed[0], o)
    assert_close(resumed[1], lse)


def test_a_part_of_vanishing_mass_keeps_its_log_sum_exp():
    q, k, v = random_qkv(1, 1, 1, 64, 64, 16, torch.float32)
    k[:, :, 32:] = k[:, :, 32:] * 0 + q.mean(2, keepdim=True) * 0 - 1
    q = q.abs() * 100  # block 1 scores far below block 0
    lists = torch.tensor([[[1, 1]]], dtype=torch.int32), torch.tensor([[[[1, 0], [1, 0]]]], dtype=torch.int32)
    _, _, _, kept_lse, mass = call(q, k, v, lists, "residual")
    wanted = attention(q, k, v, dense_mask(*lists, 1, 1, 64, 64), 0.2)[1]
    assert_close(kept_lse, wanted)
    assert torch.isfinite(mass).all()


def test_masked_keys_are_never_read_and_rows_without_keys_are_zero():
    q, k, v = random_qkv(2, 2, 2, 70, 100, 16, torch.float32)
    kv_len = torch.tensor([40, 0], dtype=torch.int32)
    lists = block_lists(2, 2, 3, 4, complete=True)
    mask = (torch.arange(100) < kv_len[:, None])[:, None, None].expand(2, 2, 70, 100)
    dense_o, dense_lse, weights = attention(q, k, v, mask, 0.2)
    for b, length in enumerate(kv_len):
        k[b, :, length:], v[b, :, length:] = float("nan"), float("nan")
    o, lse, fix_o, _, mass = call(q, k, v, lists, "complement", kv_len=kv_len)
    assert_close(o, dense_o)
    assert_close(lse, dense_lse)
    assert_close(mass, naive_mass(weights, 70, 100))
    assert (o[1] == 0).all() and (fix_o[1] == 0).all() and (mass[1] == 0).all()


def test_codes_with_scales_equal_their_values():
    q, k, v = (x.mul(20).clamp(-120, 120).to(torch.int8) for x in random_qkv(1, 2, 1, 70, 64, 16, torch.float32))
    scales = torch.rand(1, 2, 70) * 0.02, torch.rand(1, 1, 2) * 0.02, torch.rand(1, 1, 16)
    lists = block_lists(1, 2, 3, 2, complete=True)
    wide_k = scales[1].repeat_interleave(BLOCK, -1)
    values = q * scales[0][..., None], k * wide_k[..., None], v * scales[2][:, :, None]
    coded = call(q, k, v, lists, "residual", scales=scales, dtype=torch.float32)
    for got, wanted in zip(coded, call(*values, lists, "residual"), strict=True):
        assert_close(got, wanted)


def test_nothing_is_tokens_by_keys():
    q, k, v = random_qkv(1, 2, 1, 4096, 4096, 16, torch.float32)
    lists = block_lists(1, 2, blocks(4096), blocks(4096), counts=32, complete=True)
    with LargestTensor() as largest:
        module.reference(q, k, v, None, None, None, *lists, None, None, "residual", 0.2, BLOCK, torch.float32)
    assert largest.elements < 4096 * 4096 // 8


@pytest.mark.parametrize("correction", module.CORRECTIONS)
def test_opcheck(correction):
    q, k, v = random_qkv(1, 2, 1, 65, 40, 16, torch.float32)
    lists = block_lists(1, 2, 3, 2, complete=True)
    kv_len = torch.tensor([33], dtype=torch.int32)
    args = (q, k, v, None, None, None, *lists, kv_len, torch.zeros(1, 2, 65), correction, 0.2, BLOCK, torch.bfloat16)
    torch.library.opcheck(refresh_attention, args)


def test_flops_and_bad_input():
    q, k, v = random_qkv(1, 2, 1, 65, 40, 16, torch.float32)
    lists = block_lists(1, 2, 3, 2, complete=True)
    with FlopCounterMode(display=False) as counter:
        call(q, k, v, lists, "residual")
    assert counter.get_total_flops() == 4 * 2 * 65 * 40 * 16
    with pytest.raises(OpInputError, match="correction 'second' is not known"):
        call(q, k, v, lists, "second")
    with pytest.raises(OpInputError, match="a row of kv_indices is not the kept key blocks ascending"):
        call(q, k, v, (lists[0], lists[1].flip(-1)), "residual")
    with pytest.raises(OpInputError, match=r"lse_prev has shape \(1, 2, 64\)"):
        call(q, k, v, lists, "residual", lse_prev=torch.zeros(1, 2, 64))
