"""What heads differ in, by least squares, while the full-precision model denoises: gains, and numbers of kept blocks.

k steps after a refresh, first order misses y = D(k) - D(ref), the change of the residual D = A_full - A_sparse. The
mixture adds -g x with x = w (A_sparse(k) - A_sparse(ref)), w the dropped share of the row's softmax at the refresh. The
gain of a head is the one that misses least in squares over all its sparse steps:

    g = -sum(x . y) / sum(x . x), within [0, 1]

What is missed falls with the number of blocks that a head keeps, for some heads faster than for others. It is measured
for eighths of the uniform number at once, as one softmax that takes in a head's blocks in the order of their rank. The
blocks of a layer then go where they take most off the sum over its heads (`spread`), so that its density stays.

Densities, schedule, order of tokens, masks and always-kept blocks are those of the recipe; a `mass` mask counts as
`pooled`, since the two choose nearly alike (docs/masks.md). The model goes on with its dense outputs. Some rows of a
few query blocks of each attention are enough, so a run costs little more than without.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.softmax_state import divide, finite
from ..options import Recipe
from ..passes.sparsify_attention import MIN_BLOCKS
from ..runtime.cache_layout import block_budget, head_limit
from ..runtime.head_values import GAINS, SHARES
from ..runtime.prefix_masks import NO_PREFIX, shortest_prefix
from ..runtime.schedule import Schedule
from ..runtime.seen_grid import Grid
from ..runtime.token_layout import STATIC_MASKS, LayoutInput, TokenLayout, layout_tensor
from ..runtime.tracker import Video, track
from .attention_call import AttentionCall, AttentionListener
from .block_shares import spread
from .token_places import PlacesHeard

qs = torch.ops.quantsparse
QUERY_BLOCKS, ROWS = 8, 32  # of each attention, and of each of those blocks
UNITS = 8  # in which shares of the uniform number of blocks are counted


@dataclasses.dataclass
class _Reference:
    """What a refresh leaves, for C numbers of blocks: `kept` and `residual` (B, H, C, rows, D) in q's dtype, `dropped`
    (B, H, C, rows) fp32, and the rank of each key block (B, H, Q, blocks).
    """

    step: int
    rank: torch.Tensor
    kept: torch.Tensor
    residual: torch.Tensor
    dropped: torch.Tensor


def fits_heads(recipe: Recipe) -> bool:
    """Whether a recipe has values of heads to fit."""
    return recipe.sparse and (recipe.correction == "mixture" or recipe.budgets == "fitted")


class HeadFit(AttentionListener):
    """While open, looks on as `model` denoises with announced steps; `values()` is what was learned.

    Args:
        model: in full precision, not compiled.
        recipe: its densities, masks, correction and schedule are those of the run to come.
        grid: (t, h, w) of the video tokens; None: as the model's calls tell (token_places.py).

    Attributes:
        announced: whether an attention ran in an announced step: from others nothing can be learned.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, grid: Grid | None = None) -> None:
        super().__init__()
        self.recipe, self._model = recipe, model
        self.announced = False
        self._places = PlacesHeard(grid)
        self._schedule = Schedule.of(recipe)
        self._tracker = track(model)
        self._path: list[str] = []  # of the modules that are running, the innermost last
        self._hooks: list[Any] = []
        self._video: Video | None = None
        self._references: dict[tuple[Any, ...], _Reference] = {}
        self._counts: dict[str, int] = {}
        # Sums (4, H, C) over rows, steps and videos: x . x, x . y, y . y and D . D.
        self._sums: dict[str, torch.Tensor] = {}

    def __enter__(self) -> HeadFit:
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

    def values(self) -> dict[str, dict[str, torch.Tensor]]:
        """Kind of value (runtime/head_values.py) -> name of an attention module -> (H,) fp32 on the CPU."""
        found: dict[str, dict[str, torch.Tensor]] = {GAINS: {}, SHARES: {}}
        for name, sums in self._sums.items():
            xx, xy, yy, energy = sums.cpu()
            gains = (-xy / xx.clamp_min(torch.finfo(xx.dtype).tiny)).clamp(0, 1)
            place = torch.zeros(len(xx), 1, dtype=torch.long)
            if self.recipe.budgets == "fitted":
                missed = {"none": energy, "mixture": yy + gains * (2 * xy + gains * xx)}.get(self.recipe.correction, yy)
                units = spread(missed, UNITS * len(xx))
                found[SHARES][name] = units.float() / UNITS
                place = units[:, None] - 1
            if self.recipe.correction == "mixture":
                found[GAINS][name] = gains.gather(1, place)[:, 0].float()
        return found

    def state(self) -> dict[str, Any]:
        """What was learned so far, as tensors and flags."""
        return {"announced": self.announced, "sums": dict(self._sums)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from an earlier `state()`, whose tensors may lie on another device."""
        self.announced, self._sums = state["announced"], dict(state["sums"])

    def _units(self, name: str) -> list[int]:
        """What is looked at of a layer."""
        if self.recipe.budgets == "uniform":
            return [UNITS]
        return list(range(1, int(head_limit(UNITS, UNITS / self.recipe.for_layer(name).density)) + 1))

    def _begin(self, name: str) -> None:
        if not self._path:
            self._counts.clear()
            self._places.forget()
        self._path.append(name)

    def _end(self) -> None:
        self._path.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        self._places.hear(func, args, kwargs or {}, out)
        return out

    @torch.no_grad()
    def hear(self, call: AttentionCall) -> None:
        """Take what a refresh leaves, or what a sparse step says about it."""
        signal = self._tracker.signal if self._path else None
        if signal is None:
            return
        self.announced = True
        query, key, value = call.query, call.key, call.value
        name, block = self._path[-1], self.recipe.block_size
        step = self._schedule.refresh_step(signal.step, signal.num_steps)
        if step is None or call.is_causal or not call.is_self_attention:
            return
        whole, blocks = query.shape[2] // block, -(-query.shape[2] // block)
        budget = block_budget(self.recipe.for_layer(name).density, blocks)  # the uniform one
        kv_len = _prefix(call)
        if blocks < MIN_BLOCKS or budget >= blocks or (call.attn_mask is not None and kv_len is None):
            return
        layout = self._layout(call, kv_len)
        if layout is None and self.recipe.needs_places:
            return  # it stays dense
        if layout is not None and layout.tiled:
            order = layout_tensor(LayoutInput(layout, "order", query.device))
            query, key, value = (x.index_select(2, order) for x in (query, key, value))
        if signal.video is not self._video:
            self._video = signal.video
            self._references.clear()
        self._counts[name] = self._counts.get(name, -1) + 1
        site = (name, self._counts[name], signal.branch)
        chosen = torch.linspace(0, whole - 1, min(whole, QUERY_BLOCKS), device=query.device).round().long()
        rows = query[:, :, : whole * block].unflatten(2, (whole, block))[:, :, chosen, :: max(1, block // ROWS)]
        reference = self._references.get(site)
        fresh = reference is None or reference.step != step
        if fresh:
            scores, always = self._scores(query, key, kv_len, call.logit_scale, layout, blocks)
            ranked = scores[:, :, chosen].masked_fill(always[chosen], torch.inf)
            rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        else:
            rank = reference.rank
        counts = [min(max(1, round(budget * units / UNITS)), blocks) for units in self._units(name)]
        o, lse = attention_by_count(rows, key, value, rank, counts, kv_len, call.logit_scale, block)
        kept, residual = o[:, :, :-1], o[:, :, -1:] - o[:, :, :-1]
        if fresh:
            dropped = 1 - torch.exp(torch.clamp(lse[:, :, :-1] - lse[:, :, -1:], max=0))
            self._references[site] = _Reference(
                step, rank, kept.to(query.dtype), residual.to(query.dtype), torch.nan_to_num(dropped)
            )
            return
        x = reference.dropped[..., None] * (kept - reference.kept.float())
        y = residual - reference.residual.float()
        pairs = ((x, x), (x, y), (y, y), (residual, residual))
        found = torch.stack([(a * b).sum((0, 3, 4)) for a, b in pairs]).double()
        old = self._sums.get(name)
        self._sums[name] = found if old is None else old.to(found.device) + found

    def _layout(self, call: AttentionCall, kv_len: torch.Tensor | None) -> TokenLayout | None:
        """Where the tokens lie, if the recipe has a use for it; tokens stay in rows where the padding hides some."""
        if not self.recipe.needs_grid:
            return None
        layout = self._places.layout(len(call.query), call.query.shape[2], self.recipe)
        if layout is None or kv_len is None or bool((kv_len >= layout.start + math.prod(layout.grid)).all()):
            return layout
        return dataclasses.replace(layout, tiled=False)

    def _scores(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        kv_len: torch.Tensor | None,
        scale: float,
        layout: TokenLayout | None,
        blocks: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a refresh ranks by, (B, H, blocks, blocks), and the blocks that it keeps whatever their rank."""
        recipe, device = self.recipe, query.device
        if layout is not None and recipe.mask in STATIC_MASKS:
            static = layout_tensor(LayoutInput(layout, recipe.mask, device))
            scores = static.expand(*query.shape[:2], *static.shape)
        else:
            scores = qs.block_scores.default(query, key, kv_len, scale, recipe.block_size)
        if layout is not None and recipe.always_keep:
            return scores, layout_tensor(LayoutInput(layout, "always_kept", device, recipe.always_keep))
        return scores, torch.eye(blocks, dtype=torch.bool, device=device)


def attention_by_count(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rank: torch.Tensor,
    counts: list[int],
    kv_len: torch.Tensor | None,
    scale: float,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some rows over the first counts[0], counts[1], ... key blocks of a ranking, and over all.

    Args:
        q: (B, H, Q, R, D), R rows of each of Q query blocks.
        k, v: (B, Hkv, T, D).
        rank: (B, H, Q, blocks) integers, 0 for the block that is taken first.
        counts: C of them, ascending.
        kv_len: (B,), keys from there on are masked.

    Returns:
        o (B, H, C + 1, Q R, D) and log-sum-exp (B, H, C + 1, Q R), both fp32. One head is looked at a time.
    """
    blocks, last = rank.shape[-1], len(counts)
    bounds = torch.tensor([*counts, blocks], device=q.device)
    part = torch.searchsorted(bounds, rank, right=True)  # in which a key block is first taken
    padding = (0, 0, 0, blocks * block - k.shape[2])
    outputs, sums = [], []
    for batch in range(len(q)):
        length = k.shape[2] if kv_len is None else int(kv_len[batch])
        for head in range(q.shape[1]):
            own = head * k.shape[1] // q.shape[1]
            keys, values = (F.pad(x[batch, own].float(), padding) for x in (k, v))
            values[length:] = 0  # what is masked may be anything, and 0 * NaN is NaN
            logits = q[batch, head].float() @ keys.mT * scale
            logits[..., length:] = -torch.inf
            shift = finite(logits.amax(-1))
            weights = (logits - shift[..., None]).exp().unflatten(-1, (blocks, block))
            of_blocks = torch.einsum("qrnb,nbd->qnrd", weights, values.unflatten(0, (blocks, block)))
            taken = F.one_hot(part[batch, head], last + 1).float()
            total = torch.einsum("qnc,qnrd->cqrd", taken, of_blocks).cumsum(0).flatten(1, 2)
            mass = torch.einsum("qnc,qrn->cqr", taken, weights.sum(-1)).cumsum(0).flatten(1, 2)
            outputs.append(divide(total, mass))
            sums.append(shift.flatten() + torch.log(mass))
    o, lse = (torch.stack(x).unflatten(0, q.shape[:2]) for x in (outputs, sums))
    return o, lse


def _prefix(call: AttentionCall) -> torch.Tensor | None:
    """Lengths (B,) of a mask that keeps the first keys of each clip; None for any other, and for none."""
    if call.attn_mask is None or not call.masks_keys_alone:
        return None
    keys = call.attn_mask[:, 0, 0]
    if shortest_prefix(keys) == NO_PREFIX:
        return None
    return keys.sum(-1, dtype=torch.int32).expand(len(call.query))
