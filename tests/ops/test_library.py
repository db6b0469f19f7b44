"""Every op has a cost, costs are formulas, and defining the ops does not load Inductor's lowerings."""

import subprocess
import sys

import sympy
import torch

from qs_compiler.ops import COSTS
from qs_compiler.runtime.cache_layout import Slot
from qs_compiler.runtime.host_caches import HostCache
from tests.ops.attention_cases import BLOCK, block_lists, random_qkv

OPS = {
    "add_residual",
    "block_scores",
    "dequantize",
    "expand_w4",
    "fetch",
    "linear",
    "low_rank",
    "pack_values",
    "quantize_keys",
    "quantize_rows",
    "refresh_attention",
    "select_blocks",
    "send",
    "send_",
    "sparse_attention",
}


def test_every_op_has_a_symbolic_cost():
    assert set(COSTS) == OPS
    for name, cost in COSTS.items():
        assert isinstance(cost.flops, sympy.Expr) and isinstance(cost.bytes, sympy.Expr)
        assert cost.bytes.free_symbols, name


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def test_bytes_are_those_of_inputs_and_outputs():
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    rotation, smooth, ws = torch.eye(16), torch.ones(64), torch.ones(8)
    wq = torch.ones(8, 64, dtype=torch.int8)
    w4, groups = torch.ones(8, 32, dtype=torch.uint8), torch.ones(8, 4, dtype=torch.uint8)
    q, k, v = random_qkv(1, 2, 1, 64, 96, 16, torch.bfloat16)
    counts, indices = block_lists(1, 2, 2, 3, counts=3)
    state = torch.randn(1, 2, 64, 16), torch.zeros(1, 2, 64)
    o = torch.randn(1, 2, 64, 16)
    cache = HostCache("residual", Slot((5, 64), torch.bfloat16), torch.device("cpu"))
    cases = {
        "quantize_rows": (x, smooth, rotation, "fp8"),
        "linear": (wq[:5], torch.ones(5), wq, ws, ws, torch.bfloat16),
        "expand_w4": (w4, groups, torch.int8),
        "dequantize": (w4, ws, groups, smooth, rotation, "int8", torch.float16),
        "sparse_attention": (
            *(q, k, v, None, None, None, counts, indices),
            *(None, *state, 0.2, BLOCK, torch.float32),
        ),
        "refresh_attention": (
            *(q, k, v, None, None, None, counts, indices, None, state[1]),
            *("residual", 0.2, BLOCK, torch.bfloat16),
        ),
        "block_scores": (q, k, None, 0.2, BLOCK),
        "select_blocks": (torch.rand(1, 2, 4, 6), torch.zeros(4, 6, dtype=torch.bool), 2),
        "add_residual": (
            *(o, o.to(torch.int8), torch.ones(1, 2, 64)),
            *(torch.randn(1, 2, 64, 4), torch.randn(1, 2, 4, 16), torch.tensor(1.0)),
        ),
        "low_rank": (o, 4),
        "fetch": (torch.tensor(0.0), cache.handle, [5, 64], torch.bfloat16),
        "send": (x, cache.handle, None),
        "send_": (x, cache.handle.clone(), None),
        "pack_values": (v, torch.tensor([70])),
        "quantize_keys": (k, torch.tensor([70]), BLOCK),
    }
    assert set(cases) == OPS
    for name, args in cases.items():
        out = getattr(torch.ops.quantsparse, name)(*args)
        # A single number is not counted.
        moved = bytes_of(t for t in args if not (isinstance(t, torch.Tensor) and t.dim() == 0))
        moved += bytes_of(out if isinstance(out, tuple) else (out,))
        moved -= {"fetch": 16, "send": 32, "send_": 16}.get(name, 0)  # handles
        assert COSTS[name].bytes_of(*args) == moved, name


def test_costs_of_fake_lists_are_those_of_dense_attention():
    q, k, v = (x.to("meta") for x in random_qkv(1, 2, 1, 64, 96, 16, torch.bfloat16))
    counts, indices = (x.to("meta") for x in block_lists(1, 2, 2, 3))
    args = (q, k, v, None, None, None, counts, indices, None, None, None, 0.2, BLOCK, torch.bfloat16)
    assert COSTS["sparse_attention"].flops_of(*args) == 4 * 2 * 64 * 96 * 16


def test_defining_the_ops_does_not_load_the_lowerings():
    code = "import sys, qs_compiler.ops; sys.exit('torch._inductor.lowering' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_an_empty_batch_gives_empty_results():
    q, k, v = random_qkv(0, 2, 1, 40, 50, 16, torch.float32)
    ops = torch.ops.quantsparse
    scores = ops.block_scores(q, k, None, 0.2, BLOCK)
    lists = ops.select_blocks(scores, None, 1)
    shared = q, k, v, None, None, None, *lists, None
    refresh = ops.refresh_attention(*shared, None, "residual", 0.2, BLOCK, torch.float32)
    o, lse = ops.sparse_attention(*shared, refresh[2], refresh[3], 0.2, BLOCK, torch.float32)
    left, right = ops.low_rank(refresh[2], 4)
    assert o.shape == q.shape and lse.shape == q.shape[:3]
    assert ops.add_residual(o, refresh[2], None, left, right, torch.tensor(1.0)).shape == q.shape
    codes, scales = ops.quantize_rows(q, None, torch.eye(8), "int8")
    wq = torch.ones(4, 16, dtype=torch.int8)
    assert ops.linear(codes, scales, wq, torch.ones(4), None, torch.float32).shape == (0, 2, 40, 4)
