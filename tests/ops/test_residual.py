"""add_residual and low_rank: the correction of a sparse step."""

import pytest
import torch

from qs_compiler.ops.expand_w4 import pack_int4
from qs_compiler.ops.library import OpInputError
from tests.tolerances import assert_close

add_residual = torch.ops.quantsparse.add_residual
low_rank = torch.ops.quantsparse.low_rank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def stored_residual(form, shape):
    """A residual in a cache format: stored tensor, scale or None, its float64 value."""
    value = torch.randn(shape)
    if form in (torch.float32, torch.bfloat16):
        stored = value.to(form)
        return stored, None, stored.double()
    scale = torch.rand(shape[:-1]) * 0.1
    if form == torch.uint8:
        codes = torch.randint(-7, 8, shape, dtype=torch.int8)
        return pack_int4(codes), scale, codes.double() * scale[..., None].double()
    stored = value.mul(40).clamp(-120, 120).to(form)
    return stored, scale, stored.double() * scale[..., None].double()


@pytest.mark.parametrize("tokens", (1, 63, 129))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.uint8))
def test_every_cache_format(tokens, dtype, form):
    o = torch.randn(2, 3, tokens, 16).to(dtype)
    stored, scale, value = stored_residual(form, (2, 3, tokens, 16))
    assert_close(add_residual(o, stored, scale, None, None, None), o.double() + value)


@pytest.mark.parametrize("gain", (torch.tensor(0.75), torch.tensor([0.0, 0.5, -1.0])))
def test_low_rank_term_with_gain(gain):
    o = torch.randn(2, 3, 65, 16)
    residual, left, right = torch.randn(2, 3, 65, 16), torch.randn(2, 3, 65, 4), torch.randn(2, 3, 4, 16)
    wanted = o.double() + residual + gain.double().view(-1, 1, 1) * (left.double() @ right.double())
    assert_close(add_residual(o, residual, None, left, right, gain), wanted)


def test_factors_alone_have_a_gain_of_one():
    o, left, right = torch.randn(2, 3, 65, 16), torch.randn(2, 3, 65, 4), torch.randn(2, 3, 4, 16)
    wanted = o.double() + left.double() @ right.double()
    assert_close(add_residual(o, None, None, left, right, None), wanted)


@pytest.mark.parametrize("tokens", (1, 5, 200))
@pytest.mark.parametrize("rank", (1, 4, 16))
def test_factors_are_the_truncated_svd(tokens, rank):
    delta = torch.randn(2, 3, tokens, 16) * torch.logspace(0, -2, 16)
    left, right = low_rank(delta, rank)
    assert left.shape == (2, 3, tokens, rank) and right.shape == (2, 3, rank, 16)
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    best = u[..., :rank] * s[..., None, :rank] @ v[..., :rank, :]
    # The Gram matrix squares the condition: what it loses is relative to the largest singular value.
    assert ((left.double() @ right.double() - best).norm() / delta.norm()) < 1e-4
    assert_close(right @ right.mT, torch.eye(rank).expand(2, 3, rank, rank))
    norms = left.norm(dim=2)
    assert (norms[..., :-1] >= norms[..., 1:] - 1e-4).all()


def test_a_residual_of_zeros_has_finite_factors():
    left, right = low_rank(torch.zeros(1, 2, 40, 16), 4)
    assert (left == 0).all() and torch.isfinite(right).all()


def test_opcheck():
    o = torch.randn(1, 3, 9, 16, dtype=torch.bfloat16)
    stored, scale, _ = stored_residual(torch.uint8, (1, 3, 9, 16))
    left, right = torch.randn(1, 3, 9, 2), torch.randn(1, 3, 2, 16)
    torch.library.opcheck(add_residual, (o, stored, scale, left, right, torch.ones(3)))
    torch.library.opcheck(add_residual, (o, o, None, None, None, None))
    torch.library.opcheck(low_rank, (torch.randn(1, 2, 9, 16), 4))


def test_bad_input_is_named():
    o = torch.randn(1, 3, 9, 16)
    with pytest.raises(OpInputError, match=r"residual is torch\.int8 without residual_scale"):
        add_residual(o, o.to(torch.int8), None, None, None, None)
    with pytest.raises(OpInputError, match=r"residual has shape \(1, 3, 9, 15\)"):
        add_residual(o, o[..., :15], None, None, None, None)
    with pytest.raises(OpInputError, match="left, right and gain do not fit together"):
        add_residual(o, o, None, torch.randn(1, 3, 9, 2), None, None)
    with pytest.raises(OpInputError, match=r"gain has shape \(2,\)"):
        add_residual(o, o, None, torch.randn(1, 3, 9, 2), torch.randn(1, 3, 2, 16), torch.ones(2))
    with pytest.raises(OpInputError, match=r"rank is 17.*1\.\.16"):
        low_rank(o, 17)
