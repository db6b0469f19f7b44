"""Let the caches live in host memory: fetch each before its use, send what a refresh makes.

Sparse, before:  o = quantsparse.add_residual(sparse[0], residual, ...)       # residual: on the device
         after:  fetch = quantsparse.fetch(q, residual, [1, 24, 119056, 128], torch.bfloat16)   # residual: its handle
                 o = quantsparse.add_residual(sparse[0], fetch, ...)

Refresh, before: copy_ = aten.copy_(residual, refresh[2])
         after:  send = quantsparse.send(refresh[2], residual, None)
                 copy_ = aten.copy_(residual, send)

Where a refresh reads a cache that it renews, `send` gets what was fetched, so that it comes second.
"""

from __future__ import annotations

import torch
from torch import fx

from ..runtime.inputs import Cached
from .base import GraphPass, PassContext, PassResult, call

aten, qs = torch.ops.aten, torch.ops.quantsparse


class StageCaches(GraphPass):
    """Turn each cache of the graph into the handle of one in host memory."""

    name = "stage_caches"
    after = ("reparameterize_residual",)

    def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
        result = PassResult()
        if not context.caches_on_host:
            return result
        attentions = (qs.sparse_attention.default, qs.refresh_attention.default)
        sites = [n for n in graph.nodes if n.target in attentions and "qs_site" in n.meta]
        queries = {n.meta["qs_site"].index: n.args[0] for n in sites}
        inputs = context.capture.placeholders
        extra = inputs[len(context.capture.inputs) :]
        for provider, cache in zip(context.extra_inputs, extra, strict=True):
            if isinstance(provider, Cached):
                site = context.sites[provider.site]
                self.stage(graph, cache, queries[site.index], inputs[site.anchor])
                result.matched += 1
        return result

    def stage(self, graph: fx.Graph, cache: fx.Node, q: fx.Node, weight: fx.Node) -> None:
        """Rewrite the uses of one cache. `q` or `weight` says on which device."""
        value = cache.meta["val"]
        writes = [u for u in cache.users if u.target is aten.copy_.default and u.args[0] is cache]
        readers = [u for u in cache.users if u not in writes]
        with value.fake_mode:
            cache.meta["val"] = torch.empty(2, dtype=torch.int64)
        fetched = None
        if readers:
            order = {node: i for i, node in enumerate(graph.nodes)}
            first = min(readers, key=order.__getitem__)
            like = q if order[q] < order[first] else weight  # after q, so that it does not come in too early
            with graph.inserting_before(first):
                fetched = call(graph, first, qs.fetch.default, like, cache, list(value.shape), value.dtype)
            for reader in readers:
                reader.replace_input_with(cache, fetched)
        for write in writes:
            with graph.inserting_before(write):
                sent = call(graph, write, qs.send.default, write.args[1], cache, fetched)
            write.args = (cache, sent)
            write.meta["val"] = cache.meta["val"]
