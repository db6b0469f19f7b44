"""The self-attentions of a student as sparse steps compute them: over kept blocks, corrected by what those leave out.

    student = A_kept(q, k, v) + (A_full - A_kept) of full precision

Blocks are chosen, and the residual is taken, by the full-precision q, k and v of the same forward, so the gap that is
left is that of quantisation inside the kept blocks: the age of a cached residual is no part of it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..options import Recipe
from ..passes.sparsify_attention import MIN_BLOCKS
from ..runtime.cache_layout import block_budget
from .attention_call import AttentionCall, AttentionListener

qs = torch.ops.quantsparse


@dataclasses.dataclass(frozen=True, eq=False)
class SparseTarget:
    """Kept key blocks (B, H, Q, kept) int64 and the residual (B, H, L, D) of one attention, both on the CPU."""

    blocks: torch.Tensor
    residual: torch.Tensor


class SparseTargets(AttentionListener):
    """While open, finds in `found` the target of each self-attention; None where sparse steps compute it whole."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.found: list[SparseTarget | None] = []

    @torch.no_grad()
    def hear(self, call: AttentionCall) -> None:
        """Look at a call in full precision."""
        if not call.is_self_attention:
            return
        q, k, size = call.query, call.key, self.recipe.block_size
        count = -(-q.shape[2] // size)
        budget = block_budget(self.recipe.density, count)
        if call.attn_mask is not None or call.is_causal or call.enable_gqa or count < MIN_BLOCKS or budget >= count:
            self.found.append(None)
            return
        own = torch.eye(count, dtype=torch.bool, device=q.device)
        lists = qs.select_blocks.default(qs.block_scores.default(q, k, None, call.logit_scale, size), own, budget)
        blocks = lists[1][..., :budget].long()
        residual = F.scaled_dot_product_attention(q, k, call.value, scale=call.logit_scale)
        residual = residual - attend(q, k, call.value, blocks, size, call.logit_scale)
        self.found.append(SparseTarget(blocks.cpu(), residual.cpu()))


class SparseStudent(TorchFunctionMode):
    """While open, self-attentions are computed as their targets say, in the order of the calls."""

    def __init__(self, targets: list[SparseTarget | None], block_size: int) -> None:
        super().__init__()
        self._targets, self._size = iter(targets), block_size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = AttentionCall(*args, **kwargs) if func is F.scaled_dot_product_attention else None
        target = next(self._targets) if call is not None and call.is_self_attention else None
        if call is None or target is None:
            return func(*args, **kwargs)
        q, blocks = call.query, target.blocks.to(call.query.device)
        return attend(q, call.key, call.value, blocks, self._size, call.logit_scale) + target.residual.to(q)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, size: int, scale: float
) -> torch.Tensor:
    """Differentiable attention over kept blocks of `size` keys: q, k, v (B, H, L, D), blocks (B, H, Q, kept) int64.

    One row of blocks exists at a time; for the gradients it is gathered again. The last block may be shorter.
    """
    length = k.shape[2]

    def of_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        tokens = (kept[..., None] * size + torch.arange(size, device=q.device)).flatten(2)
        real = (tokens < length)[:, :, None]
        chosen = tokens.clamp(max=length - 1)[..., None].expand(-1, -1, -1, k.shape[3])
        return F.scaled_dot_product_attention(q, k.gather(2, chosen), v.gather(2, chosen), real, scale=scale)

    once = functools.partial(checkpoint, of_row, use_reentrant=False, preserve_rng_state=False)
    rows = [once(part, k, v, blocks[:, :, i]) for i, part in enumerate(q.split(size, 2))]
    return torch.cat(rows, 2)
