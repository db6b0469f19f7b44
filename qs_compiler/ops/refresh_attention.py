"""quantsparse::refresh_attention: dense attention that also yields what the sparse steps after it will lack.

q, k, v, scales, lists and kv_len as in sparse_attention. Returns
  o (B, H, S, D) in `dtype`, lse (B, H, S) float32: the dense attention;
  correction_o (B, H, S, D) in `dtype`, correction_lse (B, H, S) float32:
    correction "residual": o - o_kept, the residual D of QuantSparse eq. 10, and the lse of the kept blocks;
    correction "complement": output and lse of the dropped blocks, (0, -inf) where nothing is dropped;
  block_mass (B, H, nQ, nK) float32: softmax mass of each key block, mean over the query block's rows. Rows sum to 1
    (to 0 where no key is left).
lse_prev (B, H, S) float32 is for kernels, which may estimate block_mass from it in one pass; this reference is exact.
"""

from __future__ import annotations

import torch

from .attention_inputs import blocks_of, check_attention, kept_blocks, key_lengths, token_scale
from .library import OpCost, define_op, itemsize, require, require_dtype, require_shape, symbols
from .softmax_state import divide, finite, merge_states

NAME = "refresh_attention"
CORRECTIONS = ("residual", "complement")
B, H, Hkv, S, T, D, block, nQ, nK, b_q, b_v, b_o, b_prev, lists = symbols(
    "B H Hkv S T D block nQ nK b_q b_v b_o b_prev lists"
)

# Elements of one score tile of the reference, unless a single query block needs more.
WORKSPACE = 1 << 22


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


def split_states(scores, values, kept, block_size):
    """Kept and dropped part of one tile of rows.

    scores (G, c, block, T), -inf where masked; values (G, T, D); kept (G, c, nK) bool. Returns (o, lse) of the kept and
    of the dropped part, the (o, lse) of both, and the mass that each row puts on each key block, (G, c, block, nK).
    """
    groups, blocks, rows, keys = scores.shape
    key_blocks = kept.shape[-1]
    kept_keys = kept.repeat_interleave(block_size, -1)[:, :, None, :keys]
    # Each part is shifted by its own maximum: a part of vanishing mass keeps a finite log-sum-exp.
    shift_kept = finite(scores.masked_fill(~kept_keys, float("-inf")).amax(-1))
    shift_dropped = finite(scores.masked_fill(kept_keys, float("-inf")).amax(-1))
    weights = torch.exp(scores - torch.where(kept_keys, shift_kept[..., None], shift_dropped[..., None]))
    padded = torch.nn.functional.pad(weights, (0, key_blocks * block_size - keys))
    block_sums = padded.unflatten(-1, (key_blocks, block_size)).sum(-1)
    states = []
    for part, shift in ((kept_keys, shift_kept), (~kept_keys, shift_dropped)):
        part_weights = (weights * part).flatten(1, 2)
        total = part_weights.sum(-1).view(groups, blocks, rows)
        o = torch.bmm(part_weights, values).view(groups, blocks, rows, -1)
        states += [divide(o, total), shift + torch.log(total)]
    o, lse = merge_states(*states)
    shifts = torch.where(kept[:, :, None], shift_kept[..., None], shift_dropped[..., None])
    return states, (o, lse), block_sums * torch.exp(shifts - finite(lse)[..., None])


def reference(
    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, lse_prev, correction, scale, block_size, dtype
):
    """Tiles of a few query blocks against all keys: nothing is S x T."""
    batch, heads, tokens, depth = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    query_blocks, key_blocks = blocks_of(tokens, block_size), blocks_of(keys, block_size)
    lengths = key_lengths(kv_len, k)
    kept = kept_blocks(num_blocks, indices)
    q_scales = None if q_scale is None else token_scale(q_scale, tokens, block_size)[..., None]
    k_scales = None if k_scale is None else token_scale(k_scale, keys, block_size)[..., None]

    o = q.new_empty((batch * heads, query_blocks * block_size, depth), dtype=dtype)
    correction_o = torch.empty_like(o)
    lse = q.new_empty(o.shape[:2], dtype=torch.float32)
    correction_lse = torch.empty_like(lse)
    block_mass = q.new_empty((batch * heads, query_blocks, key_blocks), dtype=torch.float32)
    head_step = max(1, WORKSPACE // max(1, query_blocks * block_size * keys))
    block_step = max(1, WORKSPACE // max(1, head_step * block_size * keys))
    for first in range(0, batch * heads, head_step):
        head = torch.arange(first, min(first + head_step, batch * heads), device=q.device)
        b, h, kv_h = head // heads, head % heads, head % heads // (heads // kv_heads)
        keep = kept[b % kept.shape[0], h % kept.shape[1]]
        valid = torch.arange(keys, device=q.device) < lengths[b, None]
        q_head, k_head = q[b, h].float(), k[b, kv_h].float()
        v_head = v[b, kv_h].float().masked_fill(~valid[..., None], 0)
        if q_scales is not None:
            q_head = q_head * q_scales[b, h]
        if k_scales is not None:
            k_head = k_head * k_scales[b, kv_h]
        if v_scale is not None:
            v_head = v_head * v_scale[b, kv_h][:, None]
        q_head = torch.nn.functional.pad(q_head, (0, 0, 0, query_blocks * block_size - tokens))
        for start in range(0, query_blocks, block_step):
            stop = min(start + block_step, query_blocks)
            rows = slice(start * block_size, stop * block_size)
            scores = torch.bmm(q_head[:, rows], k_head.mT) * scale
            scores = scores.masked_fill(~valid[:, None], float("-inf")).unflatten(1, (-1, block_size))
            states, (o_tile, lse_tile), mass = split_states(scores, v_head, keep[:, start:stop], block_size)
            o_kept, lse_kept, o_dropped, lse_dropped = states
            if correction == "residual":
                fix_o, fix_lse = o_tile - o_kept, lse_kept
            else:
                fix_o, fix_lse = o_dropped, lse_dropped
            group = slice(first, first + len(head))
            o[group, rows], lse[group, rows] = o_tile.flatten(1, 2).to(dtype), lse_tile.flatten(1)
            correction_o[group, rows] = fix_o.flatten(1, 2).to(dtype)
            correction_lse[group, rows] = fix_lse.flatten(1)
            row = torch.arange(rows.start, rows.stop, device=q.device).view(-1, block_size)
            real = (row < tokens).float()[..., None]
            block_mass[group, start:stop] = (mass * real).sum(2) / real.sum(1)

    def rows_of(x):
        return x.unflatten(0, (batch, heads))[:, :, :tokens].contiguous()

    return (
        rows_of(o),
        rows_of(lse),
        rows_of(correction_o),
        rows_of(correction_lse),
        block_mass.unflatten(0, (batch, heads)),
    )


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
    cost=OpCost(
        flops=4 * B * H * S * T * D,  # the dense attention: each block is visited once, kept or dropped
        bytes=B * H * S * (D * (b_q + 2 * b_o) + 8 + b_prev)
        + B * Hkv * T * D * (b_q + b_v)
        + 4 * B * H * nQ * nK
        + lists,
        bind=bind,
    ),
)
