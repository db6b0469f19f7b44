"""The gains of the mixture correction: one a head, by least squares, while the full-precision model denoises.

k steps after a refresh, first order misses y = D(k) - D(ref), the change of the residual D = A_full - A_sparse. The
mixture adds -g x with x = w (A_sparse(k) - A_sparse(ref)), w the dropped share of the row's softmax at the refresh. The
gain of a head is the one that misses least in squares over all its sparse steps:

    g = -sum(x . y) / sum(x . x), within [0, 1]

Masks and schedule are those of the recipe; the model goes on with its dense outputs. A few query blocks of each
attention are enough, so a run costs little more than without.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..options import Recipe
from ..passes.sparsify_attention import MIN_BLOCKS
from ..runtime.cache_layout import block_budget
from ..runtime.schedule import Schedule
from ..runtime.tracker import Video, track
from .attention_call import AttentionCall, AttentionListener

qs = torch.ops.quantsparse
QUERY_BLOCKS = 8


@dataclasses.dataclass
class _Reference:
    """What a refresh leaves: `kept` and `residual` (B, H, rows, D) in q's dtype, `dropped` (B, H, rows) fp32."""

    step: int
    lists: tuple[torch.Tensor, torch.Tensor]
    kept: torch.Tensor
    residual: torch.Tensor
    dropped: torch.Tensor


def fits_gains(recipe: Recipe) -> bool:
    """Whether a recipe has gains to fit."""
    return recipe.density < 1 and recipe.correction == "mixture"


class GainFit(AttentionListener):
    """While open, looks on as `model` denoises with announced steps; `gains()` is what was learned.

    Args:
        model: in full precision, not compiled.
        recipe: its density, mask blocks, interval and warm-up are those of the run to come.

    Attributes:
        announced: whether an attention ran in an announced step: from others nothing can be learned.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self._model = recipe, model
        self.announced = False
        self._schedule = Schedule.of(recipe)
        self._tracker = track(model)
        self._path: list[str] = []  # of the modules that are running, the innermost last
        self._hooks: list[Any] = []
        self._video: Video | None = None
        self._references: dict[tuple[Any, ...], _Reference] = {}
        self._counts: dict[str, int] = {}
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __enter__(self) -> GainFit:
        for name, module in self._model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._begin(name)))
            self._hooks.append(module.register_forward_hook(lambda *_: self._end(), always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._references.clear()

    def gains(self) -> dict[str, torch.Tensor]:
        """Qualified name of an attention module -> its gains, (H,) fp32 on the CPU."""
        return {
            name: (xy / xx.clamp_min(torch.finfo(xx.dtype).tiny)).clamp(0, 1).float().cpu()
            for name, (xy, xx) in self._sums.items()
        }

    def state(self) -> dict[str, Any]:
        """What was learned so far, as tensors and flags."""
        return {"announced": self.announced, "sums": dict(self._sums)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from an earlier `state()`, whose tensors may lie on another device."""
        self.announced, self._sums = state["announced"], dict(state["sums"])

    def _begin(self, name: str) -> None:
        if not self._path:
            self._counts.clear()
        self._path.append(name)

    def _end(self) -> None:
        self._path.pop()

    @torch.no_grad()
    def hear(self, call: AttentionCall) -> None:
        """Take what a refresh leaves, or what a sparse step says about it."""
        signal = self._tracker.signal if self._path else None
        if signal is None:
            return
        self.announced = True
        query, key = call.query, call.key
        name, block = self._path[-1], self.recipe.block_size
        step = self._schedule.refresh_step(signal.step, signal.num_steps)
        if step is None or call.is_causal or not call.is_self_attention:
            return
        whole, blocks = query.shape[2] // block, -(-query.shape[2] // block)
        budget = block_budget(self.recipe.density, blocks)
        kv_len = _prefix(call)
        if blocks < MIN_BLOCKS or budget >= blocks or (call.attn_mask is not None and kv_len is None):
            return
        if signal.video is not self._video:
            self._video = signal.video
            self._references.clear()
        self._counts[name] = self._counts.get(name, -1) + 1
        site = (name, self._counts[name], signal.branch)
        chosen = torch.linspace(0, whole - 1, min(whole, QUERY_BLOCKS), device=query.device).round().long()
        q = query[:, :, : whole * block].unflatten(2, (whole, block))[:, :, chosen].flatten(2, 3)
        scale = call.logit_scale
        reference = self._references.get(site)
        fresh = reference is None or reference.step != step
        if fresh:
            own = torch.eye(blocks, dtype=torch.bool, device=q.device)[chosen]
            lists = qs.select_blocks.default(qs.block_scores.default(q, key, kv_len, scale, block), own, budget)
        else:
            lists = reference.lists
        o, lse, residual, lse_kept, _ = qs.refresh_attention.default(
            q, key, call.value, None, None, None, *lists, kv_len, None, "residual", scale, block, torch.float32
        )
        if fresh:
            dropped = 1 - torch.exp(torch.clamp(lse_kept - lse, max=0))
            self._references[site] = _Reference(
                step, lists, (o - residual).to(q.dtype), residual.to(q.dtype), torch.nan_to_num(dropped)
            )
            return
        x = reference.dropped[..., None] * (o - residual - reference.kept.float())
        y = residual - reference.residual.float()
        found = (-(x * y).sum((0, 2, 3)).double(), x.square().sum((0, 2, 3)).double())
        old = self._sums.get(name)
        if old is not None:
            found = tuple(a.to(b.device) + b for a, b in zip(old, found, strict=True))
        self._sums[name] = found


def _prefix(call: AttentionCall) -> torch.Tensor | None:
    """Lengths (B,) of a mask that keeps the first keys of each clip; None for any other, and for none."""
    if call.attn_mask is None or not call.masks_keys_alone:
        return None
    keys = call.attn_mask[:, 0, 0]
    if bool((keys[:, 1:] & ~keys[:, :-1]).any()):
        return None
    return keys.sum(-1, dtype=torch.int32).expand(len(call.query))
