"""quantsparse::quantize_keys: 8-bit keys of an attention, less their mean, evened out, with one scale a block.

    k' = (k - mean_t(k)) / smooth        k_scale = max|k'| / qmax over a block's tokens and channels
    smooth = sqrt(std_t(k))              kq = round(k' / k_scale)

A vector that all keys share adds one number to all scores of a query, which no softmax sees. Real keys have such a
bias, in few channels and large: without it the codes are spent on what differs between keys. The log-sum-exp of the
scores moves by that number, in every subset of the keys alike.
A channel that varies more than the others sets the scale of all. `smooth` moves half of that, as a power, to the
queries, which are to be multiplied by it and have a scale for each token (SmoothQuant, arXiv 2211.10438). Any positive
`smooth` leaves the scores as they are, so float32 sums of squares are good enough for it.

k (B, Hkv, T, D) float; kv_len (B,) or None: how many leading keys count, the others take no part in means and scales
and get zeros; format: a name in formats.py. Returns kq (B, Hkv, T, D) in the format's dtype, k_scale (B, Hkv, nK)
float32 and smooth (B, Hkv, D) float32.
"""

from __future__ import annotations

import torch

from .attention_inputs import blocks_of, key_lengths, require_block_size, require_kv_len
from .formats import TINY_AMAX, row_format
from .library import FLOAT_DTYPES, OpCost, define_op, itemsize, require_dtype, require_shape, symbols

NAME = "quantize_keys"
# Of a channel's variance, in squared means: float32 sums of squares cannot tell less from rounding.
LEAST_VARIANCE = 2.0**-20
LARGEST = 1e16  # magnitude that counts for `smooth`, so that sums of squares stay finite
B, H, T, D, nK, b_k, b_len = symbols("B Hkv T D nK b_k b_len")


def check(k, kv_len, block_size, format="int8"):
    row_format(NAME, format)
    require_shape(NAME, "k", k, (None, None, None, None))
    require_dtype(NAME, "k", k.dtype, FLOAT_DTYPES)
    require_block_size(NAME, block_size)
    require_kv_len(NAME, kv_len, k.shape[0])


def reference(k, kv_len, block_size, format="int8"):
    form = row_format(NAME, format)
    batch, heads, tokens, _ = k.shape
    lengths = key_lengths(kv_len, k)
    padding = (torch.arange(tokens, device=k.device) >= lengths[:, None])[:, None, :, None]
    k = k.float().masked_fill(padding, 0)
    count = lengths.clamp(min=1)[:, None, None, None]
    mean = k.sum(2, keepdim=True) / count
    square = k.clamp(-LARGEST, LARGEST).square().sum(2, keepdim=True) / count
    square_of_mean = mean.clamp(-LARGEST, LARGEST).square()
    variance = torch.maximum(square - square_of_mean, square_of_mean * LEAST_VARIANCE).clamp(min=TINY_AMAX)
    smooth = variance.sqrt().sqrt()
    k = ((k - mean) * (1 / smooth)).masked_fill(padding, 0)
    blocks = blocks_of(tokens, block_size)
    k = torch.nn.functional.pad(k, (0, 0, 0, blocks * block_size - tokens)).unflatten(2, (blocks, block_size))
    amax = k.abs().amax((-2, -1)).clamp(min=TINY_AMAX) if k.numel() else k.new_zeros((batch, heads, blocks))
    qmax = amax.new_full((), form.qmax)  # as a tensor: a quotient with a Python number is a product with a reciprocal
    codes = form.encode(k * (qmax / amax)[..., None, None])
    return codes.flatten(2, 3)[:, :, :tokens].contiguous(), amax / qmax, smooth.squeeze(2)


def fake(k, kv_len, block_size, format="int8"):
    batch, heads, tokens, _ = k.shape
    return (
        k.new_empty(k.shape, dtype=row_format(NAME, format).dtype),
        k.new_empty((batch, heads, blocks_of(tokens, block_size)), dtype=torch.float32),
        k.new_empty((batch, heads, k.shape[3]), dtype=torch.float32),
    )


def bind(k, kv_len, block_size, format="int8"):
    batch, heads, tokens, depth = k.shape
    blocks = blocks_of(tokens, block_size)
    return {B: batch, H: heads, T: tokens, D: depth, nK: blocks, b_k: itemsize(k), b_len: itemsize(kv_len)}


define_op(
    "quantize_keys(Tensor k, Tensor? kv_len, int block_size, str format='int8') "
    "-> (Tensor kq, Tensor k_scale, Tensor smooth)",
    check=check,
    reference=reference,
    fake=fake,
    cost=OpCost(flops=0 * B, bytes=B * H * (T * D * (b_k + 1) + 4 * nK + 4 * D) + B * b_len, bind=bind),
)
