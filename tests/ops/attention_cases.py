"""Inputs for the attention ops, and a plain float64 attention to compare with."""

import torch

GARBAGE_INDEX = 31_999  # what an ignored list entry may hold; fits int16
BLOCK = 32


def block_lists(
    batch, heads, query_blocks, key_blocks, *, seed=0, least=0, dtype=torch.int32, counts=None, complete=False
):
    """Random ascending lists, another count for each row; past the count the other blocks (complete) or garbage."""
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, heads, query_blocks)
    drawn = torch.randint(least, key_blocks + 1, shape, generator=rng)
    counts = drawn if counts is None else torch.full(shape, counts)
    order = torch.rand((*shape, key_blocks), generator=rng).argsort(-1)
    listed = torch.arange(key_blocks) < counts[..., None]
    kept = torch.where(listed, order, GARBAGE_INDEX).sort(-1).values
    dropped = torch.where(listed, -1, order).sort(-1).values
    return counts.int(), (torch.where(listed, kept, dropped) if complete else kept).to(dtype)


def dense_mask(kv_num_blocks, kv_indices, batch, heads, tokens, keys, block=BLOCK):
    """The lists as a (B, H, S, T) bool mask, by loops."""
    mask = torch.zeros(batch, heads, tokens, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            row = (b if kv_num_blocks.shape[0] > 1 else 0, h if kv_num_blocks.shape[1] > 1 else 0)
            for i in range(kv_num_blocks.shape[2]):
                for j in kv_indices[row][i][: kv_num_blocks[row][i]].tolist():
                    mask[b, h, i * block : (i + 1) * block, j * block : (j + 1) * block] = True
    return mask


def attention(q, k, v, mask, scale):
    """softmax(scale q k^T) v over mask (B, H, S, T) in float64 -> o, lse, weights. Heads of k and v are repeated."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(repeat, 1), v.double().repeat_interleave(repeat, 1)
    scores = (q @ k.mT * scale).masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(torch.isneginf(lse), 0, lse)[..., None])
    return weights @ torch.where(mask.any((0, 1, 2))[:, None], v, 0), lse, weights


def biased_qkv(heads, tokens, depth, device="cpu"):
    """bf16, batch 1. Keys with a bias and outlier channels, as real ones have: Gaussian ones hide what 8 bits lose."""
    q, k, v = (torch.randn(1, heads, tokens, depth, device=device, dtype=torch.bfloat16) for _ in range(3))
    k += 2 * torch.randn(1, heads, 1, depth, device=device, dtype=torch.bfloat16)
    k[..., :: depth // 2] *= 4
    return q, k, v


def random_qkv(batch, heads, kv_heads, tokens, keys, depth, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, heads, tokens, depth, generator=rng).to(dtype),
        torch.randn(batch, kv_heads, keys, depth, generator=rng).to(dtype),
        torch.randn(batch, kv_heads, keys, depth, generator=rng).to(dtype),
    )
