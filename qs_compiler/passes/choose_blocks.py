"""Which key blocks a refresh keeps for the sparse steps after it; sparsify_attention puts this before its refresh.

    scores = torch.ops.quantsparse.block_scores.default(q, k, kv_len, scale, 128)      # or those of a static mask
    kept = torch.ops.quantsparse.select_blocks.default(scores, always_keep, budget, budgets)

`budgets` (H,) are fitted by calibration, those of the layer that runs; with `budgets="uniform"` there are none, every
head keeps `budget` blocks, and the lists have no room for more.

With `mask="mass"` a refresh leaves the mass of each key block to the next one, which ranks by it. The mass is estimated
by the log-sum-exps of the refresh before (ops/refresh_attention.py), so the first refresh of a video has none to leave,
and the second ranks by the scores of pooled q and k once more. What another video left is not read (`new_video`):

                 known = ~new_video & (block_mass.amax(-1, keepdim=True) > 0)
                 scores = torch.where(known, block_mass, scores)
                 refresh = torch.ops.quantsparse.refresh_attention.default(..., lse_prev or -inf if new_video, ...)
                 copy__2 = torch.ops.aten.copy_.default(lse_prev, refresh[1])
                 copy__3 = torch.ops.aten.copy_.default(block_mass, refresh[4].to(torch.bfloat16))
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from ..errors import RecipeError
from ..runtime.cache_layout import MASS, most_blocks, ranks_by_mass
from ..runtime.inputs import HeadBudgets
from ..runtime.token_layout import STATIC_MASKS, LayoutInput, layout_tensor
from .base import AttentionSite, PassContext, call, splice
from .cache_inputs import cache_input, fake, flag

aten, qs = torch.ops.aten, torch.ops.quantsparse


class BlockChoice:
    """The choice of the refresh that takes the place of one attention.

    Attributes:
        lists: graph inputs with the numbers and the indices of the kept blocks, of the refresh before until `store`.
    """

    def __init__(self, graph: fx.Graph, node: fx.Node, site: AttentionSite, context: PassContext) -> None:
        self._graph, self._node, self._site, self._context = graph, node, site, context
        self.lists = block_lists(site, context, node.args[0])

    def choose(self, scale: float) -> tuple[tuple[fx.Node, fx.Node], fx.Node | None]:
        """Insert the choice before the attention.

        Returns:
            numbers and indices of the kept blocks, as select_blocks gives them; the log-sum-exps of the refresh before,
            by which this one estimates the mass of its blocks, if it does.
        """
        graph, node, site, context = self._graph, self._node, self._site, self._context
        (q, k), recipe, kv_len = node.args[:2], context.recipe, node.meta.get("kv_len")
        if recipe.mask in STATIC_MASKS:
            scores = splice(graph, node, _for_all_heads, _places(node, context, recipe.mask), q)
        else:
            scores = splice(graph, node, qs.block_scores.default, q, k, kv_len, scale, recipe.block_size)
        before = None
        if ranks_by_mass(recipe):
            mass, lse_prev = self._mass()
            first = flag(context, site, q, "new_video")
            scores = splice(graph, node, _by_mass, first, scores, mass)
            before = splice(graph, node, _unless_first, first, lse_prev)
        if recipe.correction == "second_order":
            # D and D_prev must belong to one mask, so a video keeps the mask of its first refresh.
            first = flag(context, site, q, "new_video")
            scores = splice(graph, node, _keep_old, first, scores, *self.lists)
        budgets = ()
        if recipe.budgets == "fitted":
            least = always_kept(node, site, context)
            budgets = (budgets_input(context, site, q, least, most_blocks(site.recipe, site.kv_blocks)),)
        if recipe.always_keep:
            always = _places(node, context, "always_kept")
            return splice(graph, node, qs.select_blocks.default, scores, always, site.budget, *budgets), before
        return splice(graph, node, _select, scores, site.budget, *budgets), before

    def store(self, kept: tuple[fx.Node, fx.Node], refresh: fx.Node) -> None:
        """Write the chosen blocks, and the mass that the refresh leaves, into the caches."""
        graph, node, site = self._graph, self._node, self._site
        stored = (kept[0], splice(graph, node, _listed, kept[1], most_blocks(site.recipe, site.kv_blocks)))
        with graph.inserting_before(node):
            for cache, new in zip(self.lists, stored, strict=True):
                call(graph, node, aten.copy_.default, cache, new)
            if ranks_by_mass(self._context.recipe):
                mass, lse_prev = self._mass()
                lse, new_mass = (call(graph, node, operator.getitem, refresh, i) for i in (1, 4))
                call(graph, node, aten.copy_.default, lse_prev, lse)
                call(graph, node, aten.copy_.default, mass, splice(graph, node, _stored_mass, new_mass))

    def _mass(self) -> tuple[fx.Node, ...]:
        return tuple(
            cache_input(self._context, self._site, slot, self._node.args[0]) for slot in ("block_mass", "lse_prev")
        )


def block_lists(site: AttentionSite, context: PassContext, q: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Graph inputs with the numbers and indices of the kept blocks of a site."""
    return cache_input(context, site, "kv_num_blocks", q), cache_input(context, site, "kv_indices", q)


def budgets_input(context: PassContext, site: AttentionSite, like: fx.Node, least: int, most: int) -> fx.Node:
    """Graph input for the key blocks of each head, (H,) int32: the artifact's for the layer that runs."""
    heads = site.shape[1]
    provider = HeadBudgets(site.anchor, heads, site.budget, least, most, like.meta["val"].device)
    return context.add_input(f"budgets_{site.index}", fake(like, (heads,), torch.int32), provider)


def always_kept(node: fx.Node, site: AttentionSite, context: PassContext) -> int:
    """The most key blocks that a query block of a site always keeps: its own is one.

    Raises:
        RecipeError: more than the budget.
    """
    sets = context.recipe.always_keep
    if not sets:
        return 1
    wanted = LayoutInput(node.meta["token_layout"], "always_kept", torch.device("cpu"), sets)
    most = int(layout_tensor(wanted).sum(-1).max())
    if most > site.budget:
        raise RecipeError(
            f"always_keep={list(sets)} keeps {most} of {site.kv_blocks} key blocks for one query block of {site.name}, "
            f"and density {site.recipe.density} leaves {site.budget}; raise the density or name fewer sets."
        )
    return most


def _places(node: fx.Node, context: PassContext, what: str) -> fx.Node:
    """The graph input with a static mask's scores or the always-kept blocks of an attention."""
    layout, device = node.meta["token_layout"], node.args[0].meta["val"].device
    sets = context.recipe.always_keep if what == "always_kept" else ()
    blocks = math.ceil(layout.tokens / layout.block_size)
    dtype = torch.bool if what == "always_kept" else torch.float32
    example = fake(node.args[0], (blocks, blocks), dtype)
    return context.add_input(what, example, LayoutInput(layout, what, device, sets))


def _for_all_heads(scores: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return scores.expand(*q.shape[:2], *scores.shape).contiguous()


def _select(scores: torch.Tensor, budget: int, *budgets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    always_keep = torch.eye(scores.shape[-2], scores.shape[-1], dtype=torch.bool, device=scores.device)
    return qs.select_blocks.default(scores, always_keep, budget, *budgets)


def _by_mass(first: torch.Tensor, pooled: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Scores (B, H, nQ, nK) float32 that rank by the mass of the refresh before, or pooled where a row has none.

    A row has none if no query of it had a log-sum-exp to estimate by, and counts as such if anything in it is NaN.
    """
    known = first.logical_not() & (mass.amax(-1, keepdim=True) > 0)
    return torch.where(known, mass.float(), pooled)


def _unless_first(first: torch.Tensor, lse_prev: torch.Tensor) -> torch.Tensor:
    """Log-sum-exps (B, H, S) of the refresh before; -inf, by which no mass is estimated, where there was none."""
    return lse_prev.masked_fill(first, float("-inf"))


def _stored_mass(mass: torch.Tensor) -> torch.Tensor:
    return mass.to(MASS)


def _keep_old(first: torch.Tensor, scores: torch.Tensor, number: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Scores that choose the listed blocks again, but in the first refresh of a video."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < number[..., None]
    old = torch.zeros_like(scores).scatter(-1, indices.long(), listed.to(scores.dtype))
    return torch.where(first, scores, old)


def _listed(indices: torch.Tensor, most: int) -> torch.Tensor:
    return indices[..., :most].to(torch.int16)
