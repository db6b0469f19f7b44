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

`choose_blocks.py` says by what the blocks are ranked.

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
from ..options import Recipe
from ..runtime.cache_layout import block_budget, probe_stride
from ..runtime.token_layout import STATIC_MASKS
from .base import AttentionSite, GraphPass, PassContext, PassResult, Phase, call, splice, upstream
from .cache_inputs import cache_input
from .choose_blocks import BlockChoice, always_kept, block_lists
from .trim_padding_mask import attention_mask, is_self_attention

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
            if reason is None and context.recipe.needs_places and "token_layout" not in node.meta:
                needs = context.recipe.mask if context.recipe.mask in STATIC_MASKS else context.recipe.always_keep
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
        lists = block_lists(site, context, q)
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
        choice = BlockChoice(graph, node, site, context)
        if recipe.refresh == "adaptive":
            renewed = splice(graph, node, _renewed, q)
            with graph.inserting_before(node):
                for slot, new in zip(("probe", "drift"), renewed, strict=True):
                    call(graph, node, aten.copy_.default, cache_input(context, site, slot, q), new)
        kept, before = choice.choose(_scale(node))
        with graph.inserting_before(node):
            correction = "complement" if recipe.correction == "complement" else "residual"
            many = call(
                graph, node, qs.refresh_attention.default, q, k, v, None, None, None, *kept, kv_len, before, correction,
                _scale(node), recipe.block_size, node.meta["val"].dtype,
            )  # fmt: skip
            many.meta["qs_site"] = site
        choice.store(kept, many)
        with graph.inserting_before(node):
            return call(graph, node, operator.getitem, many, 0)


def why_not_ours(node: fx.Node) -> str | None:
    """Why an attention is none that the ops of this package compute, or None."""
    q = node.args[0].meta["val"]
    named = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)), **node.kwargs}
    if named.get("is_causal"):
        return "causal attention"
    if named.get("dropout_p"):
        return "attention dropout"
    if attention_mask(node) is not None and "kv_len" not in node.meta:
        return "an attention mask that is not a prefix"
    if q.dim() != 4:
        return f"q has {q.dim()} dimensions, not (batch, heads, tokens, head_dim)"
    if not is_self_attention(node):
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


def _probe(q: torch.Tensor) -> torch.Tensor:
    return q[:, :, :: probe_stride(q.shape[2])].to(torch.bfloat16)


def _renewed(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _probe(q), torch.zeros(1, device=q.device)


def _drift(q: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
    then = probe.float()
    change = _probe(q).float() - then
    return (change.square().sum() / then.square().sum().clamp_min(1e-12)).sqrt().reshape(1)


def _scale(node: fx.Node) -> float:
    scale = node.kwargs.get("scale")
    return float(scale) if scale is not None else node.args[0].meta["val"].shape[-1] ** -0.5
