"""The reference's engine: attention of whole query blocks over gathered key blocks.

Work falls with the number of blocks gathered and nothing is ever S x T, for lists that differ in each head.
"""

from __future__ import annotations

import torch

from .attention_inputs import blocks_of, key_lengths, token_scale
from .pack_values import unpack_values
from .softmax_state import divide, finite

# Elements of the largest buffer that one step may build, unless a single query block needs more.
WORKSPACE = 1 << 20


class GatheredAttention:
    """Attention inputs as flat rows. An entry is one query block of one head: (batch * H + head) * nQ + block.

    Arguments as in sparse_attention. `entries` is (B, H, nQ), the number of each entry.
    """

    def __init__(self, q, k, v, q_scale, k_scale, v_scale, kv_len, scale: float, block_size: int):
        batch, heads, self.tokens, self.depth = q.shape
        kv_heads, self.keys = k.shape[1], k.shape[2]
        self.heads, self.repeat, self.block_size, self.scale = heads, heads // kv_heads, block_size, scale
        self.query_blocks, self.key_blocks = blocks_of(self.tokens, block_size), blocks_of(self.keys, block_size)
        self.lengths = key_lengths(kv_len, k)
        if v.dtype == torch.uint8:
            v = unpack_values(v, self.keys)
        self.q, self.k, self.v = (x.reshape(-1, self.depth) for x in (q, k, v))
        self.q_scale = None if q_scale is None else token_scale(q_scale, self.tokens, block_size).reshape(-1)
        self.k_scale = None if k_scale is None else token_scale(k_scale, self.keys, block_size).reshape(-1)
        self.v_scale = None if v_scale is None else v_scale.reshape(-1, self.depth)
        self.within = torch.arange(block_size, device=q.device)
        shape = batch, heads, self.query_blocks
        self.entries = torch.arange(batch * heads * self.query_blocks, device=q.device).view(shape)

    def step(self, blocks: int) -> int:
        """How many entries to attend at a time if each has this many key blocks."""
        return max(1, WORKSPACE // max(1, blocks * self.block_size * max(self.block_size, self.depth)))

    def attend(self, entries: torch.Tensor, blocks: torch.Tensor, listed: torch.Tensor | None = None):
        """Entries (n,) over key blocks (n, m); `listed` (n, m) bool says which of them count, None all.

        Returns o (n, block, D), its lse (n, block), -inf without any key, and the softmax mass of each row on each key
        block (n, block, m), all float32.
        """
        head = entries // self.query_blocks
        batch, kv_head = head // self.heads, head // self.repeat
        position = (blocks[..., None] * self.block_size + self.within).flatten(1)
        valid = position < self.lengths[batch, None]
        if listed is not None:
            valid &= listed.repeat_interleave(self.block_size, 1)
        key = kv_head[:, None] * self.keys + position.clamp(max=self.keys - 1)
        query = (entries % self.query_blocks)[:, None] * self.block_size + self.within
        query = head[:, None] * self.tokens + query.clamp(max=self.tokens - 1)

        q, k, v = self.q[query].float() * self.scale, self.k[key].float(), self.v[key].float()
        if self.q_scale is not None:
            q *= self.q_scale[query][..., None]
        if self.k_scale is not None:
            k *= self.k_scale[key][..., None]
        if self.v_scale is not None:
            v *= self.v_scale[kv_head][:, None]
        weights = torch.bmm(q, k.mT)
        if not valid.all():
            # What is masked may be anything: it must not reach the product with v, where 0 * NaN is NaN.
            weights.masked_fill_(~valid[:, None], float("-inf"))
            v.masked_fill_(~valid[..., None], 0)
        shift = finite(weights.amax(-1)) if blocks.shape[1] else weights.new_zeros(query.shape)
        weights.sub_(shift[..., None]).exp_()
        mass = weights.view(*query.shape, blocks.shape[1], self.block_size).sum(-1)
        total = mass.sum(-1)
        return divide(torch.bmm(weights, v), total), shift + torch.log(total), divide(mass, total)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Results of all entries (entries, block, ...) -> (B, H, S, ...), contiguous."""
        batch, heads, query_blocks = self.entries.shape
        x = x.view(batch, heads, query_blocks * self.block_size, *x.shape[2:])
        return x[:, :, : self.tokens].contiguous()
