"""quantsparse::refresh_attention: dense attention that also yields what the sparse steps after it will lack.

q, k, v, scales and kv_len as in sparse_attention. The lists too, but here every row of kv_indices holds all key blocks,
the kept ones ascending, then the dropped ones ascending, as select_blocks and flex_attention's BlockMask give them. A
kernel can visit the two sets one after the other. Returns
  o (B, H, S, D) in `dtype`, lse (B, H, S) float32: the dense attention;
  correction_o (B, H, S, D) in `dtype`, correction_lse (B, H, S) float32:
    correction "residual": o - o_kept, the residual D of QuantSparse eq. 10, o_kept rounded to `dtype` as a sparse step
    returns it, so that their sum is o; and the lse of the kept blocks;
    correction "complement": output and lse of the dropped blocks, (0, -inf) where nothing is dropped;
  block_mass (B, H, nQ, nK) float32: softmax mass of each key block, mean over the query block's rows. Rows sum to 1
    (to 0 where no key is left).
With lse_prev (B, H, S) float32, the lse of an earlier step, block_mass is an estimate, for which a kernel need not pass
over the keys again: row i of a query block counts exp(lse_i - lse_prev_i) times, not once, and not at all where
lse_prev_i is infinite or NaN: a row without an earlier step. A query block sums to 1 still, to 0 where no row counts.
"""

from __future__ import annotations

import math

import torch

from .attention_inputs import check_attention, kept_blocks
from .gathered_attention import GatheredAttention
from .library import OpCost, define_op, itemsize, require, require_dtype, require_shape, symbols
from .softmax_state import divide, finite, merge_states

NAME = "refresh_attention"
CORRECTIONS = ("residual", "complement")
LARGEST_GROWTH = 64 * math.log(2)  # of a log-sum-exp between two steps, as in attention_device.py: nothing overflows
B, H, Hkv, S, T, D, block, nQ, nK, b_q, b_v, b_o, b_prev, lists = symbols(
    "B H Hkv S T D block nQ nK b_q b_v b_o b_prev lists"
)


def check(
    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, lse_prev, correction, scale, block_size, dtype
):
    check_attention(NAME, q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, block_size, dtype)
    require(
        correction in CORRECTIONS,
        NAME,
        f"correction '{correction}' is not known",
        f"Use one of {', '.join(CORRECTIONS)}.",
    )
    if lse_prev is not None:
        require_shape(NAME, "lse_prev", lse_prev, tuple(q.shape[:3]))
        require_dtype(NAME, "lse_prev", lse_prev.dtype, (torch.float32,))


def reference(
    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, lse_prev, correction, scale, block_size, dtype
):
    """Attend the kept and the dropped blocks of a few query blocks at a time, and join the two."""
    gathered = GatheredAttention(q, k, v, q_scale, k_scale, v_scale, kv_len, scale, block_size)
    entries, key_blocks = gathered.entries, gathered.key_blocks
    kept = kept_blocks(num_blocks, indices)
    order = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)  # kept blocks first, then the dropped ones
    require(
        indices.device.type != "cpu" or torch.equal(order, indices.long()),  # reading a device's values would stall it
        NAME,
        "a row of kv_indices is not the kept key blocks ascending, then the dropped ones ascending",
        "Lists of select_blocks and of flex_attention's BlockMask are.",
    )
    kept, order = (x.expand(*entries.shape, key_blocks).reshape(-1, key_blocks) for x in (kept, order))

    o = q.new_empty((entries.numel(), block_size, q.shape[3]), dtype=dtype)
    correction_o, lse = torch.empty_like(o), q.new_empty(o.shape[:2], dtype=torch.float32)
    correction_lse = torch.empty_like(lse)
    block_mass = q.new_empty((entries.numel(), key_blocks), dtype=torch.float32)
    counts, by_count = kept.sum(-1).sort(stable=True)
    for count, entries_of_count in split_by_value(counts, by_count):
        for part in entries_of_count.split(gathered.step(key_blocks)):
            blocks = order[part]
            o_kept, lse_kept, mass_kept = gathered.attend(part, blocks[:, :count])
            o_dropped, lse_dropped, mass_dropped = gathered.attend(part, blocks[:, count:])
            o_all, lse_all = merge_states(o_kept, lse_kept, o_dropped, lse_dropped)
            residual = correction == "residual"
            o[part], lse[part] = o_all.to(dtype), lse_all
            correction_o[part] = (o_all - o_kept.to(dtype) if residual else o_dropped).to(dtype)
            correction_lse[part] = lse_kept if residual else lse_dropped

            share_kept, share_dropped = (torch.exp(x - finite(lse_all))[..., None] for x in (lse_kept, lse_dropped))
            mass = torch.cat((mass_kept * share_kept, mass_dropped * share_dropped), -1)
            row = (part % gathered.query_blocks)[:, None] * block_size + gathered.within
            counts_as = (row < gathered.tokens).float()  # the last query block may be partial
            if lse_prev is not None:
                head = (part // gathered.query_blocks)[:, None]
                before = lse_prev.reshape(-1)[head * gathered.tokens + row.clamp(max=gathered.tokens - 1)]
                counts_as *= growth(lse_all, before)
            block_mass[part[:, None], blocks] = divide((mass * counts_as[..., None]).sum(1), counts_as.sum(1))
    shape = (*entries.shape, key_blocks)
    return *(gathered.rows(x) for x in (o, lse, correction_o, correction_lse)), block_mass.view(shape)


def growth(lse, lse_prev):
    """exp(lse - lse_prev), bounded; 0 where lse_prev says nothing."""
    change = (lse - lse_prev).clamp(max=LARGEST_GROWTH)
    return torch.where(torch.isfinite(lse_prev), torch.exp(change), 0)


def split_by_value(values, items):
    """(value, items that have it) for each value; `values` is sorted."""
    distinct, sizes = torch.unique_consecutive(values, return_counts=True)
    return zip(distinct.tolist(), items.split(sizes.tolist()), strict=True)


def fake(
    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, lse_prev, correction, scale, block_size, dtype
):
    o = q.new_empty(q.shape, dtype=dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    mass = q.new_empty((*q.shape[:2], *indices.shape[2:]), dtype=torch.float32)
    return o, lse, torch.empty_like(o), torch.empty_like(lse), mass


def bind(
    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, lse_prev, correction, scale, block_size, dtype
):
    batch, heads, tokens, depth = q.shape
    return {
        B: batch,
        H: heads,
        Hkv: k.shape[1],
        S: tokens,
        T: k.shape[2],
        D: depth,
        block: block_size,
        nQ: indices.shape[2],
        nK: indices.shape[3],
        b_q: itemsize(q),
        b_v: itemsize(v),
        b_o: dtype.itemsize,
        b_prev: itemsize(lse_prev),
        lists: num_blocks.numel() * itemsize(num_blocks) + indices.numel() * itemsize(indices),
    }


define_op(
    "refresh_attention(Tensor q, Tensor k, Tensor v, Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, "
    "Tensor kv_num_blocks, Tensor kv_indices, Tensor? kv_len, Tensor? lse_prev, str correction, float scale, "
    "int block_size, ScalarType dtype) "
    "-> (Tensor o, Tensor lse, Tensor correction_o, Tensor correction_lse, Tensor block_mass)",
    check=check,
    reference=reference,
    fake=fake,
    asks_device=True,
    cost=OpCost(
        flops=4 * B * H * S * T * D,  # the dense attention: each block is visited once, kept or dropped
        bytes=B * H * S * (D * (b_q + 2 * b_o) + 8 + b_prev)
        + B * Hkv * T * D * (b_q + b_v)
        + 4 * B * H * nQ * nK
        + lists,
        bind=bind,
    ),
)
