"""fetch and send in code for a GPU: copies beside the kernels, which stay those of caches on the device."""

import re
from collections import Counter

import pytest
import torch

import qs_compiler as qs
from qs_compiler import _compat
from qs_compiler.runtime import graph
from qs_compiler.runtime.cache_layout import Slot
from qs_compiler.runtime.host_caches import HostCache
from tests.backend.models import CACHES, RECIPE, clip, make
from tests.fake_h100 import cuda_code
from tests.gpu.one_tile import OneTile
from tests.kernel_text import definition, kernel_sources
from tests.ops.attention_cases import BLOCK, block_lists, random_qkv

quantsparse = torch.ops.quantsparse
HANDLE = torch.zeros(2, dtype=torch.int64)


def sparse(q, k, v, counts, indices, residual, scale):
    o, _ = quantsparse.sparse_attention(q, k, v, *3 * [None], counts, indices, *3 * [None], 0.2, BLOCK, q.dtype)
    return quantsparse.add_residual(o, residual, scale, None, None, None)


def refresh(q, k, v, counts, indices):
    many = quantsparse.refresh_attention(
        q, k, v, *3 * [None], counts, indices, None, None, "residual", 0.2, BLOCK, q.dtype
    )
    return many[0], *quantsparse.quantize_rows(many[2], None, None, "int8")


def kernels(code):
    """The kernels in the order in which they run, less their names."""
    sources = kernel_sources(code)
    order = re.findall(r"(triton_\w+)\.run\(", code)
    return [re.sub(r"def \w+\(", "def kernel(", definition(sources[name]), count=1) for name in order]


def test_what_is_fetched_reaches_the_kernels_of_a_sparse_step():
    qkv, lists = random_qkv(1, 2, 2, 2 * BLOCK, 2 * BLOCK, 64, torch.bfloat16), block_lists(1, 2, 2, 2)
    residual, scale = torch.zeros(1, 2, 2 * BLOCK, 64, dtype=torch.int8), torch.ones(1, 2, 2 * BLOCK)

    def staged(q, k, v, residual, scale, *handles):
        fetched = [quantsparse.fetch(q, h, list(t.shape), t.dtype) for h, t in zip(handles, lists, strict=True)]
        return sparse(q, k, v, *fetched, residual, scale)

    device = cuda_code(sparse, *qkv, *lists, residual, scale)
    host = cuda_code(staged, *qkv, residual, scale, HANDLE, HANDLE)
    assert kernels(host) == kernels(device), "the same kernels in the same order"
    call = host[host.index("def call") :]
    assert call.count("quantsparse.fetch.default(") == 2
    assert call.rindex("quantsparse.fetch.default(") < call.index(".run(")


def test_what_is_sent_was_computed_before_and_a_handle_asks_no_gpu():
    qkv, lists = random_qkv(1, 2, 2, 2 * BLOCK, 2 * BLOCK, 64, torch.bfloat16), block_lists(1, 2, 2, 2)

    def staged(q, k, v, counts, indices, *handles):
        o, *cached = refresh(q, k, v, counts, indices)
        for value, handle in zip(cached, handles, strict=True):
            handle.copy_(quantsparse.send(value, handle, None))
        return o

    device = cuda_code(refresh, *qkv, *lists)
    host = cuda_code(staged, *qkv, *lists, HANDLE, HANDLE.clone())
    assert kernels(host) == kernels(device)
    call = host[host.index("def call") :].splitlines()
    sends = [(i, found[1]) for i, line in enumerate(call) if (found := re.search(r"send_\.default\((\w+)", line))]
    assert len(sends) == 2 and "cpp" not in host, "no kernel for the CPU, to which a C++ compiler would have to come"
    for number, value in sends:
        writers = [i for i, line in enumerate(call) if ".run(" in line and re.search(rf"\b{value}\b", line)]
        assert writers and max(writers) < number


def test_a_sent_value_comes_back_through_a_compiled_graph():
    value, cache = torch.randn(3, 4), HostCache("residual", Slot((3, 4), torch.float32), torch.device("cpu"))

    @torch.compile(fullgraph=True)
    def renew(x, handle):
        before = quantsparse.fetch(x, handle, [3, 4], torch.float32)
        handle.copy_(quantsparse.send(x + 1, handle, before))
        return before, quantsparse.fetch(x, handle, [3, 4], torch.float32)

    before, after = renew(value, cache.handle)
    assert torch.equal(before, torch.zeros(3, 4)) and torch.equal(after, value + 1)
    assert cache.handle.tolist() == [cache.number, 1] and cache.writes == 1
    before, _ = renew(value + 1, cache.handle)
    assert torch.equal(before, value + 1) and torch.equal(cache.value(), value + 2)
    assert cache.handle.tolist() == [cache.number, 2]


def phases(fields, on_host, monkeypatch):
    """The graphs of a run on the CPU and their inputs, as they are handed to Inductor: dense, refresh, sparse."""
    found, compile_graph = [], _compat.compile_graph

    def caught(module, inputs, *args, **kwargs):
        found.append((_compat.copy_graph_module(module), list(inputs)))
        return compile_graph(module, inputs, *args, **kwargs)

    torch._dynamo.reset()
    with monkeypatch.context() as patched, _compat.eager_graphs(), torch.no_grad():
        patched.setattr(_compat, "compile_graph", caught)
        patched.setattr(graph, "belongs_on_host", lambda *_: on_host)
        model = torch.compile(make(), backend="quantsparse", options={"recipe": {**RECIPE, **fields}})
        with qs.denoising(model, 6) as run:
            run.step(0)
            model(**clip(7, 1)[0])
    return found


def on_a_gpu(module, inputs):
    """The code of a graph of the CPU for an H100, each reduction with the tile that tests on a GPU give it."""
    for part in [m for m in module.modules() if isinstance(m, torch.fx.GraphModule)]:
        for node in part.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
        part.recompile()

    def function(*args):
        with torch.device("cuda"):
            return module(*args)

    like = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in inputs]
    with _compat.V.set_choices_handler(OneTile()):
        return cuda_code(function, *like)


def arithmetic(kernel):
    """A kernel less its copies, of what it loads and of what it stores twice; nothing if it does nothing else."""
    loaded = set(re.findall(r"(tmp\d+) = tl\.load", kernel))
    lines, stored = [], set()
    for line in kernel.splitlines()[2:]:
        line = re.sub(r"(in_)?(out_)?ptr\d+", "ptr", line)
        store = re.match(r"\s+tl\.store\(.*, (tmp\d+),", line)
        if store and (store[1] in loaded or line in stored):
            continue
        lines.append(line)
        if store:
            stored.add(line)
    names = {}
    text = re.sub(r"tmp\d+", lambda found: names.setdefault(found[0], f"t{len(names)}"), "\n".join(lines))
    return text if "tl.store" in text else ""


@pytest.mark.parametrize("fields", CACHES, ids=lambda f: f"{f['correction']}-{f['cache_format']}")
def test_a_model_computes_the_same_wherever_its_caches_lie(fields, monkeypatch):
    device, host = (phases(fields, on_host, monkeypatch) for on_host in (False, True))
    assert [r.cache_place for r in qs.reports()[-2:]] == ["device", "host"] and len(device) == len(host) == 3
    for graphs in zip(device, host, strict=True):
        on_device, on_host = (Counter(filter(None, map(arithmetic, kernels(on_a_gpu(*one))))) for one in graphs)
        assert on_device.total() >= 20 and on_host == on_device
