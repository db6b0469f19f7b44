"""Give attention 8-bit operands, and run dense self-attentions on our kernel where it wins.

Before:  sparse = torch.ops.quantsparse.sparse_attention.default(q, k, v, None, None, None, ...)

After:   k8 = torch.ops.quantsparse.quantize_keys.default(k, kv_len, 128, 'int8')         # a scale per block
         q8 = torch.ops.quantsparse.quantize_rows.default(q * k8[2], None, None, 'int8')  # a scale per token
         v8 = torch.ops.quantsparse.pack_values.default(v, kv_len)                        # not with 'int8' alone
         sparse = torch.ops.quantsparse.sparse_attention.default(q8[0], k8[0], v8[0], q8[1], k8[1], v8[1], ...)

with 'fp8' in the place of 'int8' where the recipe says `attention="fp8"`.

refresh_attention alike: both phases of a site see the same operands, so a residual belongs to the sparse step's own
arithmetic. Block scores go on reading q and k as they are.

The mean that the keys lose moves every log-sum-exp of a query q by scale q . mean(k), another number in each step. A
complement joins log-sum-exps of two steps, so it is given those numbers (`meta["qs_lse_shift"]`, (B, H, S)). Those by
which a refresh estimates the mass of its blocks come from another step too:

Before:  refresh = refresh_attention(..., lse_prev, ...);           copy_ = aten.copy_(cache, refresh[1])
After:   refresh = refresh_attention(..., lse_prev - shift, ...);   copy_ = aten.copy_(cache, refresh[1] + shift)

Before:  o = torch.ops.aten.scaled_dot_product_attention.default(q, k, v, mask)

After:   o = torch.ops.quantsparse.sparse_attention.default(..., every key block listed, kv_len, ...)[0]

on CUDA, for long self-attentions whose operands are 8-bit or whose mask hides padding: a library that takes a mask
computes what the mask hides.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from .. import _compat
from ..ops.attention_inputs import blocks_of
from ..options import ATTENTIONS
from .base import GraphPass, PassContext, PassResult, call, splice
from .sparsify_attention import _scale, why_not_ours

aten, qs = torch.ops.aten, torch.ops.quantsparse
# Where our kernel at density 1 beats the library, prologue included (benchmarks/results/attention.json): 16,384 tokens
# are level, 32,768 take 0.80 of its time with heads of 128 and 0.92 with heads of 64.
LEAST_TOKENS = 30_000
# By operands. "fp8" follows "int8-fp8": sparse, both are as fast on an H100; dense, it was not timed.
HEADS = {"16bit": range(65, 129), "int8": range(65, 129), "int8-fp8": range(64, 129), "fp8": range(64, 129)}
LSE_PREV = 9  # its place among the arguments of refresh_attention
LIBRARY_DEVICES = ("cpu",)  # whose dense attention is better left to a library


class QuantizeAttention(GraphPass):
    """Quantise q, k and v of the attentions that run on our kernels, and put long dense ones there."""

    name = "quantize_attention"
    after = ("sparsify_attention",)

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        result = PassResult()
        quantised = context.recipe.attention != "16bit"
        for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            reason = why_not(node, context)
            if reason is None:
                self.replace_dense(graph, node, context)
                result.matched += not quantised
            elif quantised:
                result.skip(node, reason)
        if quantised:
            for target in (qs.sparse_attention.default, qs.refresh_attention.default):
                for node in graph.find_nodes(op="call_function", target=target):
                    self.quantize(graph, node, context)
                    result.matched += 1
        return result

    def replace_dense(self, graph: fx.Graph, node: fx.Node, context: PassContext) -> None:
        """The same attention over a list of all key blocks."""
        q, k, v = node.args[:3]
        lists = splice(graph, node, _every_block, q, context.recipe.block_size)
        with graph.inserting_before(node):
            both = call(
                graph, node, qs.sparse_attention.default, q, k, v, None, None, None, *lists, node.meta.get("kv_len"),
                None, None, _scale(node), context.recipe.block_size, node.meta["val"].dtype,
            )  # fmt: skip
            new = call(graph, node, operator.getitem, both, 0)
        node.replace_all_uses_with(new)
        graph.erase_node(node)

    def quantize(self, graph: fx.Graph, node: fx.Node, context: PassContext) -> None:
        """Codes and scales in the place of q, k and v."""
        q, k, v = node.args[:3]
        kv_len, formats = node.args[8], ATTENTIONS[context.recipe.attention]
        block_size = context.recipe.block_size
        *keys, smooth = splice(graph, node, qs.quantize_keys.default, k, kv_len, block_size, formats.qk)
        operands = (
            splice(graph, node, quantize_queries, q, smooth, formats.qk),
            keys,
            (v, None) if formats.v is None else splice(graph, node, qs.pack_values.default, v, kv_len),
        )
        codes, scales = zip(*operands, strict=True)
        arguments = [*codes, *scales, *node.args[6:]]
        estimates = node.target is qs.refresh_attention.default and node.args[LSE_PREV] is not None
        complement = context.recipe.correction == "complement" and "qs_site" in node.meta
        if complement or estimates:
            shift = splice(graph, node, _lse_shift, codes[0], scales[0], k, smooth, kv_len, node.args[11])
        if complement:
            node.meta["qs_lse_shift"] = shift
        if estimates:
            arguments[LSE_PREV] = splice(graph, node, torch.sub, node.args[LSE_PREV], shift)
            for lse in [user for user in node.users if user.target is operator.getitem and user.args[1] == 1]:
                whole = splice(graph, lse.next, torch.add, lse, shift)
                lse.replace_all_uses_with(whole, lambda user: user is not whole)  # noqa: B023
        node.args = tuple(arguments)


def quantize_queries(q: torch.Tensor, smooth: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales per token of q (B, H, S, D), for the keys that `smooth` (B, Hkv, D) evens out."""
    groups = q.unflatten(1, (smooth.shape[1], -1)).float() * smooth[:, :, None, None]
    return qs.quantize_rows.default(groups.flatten(1, 2), None, None, format)


def why_not(node: fx.Node, context: PassContext) -> str | None:
    """Why a dense attention stays the library's, or None."""
    q = node.args[0].meta["val"]
    if (reason := why_not_ours(node)) is not None:
        return reason
    if q.device.type in LIBRARY_DEVICES:
        return f"dense attention on {q.device.type} is the library's"
    if (tokens := _compat.static_hint(q.shape[2])) < LEAST_TOKENS:
        return f"dense attention of {tokens} tokens, fewer than {LEAST_TOKENS}, is the library's"
    if q.shape[3] not in HEADS[context.recipe.attention]:
        return f"dense attention of head width {q.shape[3]} is the library's"
    if context.recipe.attention == "16bit" and "kv_len" not in node.meta:
        return "dense attention of 16-bit operands is the library's"
    return None


def _lse_shift(
    codes: torch.Tensor,
    scales: torch.Tensor,
    k: torch.Tensor,
    smooth: torch.Tensor,
    kv_len: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """What log-sum-exps (B, H, S) lose with the mean of the keys that count: scale q . mean(k), q times `smooth`."""
    k = k.float()
    if kv_len is None:
        mean = k.mean(2)
    else:
        counts = torch.arange(k.shape[2], device=k.device) < kv_len[:, None]
        mean = (k * counts[:, None, :, None]).sum(2) / kv_len.clamp(min=1)[:, None, None]
    mean = (mean / smooth).repeat_interleave(codes.shape[1] // k.shape[1], 1)
    return (codes.float() * mean[:, :, None]).sum(-1) * scales * scale


def _every_block(q: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block lists that keep all blocks of a self-attention, for every batch element and head."""
    blocks = blocks_of(q.shape[2], block_size)
    number = torch.full((1, 1, blocks), blocks, dtype=torch.int32, device=q.device)
    indices = torch.arange(blocks, dtype=torch.int32, device=q.device)
    return number, indices.expand(1, 1, blocks, blocks)
