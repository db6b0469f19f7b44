"""Correct sparse attention by what the last refresh learned about the dropped blocks (SSAR, arXiv 2509.23681 sec. 3.3).

First and second order, D = A_full - A_sparse (eq. 10, 11, 16):

Refresh, before:  refresh = quantsparse.refresh_attention(..., "residual", ...)      # refresh[2] is D
         after:   copy_ = aten.copy_(residual, refresh[2])
                  factors = quantsparse.low_rank(refresh[2] - residual, rank)        # second order only
                  copy__1 = aten.copy_(left, factors[0]); copy__2 = aten.copy_(right, factors[1])
Sparse, before:   o = sparse[0]
        after:    o = quantsparse.add_residual(sparse[0], residual, residual_scale, left, right, gain)

The complement form caches the output and log-sum-exp of the dropped blocks; the sparse step resumes its softmax there:

Refresh, after:   aten.copy_(state_o, refresh[2]); aten.copy_(state_lse, refresh[3])
Sparse, after:    sparse = quantsparse.sparse_attention(..., state_o, state_lse, ...)

Caches are graph inputs of one (video, layer, branch), written by aten.copy_ alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from ..ops.expand_w4 import join_nibbles, unpack_int4
from ..runtime.inputs import Cached
from .base import GraphPass, PassContext, PassResult, Phase, splice
from .quantize_linear import _call
from .sparsify_attention import _fake, _flag

aten, qs = torch.ops.aten, torch.ops.quantsparse


class ReparameterizeResidual(GraphPass):
    """Write the correction's caches in the refresh phase and read them in the sparse phase."""

    name = "reparameterize_residual"
    after = ("sparsify_attention",)

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        result = PassResult()
        if context.recipe.correction == "none" or context.phase is Phase.DENSE:
            return result
        refresh = context.phase is Phase.REFRESH
        target = qs.refresh_attention.default if refresh else qs.sparse_attention.default
        for node in graph.find_nodes(op="call_function", target=target):
            if "qs_site" not in node.meta:
                continue
            if refresh:
                self.write(graph, node, context)
            else:
                self.read(graph, node, context)
            result.matched += 1
        return result

    def write(self, graph: fx.Graph, node: fx.Node, context: PassContext) -> None:
        """Renew the caches after a refresh."""
        recipe, site = context.recipe, node.meta["qs_site"].index
        anchor = node.next
        with graph.inserting_before(anchor):
            correction = _call(graph, node, operator.getitem, node, 2)
            lse = _call(graph, node, operator.getitem, node, 3)
        caches = self.residual_inputs(graph, context, site, correction)
        stored = splice(graph, anchor, store(recipe.cache_format), correction)
        stored = stored if isinstance(stored, tuple) else (stored,)
        if recipe.correction == "second_order":
            first = _flag(context, correction, "new_video")
            factors = splice(graph, anchor, _second_order(recipe.rank), first, correction, *caches)
            caches += self.factor_inputs(context, site, correction, recipe.rank)
            stored += tuple(factors)
        if recipe.correction == "complement":
            caches += (self.lse_input(context, site, lse),)
            stored += (lse,)
        with graph.inserting_before(anchor):
            for cache, new in zip(caches, stored, strict=True):
                _call(graph, node, aten.copy_.default, cache, new)

    def read(self, graph: fx.Graph, node: fx.Node, context: PassContext) -> None:
        """Use the caches in a sparse step."""
        recipe, site = context.recipe, node.meta["qs_site"].index
        (out,) = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
        residual, *scale = self.residual_inputs(graph, context, site, out)
        if recipe.correction == "complement":
            state = splice(graph, node, load(recipe.cache_format, out.meta["val"].dtype), residual, *scale)
            lse = self.lse_input(context, site, out)
            arguments = list(node.args)
            arguments[9:11] = [state, lse]
            node.args = tuple(arguments)
            return
        left = right = gain = None
        if recipe.correction == "second_order":
            left, right = self.factor_inputs(context, site, out, recipe.rank)
            gain = _flag(context, out, "gain")
        with graph.inserting_after(out):
            new = _call(graph, node, qs.add_residual.default, out, residual, *(scale or [None]), left, right, gain)
        out.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def residual_inputs(
        self, graph: fx.Graph, context: PassContext, site: int, like: fx.Node
    ) -> tuple[fx.Node, ...]:
        """Graph inputs that hold one site's residual in the recipe's cache format."""
        with like.meta["val"].fake_mode:
            values = store(context.recipe.cache_format)(like.meta["val"])
        values = values if isinstance(values, tuple) else (values,)
        return tuple(
            context.add_input(f"{name}_{site}", value, Cached(site, name))
            for name, value in zip(("residual", "residual_scale"), values, strict=False)
        )

    def factor_inputs(self, context: PassContext, site: int, like: fx.Node, rank: int) -> tuple[fx.Node, fx.Node]:
        """Graph inputs for the factors of the second-order term: (B, H, S, r) and (B, H, r, D)."""
        batch, heads, rows, dim = like.meta["val"].shape
        rank = min(rank, dim)
        dtype = like.meta["val"].dtype
        return (
            context.add_input(f"left_{site}", _fake(like, (batch, heads, rows, rank), dtype), Cached(site, "left")),
            context.add_input(f"right_{site}", _fake(like, (batch, heads, rank, dim), dtype), Cached(site, "right")),
        )

    def lse_input(self, context: PassContext, site: int, like: fx.Node) -> fx.Node:
        """Graph input for the log-sum-exp of the dropped blocks, (B, H, S) fp32."""
        shape = tuple(like.meta["val"].shape[:3])
        return context.add_input(f"state_lse_{site}", _fake(like, shape, torch.float32), Cached(site, "state_lse"))


def store(cache_format: str) -> Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
    """Function that turns a correction (B, H, S, D) into what the cache holds."""

    def to_cache(x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if cache_format == "bf16":
            return x.to(torch.bfloat16)
        values, scale = qs.quantize_rows.default(x, None, None, cache_format)
        return (join_nibbles(values) if cache_format == "int4" else values), scale

    return to_cache


def load(cache_format: str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """The inverse of `store`, in `dtype`."""

    def from_cache(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        if scale is None:
            return x.to(dtype)
        values = unpack_int4(x) if cache_format == "int4" else x
        return (values.float() * scale[..., None]).to(dtype)

    return from_cache


def _second_order(rank: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """lowrank_r(D - D_prev), zero at the first refresh of a video, which has no D_prev."""

    def factors(
        first: torch.Tensor, new: torch.Tensor, old: torch.Tensor, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache_format = "bf16" if scale is None else "int4" if old.dtype == torch.uint8 else "int8"
        difference = new - load(cache_format, new.dtype)(old, scale)
        difference = torch.where(first, torch.zeros_like(difference), difference)
        return qs.low_rank.default(difference, min(rank, new.shape[-1]))

    return factors
