"""fetch and send in code for a GPU: copies beside the kernels, which stay those of caches on the device."""

import re

import torch

from tests.fake_h100 import cuda_code
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
    sends = [(i, re.search(r"send\.default\((\w+)", line)[1]) for i, line in enumerate(call) if "send.default(" in line]
    assert len(sends) == 2
    for number, value in sends:
        writers = [i for i, line in enumerate(call) if ".run(" in line and re.search(rf"\b{value}\b", line)]
        assert writers and max(writers) < number
