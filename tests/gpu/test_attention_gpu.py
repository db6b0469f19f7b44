"""Attention on the device: beside flex_attention, at lengths of real videos, run after run, with huge values."""

import pytest
import torch

from qs_compiler.lowering import collect_fallbacks, refresh_attention
from qs_compiler.options import ATTENTIONS
from qs_compiler.passes.quantize_attention import quantize_queries
from tests.lowering.compiled import compiled
from tests.ops.attention_cases import biased_qkv, block_lists

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
quantsparse = torch.ops.quantsparse
bf16 = torch.bfloat16
BLOCK = 128
KINDS = ("bf16", "int8", "int8-fp8", "fp8")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def operands(kind, q, k, v):
    """As the pass quantize_attention makes them."""
    if kind == "bf16":
        return q, k, v, None, None, None
    formats = ATTENTIONS[kind]
    k, k_scale, smooth = quantsparse.quantize_keys(k, None, BLOCK, formats.qk)
    v, v_scale = (v, None) if formats.v is None else quantsparse.pack_values(v)
    q, q_scale = quantize_queries(q, smooth, formats.qk)
    return q, k, v, q_scale, k_scale, v_scale


def attend(kind, q, k, v, lists, scale=None):
    """Output and log-sum-exp of the compiled kernel, prologue included."""

    def function(q, k, v, counts, indices):
        options = scale or q.shape[-1] ** -0.5, BLOCK, bf16
        return quantsparse.sparse_attention(*operands(kind, q, k, v), counts, indices, None, None, None, *options)

    with collect_fallbacks() as fallbacks:
        result, _ = compiled(function, q, k, v, *lists)
    assert fallbacks == []
    return result


def exact(q, k, v, lists, head, row, scale):
    """float32 attention of one query block over its listed blocks."""
    counts, indices = lists
    listed = indices[0, head % indices.shape[1], row, : counts[0, head % counts.shape[1], row]].long()
    keys = (listed[:, None] * BLOCK + torch.arange(BLOCK, device=q.device)).flatten()
    keys = keys[keys < k.shape[2]]
    queries = slice(row * BLOCK, (row + 1) * BLOCK)
    weights = torch.softmax(q[0, head, queries].double() @ k[0, head, keys].double().T * scale, -1)
    return (weights @ v[0, head, keys].double()).float()


def cosine(x, y):
    return torch.nn.functional.cosine_similarity(x.float().flatten(), y.float().flatten(), 0)


@pytest.mark.parametrize("depth", (64, 128))
def test_against_flex_attention_on_the_same_lists(depth):
    """Half-width attention errs at most twice as much as flex_attention does; 8 bits by their cosine."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tokens = 3000
    q, k, v = biased_qkv(4, tokens, depth, "cuda")
    blocks = -(-tokens // BLOCK)
    lists = tuple(x.cuda() for x in block_lists(1, 4, blocks, blocks, least=1, complete=True))
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(lists[0]), torch.zeros_like(lists[1]), *lists, BLOCK_SIZE=BLOCK, seq_lengths=(tokens, tokens)
    )
    scale = depth**-0.5
    wanted = torch.stack([torch.cat([exact(q, k, v, lists, h, r, scale) for r in range(blocks)]) for h in range(4)])
    flex, flex_lse = torch.compile(flex_attention, dynamic=False)(q, k, v, block_mask=mask, return_lse=True)
    flex_error = (flex[0].float() - wanted).abs().max()
    for kind, least in zip(KINDS, (0.99999, 0.9995, 0.999, 0.997), strict=True):
        o, lse = attend(kind, q, k, v, lists)
        assert cosine(o[0], wanted) >= least
        if kind == "bf16":
            assert (o[0].float() - wanted).abs().max() <= 2 * flex_error + 1e-5
            assert (lse - flex_lse).abs().max() <= 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_160_000_tokens_of_a_fused_projection(kind):
    """Heads are views of a (tokens, 3 x 56 x 128) matrix: offsets pass 2^31 elements. A row keeps two blocks."""
    tokens, heads, depth = 160_000, 56, 128
    fused = torch.randn(1, tokens, 3, heads, depth, device="cuda", dtype=bf16)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    blocks = -(-tokens // BLOCK)
    rows = torch.arange(blocks, device="cuda")
    indices = torch.stack((rows.minimum(blocks - 1 - rows), rows.maximum(blocks - 1 - rows)), -1).int()
    counts = torch.where(indices[:, 0] == indices[:, 1], 1, 2).int()
    lists = counts.view(1, 1, -1), indices.view(1, 1, blocks, 2)
    o, _ = attend(kind, q, k, v, lists)
    for head, row in ((0, 0), (heads // 2, blocks // 2), (heads - 1, blocks - 1)):
        wanted = exact(q, k, v, lists, head, row, depth**-0.5)
        assert cosine(o[0, head, row * BLOCK : (row + 1) * BLOCK], wanted) >= (0.9999 if kind == "bf16" else 0.998)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("launches", (1, 2))
def test_runs_are_equal(kind, launches, monkeypatch):
    """Nothing is summed up in an order that may change; an error that moves is a race."""
    monkeypatch.setattr(refresh_attention, "LAUNCHES", launches)
    q, k, v = biased_qkv(4, 5000, 128, "cuda")
    lists = tuple(x.cuda() for x in block_lists(1, 4, 40, 40, complete=True))

    def function(q, k, v, counts, indices, lse_prev):
        given = operands(kind, q, k, v)
        return (
            *quantsparse.sparse_attention(*given, counts, indices, None, None, None, 0.1, BLOCK, bf16),
            *quantsparse.refresh_attention(*given, counts, indices, None, lse_prev, "residual", 0.1, BLOCK, bf16),
        )

    lse_prev = torch.zeros(1, 4, 5000, device="cuda")
    first, _ = compiled(function, q, k, v, *lists, lse_prev)
    kernel = torch.compile(function, fullgraph=True, dynamic=False)
    for _ in range(20):
        for got, wanted in zip(kernel(q, k, v, *lists, lse_prev), first, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("magnitude", (1e-30, 1e3))
def test_huge_and_tiny_values_give_numbers(kind, magnitude):
    """Scores of up to 1e8, values of up to 1e30: weights of one key to a row."""
    q, k, v = biased_qkv(2, 700, 128, "cuda")
    q, k, v = q * magnitude, k * magnitude, v * (1e30 if magnitude > 1 else magnitude)
    lists = tuple(x.cuda() for x in block_lists(1, 2, 6, 6))
    o, lse = attend(kind, q, k, v, lists)
    assert torch.isfinite(o).all() and not lse.isnan().any()
