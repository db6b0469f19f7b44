"""splice: what is traced, what is taken from an earlier trace, and that the two cannot be told apart."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qs_compiler import _compat
from qs_compiler.passes import base
from qs_compiler.passes.base import splice


class TwoAdds(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + 1, y + 1


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return (x * factor).relu()


def times(factor: object) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * factor


def times_first(factors: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * factors[0]


@pytest.fixture
def traces(monkeypatch) -> list[object]:
    calls, trace = [], _compat.trace_fake
    monkeypatch.setattr(_compat, "trace_fake", lambda *args: calls.append(args) or trace(*args))
    return calls


def both(context, args: tuple[torch.Tensor, torch.Tensor], first: tuple, second: tuple) -> list[torch.Tensor]:
    """What a model returns whose sums are replaced by `fn(sum, *constants)`, each with its own."""
    ctx = context(TwoAdds(), args, recipe="off")
    graph = ctx.capture.module.graph
    (output,) = graph.find_nodes(op="output")
    sums = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    new = [splice(graph, output, fn, node, *rest) for node, (fn, *rest) in zip(sums, (first, second), strict=True)]
    output.args = (tuple(new),)
    graph.lint()
    ctx.capture.module.recompile()
    return ctx.capture.module(*args)


def same_layout() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 6), torch.randn(4, 6)


def test_the_same_again_is_traced_once(context, traces) -> None:
    x, y = same_layout()
    got = both(context, (x, y), (scaled, 0.5), (scaled, 0.5))
    assert len(traces) == 1
    assert torch.equal(got[0], scaled(x + 1, 0.5)) and torch.equal(got[1], scaled(y + 1, 0.5))


@pytest.mark.parametrize(
    ("first", "second"),
    (
        ((scaled, 0.5), (scaled, 0.25)),
        ((scaled, 0.0), (scaled, -0.0)),
        ((times(2),), (times(2.5),)),
        ((times(1),), (times(True),)),
        ((torch.add, 1), (torch.mul, 1)),
        ((times_first([2]),), (times_first([2]),)),  # a list may have changed in between
    ),
    ids=("constant", "sign of zero", "closure", "type", "function", "list"),
)
def test_another_function_or_constant_is_traced(context, traces, first, second) -> None:
    x, y = same_layout()
    got = both(context, (x, y), first, second)
    assert len(traces) == 2
    for out, value, (fn, *rest) in zip(got, (x + 1, y + 1), (first, second), strict=True):
        assert torch.equal(out, fn(value, *rest))


@pytest.mark.parametrize(
    "other",
    (torch.randn(4, 7), torch.randn(6, 4).t(), torch.randn(4, 6).double()),
    ids=("shape", "strides", "dtype"),
)
def test_another_layout_is_traced(context, traces, other) -> None:
    x = torch.randn(4, 6)
    got = both(context, (x, other), (scaled, 0.5), (scaled, 0.5))
    assert len(traces) == 2
    assert torch.equal(got[1], scaled(other + 1, 0.5))


def test_traces_die_with_their_graph(context) -> None:
    before = len(base._TRACED)
    both(context, same_layout(), (scaled, 0.5), (scaled, 0.5))
    torch._dynamo.reset()
    gc.collect()
    assert len(base._TRACED) <= before


def difference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.relu() - y.relu()


def test_two_inputs_that_share_a_value_are_two(context) -> None:
    x, y = same_layout()
    ctx = context(TwoAdds(), (x, y), recipe="off")
    graph = ctx.capture.module.graph
    (output,) = graph.find_nodes(op="output")
    sums = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    a, b = (splice(graph, output, scaled, node, 0.5) for node in sums)
    assert a.meta["val"] is b.meta["val"], "or this test shows nothing"
    output.args = ((splice(graph, output, difference, a, b),),)
    ctx.capture.module.recompile()
    (got,) = ctx.capture.module(x, y)
    assert torch.equal(got, difference(scaled(x + 1, 0.5), scaled(y + 1, 0.5)))
