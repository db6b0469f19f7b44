"""quantsparse::sparse_attention: attention over a list of key blocks for each query block, resumable.

q (B, H, S, D), k and v (B, Hkv, T, D), Hkv divides H; float, or int8/fp8 with float32 scales: q_scale, k_scale per
token (B, H, S), (B, Hkv, T) or per block (B, H, nQ), (B, Hkv, nK), positive; v_scale (B, Hkv, D). v may be what
pack_values gives, uint8 (B, Hkv, D, T16). The lists have the layout of flex_attention's BlockMask: kv_num_blocks
(Bm, Hm, nQ) int32, kv_indices (Bm, Hm, nQ, n) int32 or int16, n <= nK, Bm in {1, B}, Hm in {1, H}: the kept blocks,
those that reach past the keys after all others (ascending lists do that); entries past kv_num_blocks are ignored.
kv_len (B,): keys from kv_len on are masked. state_o (B, H, S, D) and state_lse (B, H, S) float32: output and
log-sum-exp of the dropped blocks, from which the softmax resumes.
Returns o (B, H, S, D) in `dtype` and lse (B, H, S) float32, natural log; a row without any key has o = 0, lse = -inf.
"""

from __future__ import annotations

import torch

from .attention_inputs import check_attention, count_kept
from .gathered_attention import GatheredAttention
from .library import FLOAT_DTYPES, OpCost, define_op, itemsize, require, require_dtype, require_shape, symbols
from .softmax_state import merge_states

NAME = "sparse_attention"
B, H, Hkv, S, T, D, block, kept, b_q, b_v, b_o, b_state, lists = symbols(
    "B H Hkv S T D block kept b_q b_v b_o b_state lists"
)


def check(
    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, state_o, state_lse, scale, block_size, dtype
):
    shared = (q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, block_size, dtype)
    check_attention(NAME, *shared, kept_only=True)
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
    """Gather the kept blocks of a few query blocks at a time."""
    gathered = GatheredAttention(q, k, v, q_scale, k_scale, v_scale, kv_len, scale, block_size)
    entries = gathered.entries
    o = q.new_zeros((entries.numel(), block_size, q.shape[3]), dtype=torch.float32)
    lse = q.new_full(o.shape[:2], float("-inf"), dtype=torch.float32)
    list_of = torch.arange(num_blocks.numel(), device=q.device).view(num_blocks.shape).expand_as(entries).reshape(-1)
    # Longest lists first: the entries of one step are alike in length.
    counts, order = num_blocks.expand_as(entries).reshape(-1).sort(descending=True, stable=True)
    host_counts, flat_indices, start = counts.tolist(), indices.reshape(-1, indices.shape[-1]), 0
    while start < len(host_counts) and host_counts[start] > 0:
        longest = host_counts[start]
        stop = start + gathered.step(longest)
        listed = torch.arange(longest, device=q.device) < counts[start:stop, None]
        blocks = torch.where(listed, flat_indices[list_of[order[start:stop]], :longest].long(), 0)
        o[order[start:stop]], lse[order[start:stop]], _ = gathered.attend(order[start:stop], blocks, listed)
        start = stop
    o, lse = gathered.rows(o), gathered.rows(lse)
    if state_o is not None:
        o, lse = merge_states(o, lse, state_o.float(), state_lse)
    return o.to(dtype), lse


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
    asks_device=True,
    cost=OpCost(
        flops=4 * D * block**2 * kept,  # a partial block counts in full, as a kernel's tile does
        bytes=B * H * S * (D * (b_q + b_o) + 4 + b_state) + B * Hkv * T * D * (b_q + b_v) + lists,
        bind=bind,
    ),
)
