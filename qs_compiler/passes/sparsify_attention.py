"""Run large self-attentions over a kept set of key blocks; renew that set, and what the correction needs, in refreshes.

Before:          o = torch.ops.aten.scaled_dot_product_attention.default(q, k, v)

After, sparse:   sparse = torch.ops.quantsparse.sparse_attention.default(q, k, v, ..., kv_num_blocks, kv_indices, ...)
                 o = sparse[0]

After, refresh:  scores = torch.ops.quantsparse.block_scores.default(q, k, kv_len, scale, 128)
                 kept = torch.ops.quantsparse.select_blocks.default(scores, always_keep, budget, budgets)
                 refresh = torch.ops.quantsparse.refresh_attention.default(q, k, v, ..., kept[0], kept[1], ...)
                 o = refresh[0]                                   # dense
                 copy_ = torch.ops.aten.copy_.default(kv_num_blocks, kept[0])
                 copy__1 = torch.ops.aten.copy_.default(kv_indices, kept[1][..., :most].to(torch.int16))

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

With adaptive refreshes a refresh keeps some rows of q as `probe`, and a sparse step copies into `drift` how far these
have moved since, |q - probe| / |probe|, which the runtime reads before the next step.

In the dense phase the pass only finds the sites. The block lists are graph inputs that belong to one
(video, layer, branch); a mask is chosen before the refresh that uses it and stays until the next one.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from .. import _compat
from ..blocks import module_path
from ..errors import RecipeError
from ..options import Recipe
from ..runtime.cache_layout import MASS, block_budget, cache_slots, most_blocks, probe_stride
from ..runtime.inputs import Cached, HeadBudgets, Scalar
from ..runtime.token_layout import STATIC_MASKS, LayoutInput, layout_tensor
from .base import AttentionSite, GraphPass, PassContext, PassResult, Phase, call, splice, upstream
from .trim_padding_mask import attention_mask

aten, qs = torch.ops.aten, torch.ops.quantsparse
MIN_BLOCKS = 4  # fewer key blocks than this leave nothing to choose


class SparsifyAttention(GraphPass):
    """Rewrite each eligible self-attention for the phase that is being built."""

    name = "sparsify_attention"
    after = ("quantize_linear", "order_tokens")

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        result = PassResult()
        if not context.recipe.sparse:
            return result
        ordinals: dict[int, int] = {}
        for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            reason = why_not(node, context)
            anchor = None if reason else find_anchor(node.args[0], context)
            if reason is None and anchor is None:
                reason = "no weight of the graph says which layer this is"
            needs = context.recipe.mask if context.recipe.mask in STATIC_MASKS else context.recipe.always_keep
            if reason is None and needs and "token_layout" not in node.meta:
                reason = f"{needs!r} needs the places of the tokens, which order_tokens did not find"
            if reason is not None:
                result.skip(node, reason)
                continue
            q, k = node.args[0].meta["val"], node.args[1].meta["val"]
            layer = layer_recipe(node, context)
            kv_blocks = math.ceil(_compat.static_hint(k.shape[2]) / layer.block_size)
            ordinals[anchor] = ordinals.get(anchor, -1) + 1
            site = AttentionSite(
                index=len(context.sites),
                name=node.name,
                anchor=anchor,
                ordinal=ordinals[anchor],
                recipe=layer,
                budget=block_budget(layer.density, kv_blocks),
                kv_blocks=kv_blocks,
                shape=tuple(q.shape),
            )
            always_kept(node, site, context)  # whether they fit into the budget is known in every phase
            context.sites.append(site)
            result.matched += 1
            if context.phase is Phase.DENSE:
                continue
            rewrite = self.refresh if context.phase_of(site) is Phase.REFRESH else self.sparse
            new = rewrite(graph, node, site, context)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        return result

    def sparse(self, graph: fx.Graph, node: fx.Node, site: AttentionSite, context: PassContext) -> fx.Node:
        """The sparse form of one attention."""
        q, k, v = node.args[:3]
        lists = _block_lists(site, context, q)
        if context.recipe.refresh == "adaptive":
            probe, drift = (cache_input(context, site, slot, q) for slot in ("probe", "drift"))
            moved = splice(graph, node, _drift, q, probe)
            with graph.inserting_before(node):
                call(graph, node, aten.copy_.default, drift, moved)
        with graph.inserting_before(node):
            both = call(
                graph, node, qs.sparse_attention.default, q, k, v, None, None, None, *lists, node.meta.get("kv_len"),
                None, None, _scale(node), context.recipe.block_size, node.meta["val"].dtype,
            )  # fmt: skip
            both.meta["qs_site"] = site
            return call(graph, node, operator.getitem, both, 0)

    def refresh(self, graph: fx.Graph, node: fx.Node, site: AttentionSite, context: PassContext) -> fx.Node:
        """The dense form that renews the block lists."""
        q, k, v = node.args[:3]
        recipe, kv_len = context.recipe, node.meta.get("kv_len")
        lists = _block_lists(site, context, q)
        if recipe.mask in STATIC_MASKS:
            scores = splice(graph, node, _for_all_heads, _places(node, context, recipe.mask), q)
        else:
            scores = splice(graph, node, qs.block_scores.default, q, k, kv_len, _scale(node), recipe.block_size)
        if recipe.refresh == "adaptive":
            renewed = splice(graph, node, _renewed, q)
            with graph.inserting_before(node):
                for slot, new in zip(("probe", "drift"), renewed, strict=True):
                    call(graph, node, aten.copy_.default, cache_input(context, site, slot, q), new)
        mass = before = None
        if recipe.mask == "mass":
            mass, lse_prev = (cache_input(context, site, slot, q) for slot in ("block_mass", "lse_prev"))
            first = flag(context, site, q, "new_video")
            scores = splice(graph, node, _by_mass, first, scores, mass)
            before = splice(graph, node, _unless_first, first, lse_prev)
        if recipe.correction == "second_order":
            # D and D_prev must belong to one mask, so a video keeps the mask of its first refresh.
            first = flag(context, site, q, "new_video")
            scores = splice(graph, node, _keep_old, first, scores, *lists)
        most = most_blocks(site.recipe, site.kv_blocks)
        budgets = ()
        if recipe.budgets == "fitted":
            budgets = (budgets_input(context, site, q, always_kept(node, site, context), most),)
        if recipe.always_keep:
            always = _places(node, context, "always_kept")
            kept = splice(graph, node, qs.select_blocks.default, scores, always, site.budget, *budgets)
        else:
            kept = splice(graph, node, _select, scores, site.budget, *budgets)
        stored = (kept[0], splice(graph, node, _listed, kept[1], most))
        with graph.inserting_before(node):
            correction = "complement" if recipe.correction == "complement" else "residual"
            many = call(
                graph, node, qs.refresh_attention.default, q, k, v, None, None, None, *kept, kv_len, before, correction,
                _scale(node), recipe.block_size, node.meta["val"].dtype,
            )  # fmt: skip
            many.meta["qs_site"] = site
            for cache, new in zip(lists, stored, strict=True):
                call(graph, node, aten.copy_.default, cache, new)
            if mass is not None:
                lse, new_mass = (call(graph, node, operator.getitem, many, i) for i in (1, 4))
                call(graph, node, aten.copy_.default, lse_prev, lse)
                call(graph, node, aten.copy_.default, mass, splice(graph, node, _stored_mass, new_mass))
            return call(graph, node, operator.getitem, many, 0)


def why_not_ours(node: fx.Node) -> str | None:
    """Why an attention is none that the ops of this package compute, or None."""
    q, k = node.args[0].meta["val"], node.args[1].meta["val"]
    named = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)), **node.kwargs}
    if named.get("is_causal"):
        return "causal attention"
    if named.get("dropout_p"):
        return "attention dropout"
    if attention_mask(node) is not None and "kv_len" not in node.meta:
        return "an attention mask that is not a prefix"
    if q.dim() != 4:
        return f"q has {q.dim()} dimensions, not (batch, heads, tokens, head_dim)"
    if _compat.static_hint(q.shape[2]) != _compat.static_hint(k.shape[2]):
        return "cross-attention"
    return None


def why_not(node: fx.Node, context: PassContext) -> str | None:
    """Why an attention stays dense in every phase, or None."""
    if (reason := why_not_ours(node)) is not None:
        return reason
    recipe = layer_recipe(node, context)
    keys = _compat.static_hint(node.args[1].meta["val"].shape[2])
    blocks = math.ceil(keys / recipe.block_size)
    if blocks < MIN_BLOCKS:
        return f"{keys} tokens are fewer than {MIN_BLOCKS} blocks of {recipe.block_size}"
    if block_budget(recipe.density, blocks) >= blocks:
        return f"density {recipe.density} keeps all {blocks} blocks"
    return None


def layer_recipe(node: fx.Node, context: PassContext) -> Recipe:
    """The recipe of the attention module that calls an attention."""
    return context.recipe.for_layer(module_path(node))


def find_anchor(q: fx.Node, context: PassContext) -> int | None:
    """Index of the graph input that identifies the layer: the weight of the nearest linear upstream of q."""
    owned = {p: i for i, p in enumerate(context.capture.placeholders[: len(context.capture.inputs)])}
    owned = {p: i for p, i in owned.items() if context.capture.inputs[i].owned}
    linears = {aten.linear.default, qs.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default}
    for node in upstream(q):
        if node.target in linears and (found := _nearest_input(node, owned, context)) is not None:
            return found
    return None


def _nearest_input(linear: fx.Node, owned: dict[fx.Node, int], context: PassContext) -> int | None:
    """The owned input behind the weight operand of a linear; a packed weight leads to the parameter that it packs."""
    for operand in linear.all_input_nodes[1:]:
        chain = [operand]
        while chain:
            node = chain.pop()
            if node in owned:
                return owned[node]
            if (source := context.packed_from.get(node)) is not None:
                return source
            if node.op != "placeholder" and node.target not in (qs.quantize_rows.default,):
                chain.extend(node.all_input_nodes)
    return None


def cache_input(context: PassContext, site: AttentionSite, slot: str, like: fx.Node) -> fx.Node:
    """The graph input that holds one slot of a site's caches, on the device of `like`."""
    layout = cache_slots(site.recipe, site.shape)[slot]
    example = _fake(like, layout.shape, layout.dtype)
    return context.add_input(f"{slot}_{site.index}", example, Cached(site.index, slot))


def _block_lists(site: AttentionSite, context: PassContext, q: fx.Node) -> tuple[fx.Node, fx.Node]:
    return cache_input(context, site, "kv_num_blocks", q), cache_input(context, site, "kv_indices", q)


def flag(context: PassContext, site: AttentionSite, like: fx.Node, name: str) -> fx.Node:
    """A 0-d input that the runtime sets for one site at every call."""
    dtype = torch.bool if name == "new_video" else torch.float32
    provider = Scalar(name, site.index, like.meta["val"].device)
    return context.add_input(f"{name}_{site.index}", _fake(like, (), dtype), provider)


def _probe(q: torch.Tensor) -> torch.Tensor:
    return q[:, :, :: probe_stride(q.shape[2])].to(torch.bfloat16)


def _renewed(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _probe(q), torch.zeros(1, device=q.device)


def _drift(q: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
    then = probe.float()
    change = _probe(q).float() - then
    return (change.square().sum() / then.square().sum().clamp_min(1e-12)).sqrt().reshape(1)


def budgets_input(context: PassContext, site: AttentionSite, like: fx.Node, least: int, most: int) -> fx.Node:
    """Graph input for the key blocks of each head, (H,) int32: the artifact's for the layer that runs."""
    heads = site.shape[1]
    provider = HeadBudgets(site.anchor, heads, site.budget, least, most, like.meta["val"].device)
    return context.add_input(f"budgets_{site.index}", _fake(like, (heads,), torch.int32), provider)


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
    example = _fake(node.args[0], (blocks, blocks), dtype)
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


def _fake(like: fx.Node, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    value = like.meta["val"]
    with value.fake_mode:
        return torch.empty(shape, dtype=dtype, device=value.device)


def _scale(node: fx.Node) -> float:
    scale = node.kwargs.get("scale")
    return float(scale) if scale is not None else node.args[0].meta["val"].shape[-1] ** -0.5
