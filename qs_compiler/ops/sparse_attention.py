"""quantsparse::sparse_attention: attention over a list of key blocks for each query block, resumable.

q (B, H, S, D), k and v (B, Hkv, T, D), Hkv divides H; float, or int8/fp8 with float32 scales: q_scale, k_scale per
token (B, H, S), (B, Hkv, T) or per block (B, H, nQ), (B, Hkv, nK); v_scale (B, Hkv, D). The lists have the layout of
flex_attention's BlockMask: kv_num_blocks (Bm, Hm, nQ) int32, kv_indices (Bm, Hm, nQ, nK) int32 or int16, Bm in {1, B},
Hm in {1, H}; entries past kv_num_blocks are ignored. kv_len (B,): keys from kv_len on are masked. state_o (B, H, S, D)
and state_lse (B, H, S) float32: output and log-sum-exp of the dropped blocks, from which the softmax resumes.
Returns o (B, H, S, D) in `dtype` and lse (B, H, S) float32, natural log; a row without any key has o = 0, lse = -inf.
"""

from __future__ import annotations

import torch

from .attention_inputs import blocks_of, check_attention, count_kept, key_lengths, token_scale
from .library import FLOAT_DTYPES, OpCost, define_op, itemsize, require, require_dtype, require_shape, symbols
from .softmax_state import merge_states, partial_state

NAME = "sparse_attention"
B, H, Hkv, S, T, D, block, kept, b_q, b_v, b_o, b_state, lists = symbols(
    "B H Hkv S T D block kept b_q b_v b_o b_state lists"
)

# Elements of the largest buffer that one step of the reference may build, unless a single query block needs more.
WORKSPACE = 1 << 20


def check(
    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, state_o, state_lse, scale, block_size, dtype
):
    check_attention(NAME, q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, block_size, dtype)
    require(
        (state_o is None) == (state_lse is None),
        NAME,
        "only one of state_o and state_lse is given",
        "A cached state has both.",
    )
    if state_o is not None:
        require_shape(NAME, "state_o", state_o, tuple(q.shape))
        require_shape(NAME, "state_lse", state_lse, tuple(q.shape[:3]))
        require_dtype(NAME, "state_o", state_o.dtype, FLOAT_DTYPES)
        require_dtype(NAME, "state_lse", state_lse.dtype, (torch.float32,))


def reference(
    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, state_o, state_lse, scale, block_size, dtype
):
    """Gather the kept blocks of a few query blocks at a time: work falls with density, and nothing is S x T."""
    batch, heads, tokens, depth = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    query_blocks = blocks_of(tokens, block_size)
    lengths = key_lengths(kv_len, k)
    q_rows, k_rows, v_rows = (x.reshape(-1, depth) for x in (q, k, v))
    q_scales = None if q_scale is None else token_scale(q_scale, tokens, block_size).reshape(-1)
    k_scales = None if k_scale is None else token_scale(k_scale, keys, block_size).reshape(-1)
    within = torch.arange(block_size, device=q.device)

    # One entry for each (batch, head, query block), longest lists first: entries of one step are alike in length.
    entry = torch.arange(batch * heads * query_blocks, device=q.device).view(batch, heads, query_blocks)
    list_rows = torch.arange(num_blocks.numel(), device=q.device).view(num_blocks.shape).expand_as(entry).reshape(-1)
    counts = num_blocks.expand_as(entry).reshape(-1).long()
    counts, order = counts.sort(descending=True, stable=True)
    host_counts = counts.tolist()
    flat_indices = indices.reshape(-1, indices.shape[-1])

    o = q.new_zeros((entry.numel(), block_size, depth), dtype=torch.float32)
    lse = q.new_full((entry.numel(), block_size), float("-inf"), dtype=torch.float32)
    start = 0
    while start < len(host_counts) and host_counts[start] > 0:
        most = host_counts[start]
        step = max(1, WORKSPACE // (most * block_size * max(block_size, depth)))
        entries, count = order[start : start + step], counts[start : start + step]
        start += step
        head_of = entries // query_blocks
        batch_of = head_of // heads
        kv_head = batch_of * kv_heads + (head_of % heads) // (heads // kv_heads)

        listed = torch.arange(most, device=q.device) < count[:, None]
        blocks = torch.where(listed, flat_indices[list_rows[entries], :most].long(), 0)
        key = (blocks[..., None] * block_size + within).flatten(1)
        valid = listed.repeat_interleave(block_size, 1) & (key < lengths[batch_of, None])
        key = kv_head[:, None] * keys + key.clamp(max=keys - 1)
        query = (entries % query_blocks)[:, None] * block_size + within
        query = head_of[:, None] * tokens + query.clamp(max=tokens - 1)

        q_step, k_step = q_rows[query].float(), k_rows[key].float()
        if q_scales is not None:
            q_step = q_step * q_scales[query][..., None]
        if k_scales is not None:
            k_step = k_step * k_scales[key][..., None]
        scores = torch.bmm(q_step, k_step.mT) * scale
        # What lies past the length may be anything: it must not reach the product, where 0 * NaN is NaN.
        o[entries], lse[entries] = partial_state(
            scores.masked_fill(~valid[:, None], float("-inf")),
            v_rows[key].float().masked_fill(~valid[..., None], 0),
        )
    o = o.view(batch, heads, query_blocks * block_size, depth)[:, :, :tokens]
    lse = lse.view(batch, heads, query_blocks * block_size)[:, :, :tokens].contiguous()
    if v_scale is not None:
        o = o * v_scale.repeat_interleave(heads // kv_heads, 1)[:, :, None]
    if state_o is not None:
        o, lse = merge_states(o, lse, state_o.float(), state_lse)
    return o.to(dtype).contiguous(), lse


def fake(q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, state_o, state_lse, scale, block_size, dtype):
    return q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:3], dtype=torch.float32)


def bind(q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, state_o, state_lse, scale, block_size, dtype):
    batch, heads, tokens, depth = q.shape
    pairs = count_kept(num_blocks, batch, heads, indices.shape[-1])
    listed = count_kept(num_blocks, *num_blocks.shape[:2], indices.shape[-1])
    return {
        B: batch,
        H: heads,
        Hkv: k.shape[1],
        S: tokens,
        T: k.shape[2],
        D: depth,
        block: block_size,
        kept: pairs,
        b_q: itemsize(q),
        b_v: itemsize(v),
        b_o: dtype.itemsize,
        b_state: 0 if state_o is None else depth * itemsize(state_o) + 4,
        lists: num_blocks.numel() * itemsize(num_blocks) + listed * itemsize(indices),
    }


define_op(
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, "
    "Tensor kv_num_blocks, Tensor kv_indices, Tensor? kv_len, Tensor? state_o, Tensor? state_lse, float scale, "
    "int block_size, ScalarType dtype) -> (Tensor o, Tensor lse)",
    check=check,
    reference=reference,
    fake=fake,
    cost=OpCost(
        flops=4 * D * block**2 * kept,  # a partial block counts in full, as a kernel's tile does
        bytes=B * H * S * (D * (b_q + b_o) + 4 + b_state) + B * Hkv * T * D * (b_q + b_v) + lists,
        bind=bind,
    ),
)
