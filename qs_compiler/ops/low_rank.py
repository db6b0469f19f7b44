"""quantsparse::low_rank: the best rank-r factors of each head (the SVD of QuantSparse eq. 16).

Through the D x D Gram matrix, since S is far larger than D: the right singular vectors of delta are the eigenvectors of
delta^T delta. delta (B, H, S, D) float; rank r <= D. Returns left = delta @ right^T (B, H, S, r) and right
(B, H, r, D), orthonormal rows by falling singular value, both in delta's dtype; left @ right is the best approximation.
"""

from __future__ import annotations

import torch

from .library import FLOAT_DTYPES, OpCost, define_op, itemsize, require, require_dtype, require_shape, symbols

NAME = "low_rank"
B, H, S, D, r, b_d = symbols("B H S D r b_d")


def check(delta, rank):
    require_shape(NAME, "delta", delta, (None, None, None, None))
    require_dtype(NAME, "delta", delta.dtype, FLOAT_DTYPES)
    depth = delta.shape[3]
    require(1 <= rank <= depth, NAME, f"rank is {rank}", f"It must lie in 1..{depth}, the head's width.")


def reference(delta, rank):
    values = delta.float()
    _, vectors = torch.linalg.eigh(values.mT @ values)  # ascending eigenvalues
    right = vectors[..., -rank:].flip(-1).mT
    return (values @ right.mT).to(delta.dtype).contiguous(), right.to(delta.dtype).contiguous()


def fake(delta, rank):
    batch, heads, tokens, depth = delta.shape
    return delta.new_empty((batch, heads, tokens, rank)), delta.new_empty((batch, heads, rank, depth))


def bind(delta, rank):
    batch, heads, tokens, depth = delta.shape
    return {B: batch, H: heads, S: tokens, D: depth, r: rank, b_d: itemsize(delta)}


define_op(
    "low_rank(Tensor delta, int rank) -> (Tensor left, Tensor right)",
    check=check,
    reference=reference,
    fake=fake,
    asks_device=True,
    cost=OpCost(
        flops=2 * B * H * S * D * (D + r),  # the Gram matrix and the projection; the eigenvectors of D x D are small
        bytes=b_d * B * H * (S * D + S * r + r * D),
        bind=bind,
    ),
)
