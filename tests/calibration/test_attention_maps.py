"""The maps that are distilled: right against the whole map, which only a test may build."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qs_compiler.calibration.attention_maps import (
    AttentionInputs,
    AttentionTap,
    LocalTarget,
    global_map,
    local_map,
    received_mass,
    salient_tokens,
)

from ..tolerances import assert_close

B, H, D = 2, 3, 16


def attention(length: int, real: torch.Tensor | None = None, seed: int = 0) -> AttentionInputs:
    draw = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(B, H, length, D, generator=draw) for _ in "qk")
    return AttentionInputs(q, k, D**-0.5, real)


def whole_map(a: AttentionInputs) -> torch.Tensor:
    logits = a.q @ a.k.mT * a.scale
    if a.real is not None:
        logits = logits.masked_fill(~a.real[:, None, None], -torch.inf)
    return logits.softmax(-1)


@pytest.mark.parametrize("length", [8, 300, 777])
def test_the_local_map_is_rows_of_the_whole_map_and_the_mass_its_column_sums(length):
    a = attention(length)
    whole = whole_map(a)
    assert_close(received_mass(a), whole.sum((1, 2)))
    tokens = salient_tokens(a, 16)
    assert tokens.shape == (B, min(16, length))
    for b in range(B):
        best = whole.sum((1, 2))[b].topk(tokens.shape[1]).indices
        assert set(best.tolist()) == set(tokens[b].tolist())
        assert_close(local_map(a, tokens)[b], whole[b][:, tokens[b]])


def test_the_global_map_is_the_attention_of_averages():
    a = attention(96)
    q, k = (x.unflatten(2, (-1, 32)).mean(3) for x in (a.q, a.k))
    assert_close(global_map(a, 32), (q @ k.mT * a.scale).softmax(-1))


def test_a_last_part_that_is_not_full_is_an_average_of_fewer():
    a = attention(40)
    pooled = global_map(a, 32)
    assert pooled.shape == (B, H, 2, 2)
    q, k = (torch.stack([x[:, :, :32].mean(2), x[:, :, 32:].mean(2)], 2) for x in (a.q, a.k))
    assert_close(pooled, (q @ k.mT * a.scale).softmax(-1))


def test_padding_is_as_if_it_were_not_there():
    short = attention(50)
    real = (torch.arange(64) < 50).expand(B, -1)
    padded = AttentionInputs(*(F.pad(x, (0, 0, 0, 14), value=9.0) for x in (short.q, short.k)), short.scale, real)
    assert_close(received_mass(padded)[:, :50], received_mass(short))
    assert not received_mass(padded)[:, 50:].any()
    tokens = salient_tokens(padded, 8)
    assert torch.equal(tokens, salient_tokens(short, 8))
    assert_close(local_map(padded, tokens)[..., :50], local_map(short, tokens))
    assert_close(global_map(padded, 32)[:, :, :2, :2], global_map(short, 32))


def test_a_sample_of_the_queries_estimates_the_mass():
    a = attention(1024)
    a = AttentionInputs(a.q / 4, a.k, a.scale)
    assert_close(4 * received_mass(a, every=4), received_mass(a), 0.1)


class Largest(TorchDispatchMode):
    """The largest number of elements that any op gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


class Live(TorchDispatchMode):
    """The most bytes that were alive at once, of what ops gave."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def test_the_error_of_local_maps_is_theirs_and_holds_one_head_at_a_time():
    length, many = 512, 8
    draw = torch.Generator().manual_seed(0)
    q, k, q_full, k_full = (torch.randn(1, many, length, D, generator=draw) for _ in range(4))
    real = (torch.arange(length) < 500)[None]
    full = AttentionInputs(q_full, k_full, D**-0.5, real)
    tokens = salient_tokens(full, 64)
    target = LocalTarget.of(full, tokens)

    def student():
        return AttentionInputs(q.clone().requires_grad_(), k.clone().requires_grad_(), D**-0.5, real)

    ours, reference = student(), student()
    with Live() as live:
        error = target.squared_error(ours)
        gradients = torch.autograd.grad(error, (ours.q, ours.k))
    error = error.detach()
    wanted = (local_map(reference, tokens) - local_map(full, tokens)).square().mean()
    assert_close(error, wanted.detach())
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, (reference.q, reference.k)), strict=True):
        assert_close(ours, theirs)
    map_of_one_head, inputs = 4 * 64 * length, 4 * q.numel()
    assert live.peak < 8 * map_of_one_head + 6 * inputs < many * 8 * map_of_one_head


def test_no_map_of_all_tokens_against_all_ever_exists():
    length = 2048
    a = attention(length)
    with Largest() as seen:
        tokens = salient_tokens(a, 64)
        local_map(a, tokens)
        global_map(a, 128)
    assert seen.elements <= B * 256 * length, "MAP_ROWS rows of one head"
    assert seen.elements < length * length


def test_the_tap_keeps_self_attentions_and_says_what_it_leaves():
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    mask = torch.arange(8)[None, None, None] < 6
    with AttentionTap() as tap:
        F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, scale=0.25)
        F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
        F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5])
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
        F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(8, 8))
    assert [a.scale for a in tap.seen] == [0.5, 0.25, 0.5]
    assert tap.seen[0].q is q and tap.seen[0].real is None
    assert torch.equal(tap.seen[1].real, mask[:, 0, 0])
    assert tap.seen[2].k.shape == q.shape
    assert tap.skipped == {
        "cross attention": 1,
        "causal attention": 1,
        "attention with a mask that is not of keys alone": 1,
    }
