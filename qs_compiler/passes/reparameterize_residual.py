"""Correct sparse attention by what the last refresh learned about the dropped blocks (SSAR, arXiv 2509.23681 sec. 3.3).

First and second order, D = A_full - A_sparse (eq. 10, 11, 16):

Refresh, before:  refresh = quantsparse.refresh_attention(..., "residual", ...)      # refresh[2] is D
         after:   copy_ = aten.copy_(residual, refresh[2])
                  factors = quantsparse.low_rank(refresh[2] - residual, rank)        # second order only
                  copy__1 = aten.copy_(left, factors[0]); copy__2 = aten.copy_(right, factors[1])
Sparse, before:   o = sparse[0]
        after:    o = quantsparse.add_residual(sparse[0], residual, residual_scale, left, right, gain)

The complement form caches the output and log-sum-exp of the dropped blocks; the sparse step resumes its softmax there
(8-bit keys are less their mean: what it took from the log-sum-exp is added here, and taken again in the sparse step):

Refresh, after:   aten.copy_(state_o, refresh[2]); aten.copy_(state_lse, refresh[3])
Sparse, after:    sparse = quantsparse.sparse_attention(..., state_o, state_lse, ...)

The mixture lies between first order (g = 0) and a complement whose log-sum-exp follows that of the kept blocks (g = 1).
With w the dropped share of a row's softmax at the refresh, and g one gain a head, a later step is

    A_full ~ A_sparse + D - g w (A_sparse - A_sparse(ref)) = (1 - g w) A_sparse + [D + g w A_sparse(ref)]

Refresh, after:   w = 1 - exp(refresh[3] - refresh[1])
                  aten.copy_(residual, refresh[2] + gains * w * (refresh[0] - refresh[2]))
                  aten.copy_(mixture_weight, gains * w)
Sparse, after:    o = quantsparse.add_residual(sparse[0] * (1 - mixture_weight), residual, ...)

With a cache format of rank r the residual itself is stored as factors, residual ~ residual_left residual_right.

Caches are graph inputs of one (video, layer, branch), written by aten.copy_ alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from ..ops.expand_w4 import join_nibbles, unpack_int4
from ..runtime.cache_layout import FACTORS, MIXTURE_WEIGHT, SCALES, VALUES, cache_rank, cache_slots
from ..runtime.inputs import HeadGains
from .base import AttentionSite, GraphPass, PassContext, PassResult, Phase, call, splice
from .cache_inputs import cache_input, fake, flag

aten, qs = torch.ops.aten, torch.ops.quantsparse


class ReparameterizeResidual(GraphPass):
    """Write the correction's caches in the refresh phase and read them in the sparse phase."""

    name = "reparameterize_residual"
    after = ("sparsify_attention", "quantize_attention")

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        result = PassResult()
        if context.recipe.correction == "none" or context.phase is Phase.DENSE:
            return result
        for target, rewrite in (
            (qs.refresh_attention.default, self.write),
            (qs.sparse_attention.default, self.read),
        ):
            for node in graph.find_nodes(op="call_function", target=target):
                if "qs_site" in node.meta:
                    rewrite(graph, node, context)
                    result.matched += 1
        return result

    def write(self, graph: fx.Graph, node: fx.Node, context: PassContext) -> None:
        """Renew the caches after a refresh."""
        recipe, site = context.recipe, node.meta["qs_site"]
        anchor = node.next
        with graph.inserting_before(anchor):
            correction = call(graph, node, operator.getitem, node, 2)
            lse = call(graph, node, operator.getitem, node, 3)
        if recipe.correction == "mixture":
            with graph.inserting_before(anchor):
                dense, dense_lse = (call(graph, node, operator.getitem, node, i) for i in (0, 1))
            gains = gains_input(context, site, correction)
            correction, weight = splice(graph, anchor, _mixture, dense, dense_lse, correction, lse, gains)
        caches = residual_inputs(context, site, correction)
        stored = splice(graph, anchor, store(recipe.cache_format), correction)
        if recipe.correction == "second_order":
            first = flag(context, site, correction, "new_video")
            change = _second_order(recipe.cache_format, recipe.rank)
            stored += splice(graph, anchor, change, first, correction, *caches)
            caches += factor_inputs(context, site, correction)
        if recipe.correction == "complement":
            if (shift := node.meta.get("qs_lse_shift")) is not None:
                lse = splice(graph, anchor, torch.add, lse, shift)
            caches += (cache_input(context, site, "state_lse", lse),)
            stored += (lse,)
        if recipe.correction == "mixture":
            caches += (cache_input(context, site, "mixture_weight", lse),)
            stored += (weight,)
        with graph.inserting_before(anchor):
            for cache, new in zip(caches, stored, strict=True):
                call(graph, node, aten.copy_.default, cache, new)

    def read(self, graph: fx.Graph, node: fx.Node, context: PassContext) -> None:
        """Use the caches in a sparse step."""
        recipe, site = context.recipe, node.meta["qs_site"]
        (out,) = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
        caches = residual_inputs(context, site, out)
        if recipe.correction == "complement":
            state = splice(graph, node, load(recipe.cache_format, out.meta["val"].dtype), *caches)
            lse = cache_input(context, site, "state_lse", out)
            if (shift := node.meta.get("qs_lse_shift")) is not None:
                lse = splice(graph, node, torch.sub, lse, shift)
            arguments = list(node.args)
            arguments[9:11] = [state, lse]
            node.args = tuple(arguments)
            return
        terms: list[tuple[fx.Node | None, ...]] = []  # residual, its scale, left, right, gain
        second = (None, None, None)
        if recipe.correction == "second_order":
            second = (*factor_inputs(context, site, out), flag(context, site, out, "gain"))
        if cache_rank(recipe.cache_format) is None:
            terms.append((*caches, *(None,) * (2 - len(caches)), *second))
        else:
            terms.append((None, None, *caches, None))
            if second[0] is not None:
                terms.append((None, None, *second))
        new, consumers = out, list(out.users)
        if recipe.correction == "mixture":
            new = splice(graph, out.next, _weighted, out, cache_input(context, site, "mixture_weight", out))
        for term in terms:
            with graph.inserting_after(new):
                new = call(graph, node, qs.add_residual.default, new, *term)
        for consumer in consumers:
            consumer.replace_input_with(out, new)


def residual_inputs(context: PassContext, site: AttentionSite, like: fx.Node) -> tuple[fx.Node, ...]:
    """Graph inputs that hold one site's residual in the recipe's cache format."""
    slots = cache_slots(site.recipe, site.shape)
    return tuple(cache_input(context, site, name, like) for name in slots if name.startswith("residual"))


def factor_inputs(context: PassContext, site: AttentionSite, like: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Graph inputs for the factors of the second-order term: (B, H, S, r) and (B, H, r, D)."""
    return cache_input(context, site, "left", like), cache_input(context, site, "right", like)


def gains_input(context: PassContext, site: AttentionSite, like: fx.Node) -> fx.Node:
    """Graph input for the gains of a mixture, (H,) fp32: the artifact's for the layer that runs."""
    heads = site.shape[1]
    provider = HeadGains(site.anchor, heads, like.meta["val"].device)
    return context.add_input(f"gains_{site.index}", fake(like, (heads,), torch.float32), provider)


def store(cache_format: str) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Function that turns a correction (B, H, S, D) into what the slots of the cache hold, in their order."""

    def to_cache(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if (rank := cache_rank(cache_format)) is not None:
            left, right = qs.low_rank.default(x, min(rank, x.shape[-1]))
            return left.to(FACTORS), right.to(FACTORS)
        if cache_format not in SCALES:
            return (x.to(VALUES[cache_format]),)
        values, scale = qs.quantize_rows.default(x, None, None, cache_format)
        return join_nibbles(values) if cache_format == "int4" else values, scale.to(SCALES[cache_format])

    return to_cache


def load(cache_format: str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """The inverse of `store`, in `dtype`."""

    def from_cache(x: torch.Tensor, second: torch.Tensor | None = None) -> torch.Tensor:
        if second is None:
            return x.to(dtype)
        if cache_rank(cache_format) is not None:
            return x.to(dtype) @ second.to(dtype)
        values = unpack_int4(x) if cache_format == "int4" else x
        return (values.float() * second[..., None].float()).to(dtype)

    return from_cache


def _mixture(
    dense: torch.Tensor, lse: torch.Tensor, residual: torch.Tensor, lse_kept: torch.Tensor, gains: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a mixture adds in the steps to come, (B, H, S, D), and what their sparse output weighs less, (B, H, S)."""
    follows = gains[:, None] * (1 - torch.exp(torch.clamp(lse_kept - lse, max=0)))
    kept = dense.float() - residual.float()
    return (residual.float() + follows[..., None] * kept).to(residual.dtype), follows.to(MIXTURE_WEIGHT)


def _weighted(o: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (o.float() * (1 - weight.float()).unsqueeze(-1)).to(o.dtype)


def _second_order(cache_format: str, rank: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """lowrank_r(D - D_prev), zero at the first refresh of a video, which has no D_prev."""

    def factors(first: torch.Tensor, new: torch.Tensor, *old: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        difference = new - load(cache_format, new.dtype)(*old)
        difference = torch.where(first, torch.zeros_like(difference), difference)
        left, right = qs.low_rank.default(difference, min(rank, new.shape[-1]))
        return left.to(FACTORS), right.to(FACTORS)

    return factors
