import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from qs_compiler.ops.library import OpInputError
from qs_compiler.ops.sparse_attention import reference
from tests.ops.attention_cases import BLOCK, attention, block_lists, dense_mask, random_qkv
from tests.tolerances import assert_close

sparse_attention = torch.ops.quantsparse.sparse_attention
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def call(q, k, v, lists, *, scales=(None, None, None), kv_len=None, state=(None, None), scale=0.2, dtype=None):
    return sparse_attention(q, k, v, *scales, *lists, kv_len, *state, scale, BLOCK, dtype or q.dtype)


def blocks(n):
    return -(-n // BLOCK)


@pytest.mark.parametrize("tokens", (1, 63, 65, 127, 129, 257))
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_any_number_with_lists_of_any_length(tokens, dtype):
    keys = tokens + 17
    q, k, v = random_qkv(2, 4, 2, tokens, keys, 24, dtype)
    lists = block_lists(2, 4, blocks(tokens), blocks(keys))
    o, lse = call(q, k, v, lists)
    wanted_o, wanted_lse, _ = attention(q, k, v, dense_mask(*lists, 2, 4, tokens, keys), 0.2)
    assert o.dtype == dtype and lse.dtype == torch.float32
    assert_close(o, wanted_o)
    assert_close(lse, wanted_lse, 1e-5)


def test_rows_without_any_key_are_zero():
    q, k, v = random_qkv(1, 2, 2, 96, 96, 16, torch.float32)
    counts, indices = block_lists(1, 2, 3, 3, least=1)
    counts[0, 1, 1] = 0
    o, lse = call(q, k, v, (counts, indices))
    assert (o[0, 1, 32:64] == 0).all() and torch.isneginf(lse[0, 1, 32:64]).all()
    assert torch.isfinite(lse[0, 0]).all()


@pytest.mark.parametrize("list_batch", (1, 2))
@pytest.mark.parametrize("list_heads", (1, 4))
@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int16))
def test_lists_broadcast_over_batch_and_heads(list_batch, list_heads, index_dtype):
    q, k, v = random_qkv(2, 4, 1, 100, 80, 16, torch.float32)
    lists = block_lists(list_batch, list_heads, 4, 3, dtype=index_dtype)
    o, lse = call(q, k, v, lists)
    wanted_o, wanted_lse, _ = attention(q, k, v, dense_mask(*lists, 2, 4, 100, 80), 0.2)
    assert_close(o, wanted_o)
    assert_close(lse, wanted_lse)


def test_a_list_may_end_after_the_kept_blocks():
    q, k, v = random_qkv(1, 2, 2, 100, 150, 16, torch.float32)
    counts, indices = block_lists(1, 2, 4, 5, counts=2, dtype=torch.int16)
    for got, wanted in zip(call(q, k, v, (counts, indices[..., :2])), call(q, k, v, (counts, indices)), strict=True):
        assert torch.equal(got, wanted)


def test_what_lies_past_kv_len_is_never_read():
    q, k, v = random_qkv(3, 2, 2, 70, 129, 16, torch.float32)
    kv_len = torch.tensor([129, 40, 0], dtype=torch.int32)
    mask = dense_mask(*(lists := block_lists(3, 2, 3, 5, least=3)), 3, 2, 70, 129)
    mask &= (torch.arange(129) < kv_len[:, None])[:, None, None]
    clean_o, clean_lse, _ = attention(q, k, v, mask, 0.2)
    for b, length in enumerate(kv_len):
        k[b, :, length:], v[b, :, length:] = float("nan"), float("nan")
    o, lse = call(q, k, v, lists, kv_len=kv_len)
    assert_close(o, clean_o)
    assert_close(lse, clean_lse)
    assert (o[2] == 0).all() and torch.isneginf(lse[2]).all()


@pytest.mark.parametrize("per", ("token", "block"))
@pytest.mark.parametrize("code", (torch.int8, torch.float8_e4m3fn))
def test_codes_with_scales(per, code):
    q, k, v = (x * 20 for x in random_qkv(2, 4, 2, 70, 100, 16, torch.float32))
    q, k, v = (x.clamp(-120, 120).to(code) for x in (q, k, v))
    q_scale, k_scale = (torch.rand(2, 4, 70) * 0.02, torch.rand(2, 2, 100) * 0.02)
    if per == "block":
        q_scale, k_scale = q_scale[..., :3], k_scale[..., :4]
    v_scale = torch.rand(2, 2, 16)
    lists = block_lists(2, 4, 3, 4)
    wide_q = q_scale if per == "token" else q_scale.repeat_interleave(BLOCK, -1)[..., :70]
    wide_k = k_scale if per == "token" else k_scale.repeat_interleave(BLOCK, -1)[..., :100]
    wanted_o, wanted_lse, _ = attention(
        q.float() * wide_q[..., None],
        k.float() * wide_k[..., None],
        v.float() * v_scale[:, :, None],
        dense_mask(*lists, 2, 4, 70, 100),
        0.2,
    )
    o, lse = call(q, k, v, lists, scales=(q_scale, k_scale, v_scale), dtype=torch.float32)
    assert_close(o, wanted_o)
    assert_close(lse, wanted_lse)


def test_resuming_from_the_dropped_blocks_gives_dense_attention():
    q, k, v = random_qkv(1, 2, 2, 65, 97, 16, torch.float32)
    counts, indices = block_lists(1, 2, 3, 4)
    mask = dense_mask(counts, indices, 1, 2, 65, 97)
    dropped_o, dropped_lse, _ = attention(q, k, v, ~mask, 0.2)
    dropped_o[torch.isneginf(dropped_lse)] = float("nan")  # an empty state's output may be anything
    o, lse = call(q, k, v, (counts, indices), state=(dropped_o.float(), dropped_lse.float()))
    wanted_o, wanted_lse, _ = attention(q, k, v, torch.ones_like(mask), 0.2)
    assert_close(o, wanted_o)
    assert_close(lse, wanted_lse)
    counts.zero_()  # nothing kept: the state itself
    whole = wanted_o.float(), wanted_lse.float()
    for got, wanted in zip(call(q, k, v, (counts, indices), state=whole), whole, strict=True):
        assert_close(got, wanted)


def test_huge_and_opposite_scores_stay_finite():
    q, k, v = random_qkv(1, 1, 1, 64, 64, 16, torch.float16)
    q, k = q.sign() * 60000, k.sign() * 60000
    lists = block_lists(1, 1, 2, 2, least=1)
    o, lse = call(q, k, v, lists, scale=1.0)
    wanted_o, wanted_lse, _ = attention(q, k, v, dense_mask(*lists, 1, 1, 64, 64), 1.0)
    assert_close(o, wanted_o)
    assert_close(lse, wanted_lse)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any op's result owns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


def cost_at(density, tokens=4096):
    q, k, v = random_qkv(1, 2, 2, tokens, tokens, 16, torch.float32)
    lists = block_lists(1, 2, blocks(tokens), blocks(tokens), counts=round(density * blocks(tokens)))
    with FlopCounterMode(display=False) as counter, LargestTensor() as largest:
        reference(q, k, v, None, None, None, *lists, None, None, None, 0.2, BLOCK, torch.float32)
    with FlopCounterMode(display=False) as formula:
        call(q, k, v, lists)
    return counter.get_total_flops(), largest.elements, formula.get_total_flops()


def test_work_falls_with_density_and_nothing_is_tokens_by_keys():
    quarter, eighth = cost_at(0.25), cost_at(0.125)
    dense = 4 * 2 * 4096 * 4096 * 16
    assert quarter[0] == quarter[2] == dense // 4
    assert eighth[0] == eighth[2] == dense // 8
    assert max(quarter[1], eighth[1]) < 4096 * 4096 // 8


def test_lists_of_unequal_length_cost_what_they_hold():
    q, k, v = random_qkv(1, 2, 2, 512, 512, 16, torch.float32)
    counts, indices = block_lists(1, 2, 16, 16)
    with FlopCounterMode(display=False) as formula:
        call(q, k, v, (counts, indices))
    assert formula.get_total_flops() == 4 * 16 * BLOCK**2 * int(counts.sum())


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    q, k, v = random_qkv(1, 2, 1, 65, 40, 16, dtype)
    lists = block_lists(1, 2, 3, 2)
    state = q.clone(), torch.zeros(1, 2, 65)
    kv_len = torch.tensor([33], dtype=torch.int32)
    args = (q, k, v, None, None, None, *lists, kv_len, *state, 0.2, BLOCK, dtype)
    torch.library.opcheck(sparse_attention, args)
    torch.library.opcheck(sparse_attention, (*args[:8], None, None, None, 0.2, BLOCK, dtype))


def test_strided_heads_give_the_same():
    q, k, v = random_qkv(2, 2, 2, 65, 65, 16, torch.float32)
    lists = block_lists(2, 2, 3, 3)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for got, wanted in zip(call(*strided, lists), call(q, k, v, lists), strict=True):
        assert torch.equal(got, wanted) and got.is_contiguous()


def test_bad_input_is_named():
    q, k, v = random_qkv(1, 4, 2, 64, 64, 16, torch.float32)
    lists = block_lists(1, 4, 2, 2)
    with pytest.raises(OpInputError, match="q has 4 heads and k has 3"):
        call(q, *(torch.randn(1, 3, 64, 16) for _ in "kv"), lists)
    with pytest.raises(OpInputError, match=r"kv_indices has shape \(1, 4, 1, 2\).*\(1, 4, 2, any\)"):
        call(q, k, v, (lists[0], lists[1][:, :, :1]))
    with pytest.raises(OpInputError, match="kv_indices lists 3 of 2 key blocks"):
        call(q, k, v, (lists[0], lists[1].repeat(1, 1, 1, 2)[..., :3]))
    with pytest.raises(OpInputError, match="kv_num_blocks is int64"):
        call(q, k, v, (lists[0].long(), lists[1]))
    with pytest.raises(OpInputError, match="kv_num_blocks has 2 heads, q has 4"):
        call(q, k, v, (lists[0][:, :2], lists[1][:, :2]))
    with pytest.raises(OpInputError, match=r"q is torch\.int8 without q_scale"):
        call(q.to(torch.int8), k.to(torch.int8), v, lists, dtype=torch.float32)
    with pytest.raises(OpInputError, match=r"k_scale has shape \(1, 2, 3\).*per token.*per block"):
        scales = torch.ones(1, 4, 64), torch.ones(1, 2, 3), None
        call(q.to(torch.int8), k.to(torch.int8), v, lists, scales=scales, dtype=torch.float32)
    with pytest.raises(OpInputError, match="only one of state_o and state_lse"):
        call(q, k, v, lists, state=(q, None))
    with pytest.raises(OpInputError, match="block_size is 0"):
        sparse_attention(q, k, v, None, None, None, *lists, None, None, None, 0.2, 0, torch.float32)
    with pytest.raises(OpInputError, match=r"kv_len has shape \(2,\)"):
        call(q, k, v, lists, kv_len=torch.ones(2, dtype=torch.int32))
