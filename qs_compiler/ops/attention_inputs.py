"""What the attention ops share: checks of their arguments, scales per token, key lengths, block lists as masks."""

from __future__ import annotations

import torch

from .library import FLOAT_DTYPES, require, require_dtype, require_shape
from .pack_values import LENGTH_DTYPES, padded

CODE_DTYPES = (torch.int8, torch.float8_e4m3fn)
INDEX_DTYPES = (torch.int32, torch.int16)


def blocks_of(tokens: int, block_size: int) -> int:
    """How many blocks hold `tokens`, the last one possibly partial."""
    return (tokens + block_size - 1) // block_size


def require_heads(op: str, q: torch.Tensor, k: torch.Tensor) -> None:
    """OpInputError unless q (B, H, S, D) and k (B, Hkv, T, D) with Hkv dividing H."""
    require_shape(op, "q", q, (None, None, None, None))
    require_shape(op, "k", k, (q.shape[0], None, None, q.shape[3]))
    heads, kv_heads = q.shape[1], k.shape[1]
    require(
        kv_heads > 0 and heads % kv_heads == 0,
        op,
        f"q has {heads} heads and k has {kv_heads}",
        "The key heads must divide the query heads.",
    )


def require_block_size(op: str, block_size: int) -> None:
    """OpInputError unless block_size is positive."""
    require(block_size > 0, op, f"block_size is {block_size}", "It counts tokens and must be positive.")


def require_kv_len(op: str, kv_len: torch.Tensor | None, batch: int) -> None:
    """OpInputError unless kv_len is None or (B,) integers."""
    if kv_len is not None:
        require_shape(op, "kv_len", kv_len, (batch,))
        require_dtype(op, "kv_len", kv_len.dtype, LENGTH_DTYPES)


def check_attention(
    op, q, k, v, q_scale, k_scale, v_scale, kv_num_blocks, kv_indices, kv_len, block_size, dtype, kept_only=False
) -> None:
    """Raise OpInputError unless the arguments common to sparse_attention and refresh_attention fit together.

    kept_only: a row of kv_indices may end after the kept blocks.
    """
    require_heads(op, q, k)
    require_block_size(op, block_size)
    require_dtype(op, "dtype", dtype, FLOAT_DTYPES)
    packed = v.dtype == torch.uint8
    batch, kv_heads, keys, depth = k.shape
    require_shape(op, "v", v, (batch, kv_heads, depth, padded(keys)) if packed else (batch, kv_heads, keys, depth))
    require(k.dtype == q.dtype, op, f"q is {q.dtype} and k is {k.dtype}", "Both must be of one dtype.")
    for name, tensor, scale in (("q", q, q_scale), ("k", k, k_scale), ("v", v, v_scale)):
        codes = (*CODE_DTYPES, torch.uint8) if name == "v" else CODE_DTYPES
        require_dtype(op, name, tensor.dtype, (*FLOAT_DTYPES, *codes))
        coded = tensor.dtype in codes
        require(
            coded == (scale is not None),
            op,
            f"{name} is {tensor.dtype} {'without' if coded else 'with'} {name}_scale",
            "8-bit tensors need a scale, float tensors have none.",
        )
    tokens = q.shape[2]
    query_blocks, key_blocks = blocks_of(tokens, block_size), blocks_of(keys, block_size)
    require_token_scale(op, "q_scale", q_scale, tuple(q.shape[:3]), query_blocks)
    require_token_scale(op, "k_scale", k_scale, tuple(k.shape[:3]), key_blocks)
    require_shape(op, "v_scale", v_scale, (batch, kv_heads, depth))
    require_dtype(op, "kv_num_blocks", kv_num_blocks.dtype, (torch.int32,))
    require_dtype(op, "kv_indices", kv_indices.dtype, INDEX_DTYPES)
    require_shape(op, "kv_num_blocks", kv_num_blocks, (None, None, query_blocks))
    require_shape(op, "kv_indices", kv_indices, (*kv_num_blocks.shape[:2], query_blocks, None))
    listed = kv_indices.shape[3]
    require(
        listed == key_blocks or (listed < key_blocks and kept_only),
        op,
        f"kv_indices lists {listed} of {key_blocks} key blocks",
        "A row lists the kept ones at most." if kept_only else "A row lists all of them, kept ones first.",
    )
    for name, size, full in zip(("batches", "heads"), kv_num_blocks.shape[:2], q.shape[:2], strict=True):
        require(
            size == 1 or size == full, op, f"kv_num_blocks has {size} {name}, q has {full}", "Give 1 or as many as q."
        )
    require_kv_len(op, kv_len, batch)


def require_token_scale(op, name, scale, rows: tuple, blocks) -> None:
    """OpInputError unless `scale` is None, one value a token (rows) or one a block."""
    if scale is not None:
        require(
            scale.dim() == 3 and scale.shape[:2] == rows[:2] and scale.shape[2] in (rows[2], blocks),
            op,
            f"{name} has shape {tuple(scale.shape)}",
            f"It must be {rows} (per token) or {(*rows[:2], blocks)} (per block).",
        )


def token_scale(scale: torch.Tensor, tokens: int, block_size: int) -> torch.Tensor:
    """Scales per token or per block (..., tokens or blocks) -> (..., tokens)."""
    return scale if scale.shape[-1] == tokens else scale.repeat_interleave(block_size, -1)[..., :tokens]


def key_lengths(kv_len: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor:
    """How many leading keys count for each batch element, (B,) int64."""
    batch, _, keys, _ = k.shape
    if kv_len is None:
        return torch.full((batch,), keys, device=k.device)
    return kv_len.long().clamp(0, keys)


def kept_blocks(kv_num_blocks: torch.Tensor, kv_indices: torch.Tensor) -> torch.Tensor:
    """Block lists -> (Bm, Hm, nQ, nK) bool, True where a block is listed. Entries past the count are ignored."""
    key_blocks = kv_indices.shape[-1]
    listed = torch.arange(key_blocks, device=kv_indices.device) < kv_num_blocks[..., None]
    counts = torch.zeros(kv_indices.shape, dtype=torch.int32, device=kv_indices.device)
    counts.scatter_add_(-1, torch.where(listed, kv_indices, 0).long(), listed.to(torch.int32))
    return counts > 0


def count_kept(kv_num_blocks: torch.Tensor, batch: int, heads: int, key_blocks: int) -> int:
    """Kept (query block, key block) pairs over all heads; every pair where the values are not known (fake tensors)."""
    list_batch, list_heads, query_blocks = kv_num_blocks.shape
    if type(kv_num_blocks) is not torch.Tensor or kv_num_blocks.is_meta:
        return batch * heads * query_blocks * key_blocks
    return int(kv_num_blocks.sum()) * (batch // list_batch) * (heads // list_heads)
