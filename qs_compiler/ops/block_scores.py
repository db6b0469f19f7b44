"""quantsparse::block_scores: how much attention each query block is likely to pay to each key block.

    scores = softmax_j( scale * mean(q_i) . mean(k_j) + log n_j )

with means over the valid rows of each block and n_j the valid keys of key block j, so that a partial block weighs what
it holds. q (B, H, S, D), k (B, Hkv, T, D) float; kv_len (B,) or None. Returns (B, H, nQ, nK) float32; rows sum to 1
(to 0 where no key is left). A prediction of refresh_attention's block_mass that needs no attention.
"""

from __future__ import annotations

import torch

from .attention_inputs import blocks_of, key_lengths, require_block_size, require_heads, require_kv_len
from .library import FLOAT_DTYPES, OpCost, define_op, itemsize, require_dtype, symbols

NAME = "block_scores"
B, H, Hkv, S, T, D, nQ, nK, b_q = symbols("B H Hkv S T D nQ nK b_q")


def pool(x: torch.Tensor, lengths: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the valid rows of each block: x (B, H, L, D), lengths (B,) -> (B, H, n, D) float32, counts (B, n)."""
    tokens = x.shape[2]
    valid = torch.arange(tokens, device=x.device) < lengths[:, None]
    shape = blocks_of(tokens, block_size), block_size
    padding = shape[0] * block_size - tokens
    x = x.float().masked_fill(~valid[:, None, :, None], 0)
    sums = torch.nn.functional.pad(x, (0, 0, 0, padding)).unflatten(2, shape).sum(3)
    counts = torch.nn.functional.pad(valid.float(), (0, padding)).unflatten(1, shape).sum(2)
    return sums / counts.clamp(min=1)[:, None, :, None], counts


def check(q, k, kv_len, scale, block_size):
    require_heads(NAME, q, k)
    require_block_size(NAME, block_size)
    require_dtype(NAME, "q", q.dtype, FLOAT_DTYPES)
    require_dtype(NAME, "k", k.dtype, FLOAT_DTYPES)
    require_kv_len(NAME, kv_len, q.shape[0])


def reference(q, k, kv_len, scale, block_size):
    pooled_q, _ = pool(q, key_lengths(None, q), block_size)
    pooled_k, counts = pool(k, key_lengths(kv_len, k), block_size)
    pooled_k = pooled_k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = pooled_q @ pooled_k.mT * scale + torch.log(counts)[:, None, None]
    # Where no key is left every logit is -inf and softmax is NaN.
    return torch.softmax(logits, -1).masked_fill((counts == 0)[:, None, None], 0)


def fake(q, k, kv_len, scale, block_size):
    blocks = blocks_of(q.shape[2], block_size), blocks_of(k.shape[2], block_size)
    return q.new_empty((*q.shape[:2], *blocks), dtype=torch.float32)


def bind(q, k, kv_len, scale, block_size):
    batch, heads, tokens, depth = q.shape
    return {
        B: batch,
        H: heads,
        Hkv: k.shape[1],
        S: tokens,
        T: k.shape[2],
        D: depth,
        nQ: blocks_of(tokens, block_size),
        nK: blocks_of(k.shape[2], block_size),
        b_q: itemsize(q),
    }


define_op(
    "block_scores(Tensor q, Tensor k, Tensor? kv_len, float scale, int block_size) -> Tensor",
    check=check,
    reference=reference,
    fake=fake,
    cost=OpCost(flops=2 * B * H * nQ * nK * D, bytes=b_q * B * D * (H * S + Hkv * T) + 4 * B * H * nQ * nK, bind=bind),
)
