"""Walks: a forward that stops at some modules' calls, whatever it does between them."""

import threading

import pytest
import torch
from torch import nn

from qs_compiler.calibration.walk import Walk, replaced_forwards, stops_at, walking

from .models import make_forwards, make_model


def walk_through(model, blocks, forwards, compute):
    walks = [Walk(model, args, kwargs, blocks) for args, kwargs in forwards]
    order = []
    with stops_at(blocks), walking(walks):
        calls = [w.advance() for w in walks]
        while any(calls):
            order.append([c.module for c in calls])
            calls = [w.advance(compute(c)) for w, c in zip(walks, calls, strict=True)]
    return order, [w.result for w in walks]


def test_computing_what_the_blocks_compute_gives_the_models_own_result():
    model, forwards = make_model().eval(), make_forwards(3)
    order, results = walk_through(model, model.blocks, forwards, lambda c: c.module(*c.args, **c.kwargs))
    assert order == [[b] * 3 for b in model.blocks]
    with torch.no_grad():
        for (args, kwargs), result in zip(forwards, results, strict=True):
            assert torch.equal(result, model(*args, **kwargs))


def test_walks_nest_and_other_calls_run_as_ever():
    model, forwards = make_model().eval(), make_forwards(1)
    linears = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    seen = []

    def compute(call):
        inner = Walk(call.module, call.args, call.kwargs, linears)
        with stops_at(linears), walking([inner]):
            at = inner.advance()
            while at is not None:
                seen.append(at.module)
                at = inner.advance(at.module(*at.args))
        return inner.result

    _, (result,) = walk_through(model, model.blocks, forwards, compute)
    assert len(seen) == len(linears) == len(set(seen))
    with torch.no_grad():
        assert torch.equal(result, model(*forwards[0][0], **forwards[0][1]))


def test_gradients_are_off_and_autocast_is_entered():
    linear = nn.Linear(4, 4)
    walk = Walk(linear, (torch.ones(1, 4),), {}, (), lambda: torch.autocast("cpu", torch.bfloat16))
    assert walk.advance() is None
    assert walk.result.dtype == torch.bfloat16 and not walk.result.requires_grad


def test_what_a_forward_raises_is_raised_by_advance():
    class Fails(nn.Module):
        def forward(self):
            raise ZeroDivisionError("seven")

    with pytest.raises(ZeroDivisionError, match="seven"):
        Walk(Fails(), (), {}, ()).advance()


def test_walks_that_are_given_up_leave_no_thread_and_no_trace():
    model, before = make_model(), threading.active_count()
    walks = [Walk(model, args, kwargs, model.blocks) for args, kwargs in make_forwards(4)]
    with pytest.raises(RuntimeError, match="enough"), stops_at(model.blocks), walking(walks):
        for walk in walks[:3]:
            walk.advance()
        assert threading.active_count() == before + 3
        raise RuntimeError("enough")
    assert threading.active_count() == before
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_replaced_forwards_come_back_even_where_one_was_an_instances_own():
    linear = nn.Linear(2, 2)
    linear.forward = own = lambda x: x
    with replaced_forwards({linear: lambda x: x + 1}):
        assert linear(torch.zeros(1)) == 1
    assert linear.forward is own
