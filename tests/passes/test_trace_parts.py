"""trace_by_parts: the same graph as tracing the whole, and None where parts would not add up to it."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from qs_compiler import _compat
from qs_compiler.blocks import metadata_of, module_path
from qs_compiler.capture import lay_tokens_out, remove_identities
from qs_compiler.trace_parts import trace_by_parts
from tests.backend import diffusers_models

CHANNELS = 16


def captured(model: nn.Module, *args: object, dynamic: bool = False, **kwargs: object) -> tuple[fx.GraphModule, list]:
    """Dynamo's graph of a model and the inputs of its call."""
    found: list[tuple[fx.GraphModule, list]] = []

    def backend(module: fx.GraphModule, inputs: list, **_: object):
        found.append((module, inputs))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    return found[0]


def traced_both_ways(module: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule | None, int]:
    """The graph traced as a whole, by parts (or None), and how many parts were traced."""
    calls: list[fx.GraphModule] = []
    parts: list[fx.GraphModule | None] = []

    def by_parts(source: fx.GraphModule, trace: _compat.Trace) -> fx.GraphModule | None:
        def counted(part: fx.GraphModule, values: list) -> fx.GraphModule:
            calls.append(part)
            return trace(part, values)

        parts.append(trace_by_parts(source, counted))
        return parts[0]

    whole = _compat.retrace_dynamo(module, lay_tokens_out, lambda *_: None)
    result = _compat.retrace_dynamo(module, lay_tokens_out, by_parts)
    return whole, None if parts[0] is None else result, len(calls)


def text(module: fx.GraphModule) -> list[str]:
    """A graph node by node: what is called with what, from which module, and what comes out.

    Casts that return their own input are left out: traced as a whole, a block reads through those of the block before.
    """
    remove_identities(module.graph)
    nodes = {n: i for i, n in enumerate(module.graph.nodes)}
    lines = []
    for node in nodes:
        args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{nodes[n]}")
        target = getattr(module, node.target) if node.op == "get_attr" else node.target
        path = module_path(node) if "nn_module_stack" in node.meta else None
        value = metadata_of(node.meta.get("val"))
        lines.append(f"{node.op} {'' if node.op == 'placeholder' else target} {args} {path} {value}")
    return lines


@pytest.mark.parametrize("name", ("wan", "hunyuan", "cogvideox", "ltx"))
def test_it_is_the_graph_of_the_whole_model(name):
    torch.manual_seed(0)
    model, inputs = getattr(diffusers_models, name)(layers=4)
    module, values = captured(model.eval(), **inputs)
    whole, parts, traces = traced_both_ways(module)
    assert parts is not None, "the graph was not divided"
    assert text(parts) == text(whole)
    blocks = 3 * (2 if name == "hunyuan" else 1)
    assert traces <= blocks + 2, "blocks that are alike are traced once"
    with torch.no_grad():
        for a, b in zip(parts(*values), whole(*values), strict=True):
            assert torch.equal(a, b)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(torch.nn.functional.layer_norm(x, (CHANNELS,)))


class Model(nn.Module):
    def __init__(self, block: type[nn.Module] = Block, count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(2, 6, CHANNELS)


def test_one_trace_serves_all_blocks_and_each_copy_names_its_own_module():
    whole, parts, traces = traced_both_ways(captured(Model(), X)[0])
    assert traces == 1 and text(parts) == text(whole)
    linears = parts.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [module_path(n) for n in linears] == [f"blocks.{i}.up" for i in range(4)]
    assert not any("custom" in n.meta for n in parts.graph.nodes)


class Scaled(Block):
    """Blocks that differ in a number of the code alone."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Scaled.made += 1
        self.factor = 0.0 if Scaled.made % 2 else -0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


def test_a_number_in_the_code_tells_blocks_apart():
    module, _ = captured(Model(Scaled), X)
    whole, parts, traces = traced_both_ways(module)
    assert traces == 2 and text(parts) == text(whole)


class Written(Block):
    """Writes into a part of what it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        x[:, ::2] = x[:, 1::2] * 2
        x.mul_(0.5)
        return x


def test_writes_stay_where_they_are():
    module, values = captured(Model(Written), X)
    whole, parts, traces = traced_both_ways(module)
    assert traces == 1 and text(parts) == text(whole)
    with torch.no_grad():
        assert torch.equal(parts(*values)[0], whole(*values)[0])


class Constant(Block):
    """Adds a tensor that its code spells out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.tensor([1.0, 2.0]).repeat(CHANNELS // 2)


def test_constants_of_a_trace_are_kept():
    module, values = captured(Model(Constant), X)
    _, parts, traces = traced_both_ways(module)
    assert traces == 1
    with torch.no_grad():
        assert torch.equal(parts(*values)[0], module(*values)[0])


class Skips(Model):
    """Long skips: later blocks also read what earlier ones gave, so that a part reads values of one trace twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = []
        for i in range(3):
            x = self.blocks[i](x)
            given.append(x)
        for i in range(3, 6):
            x = self.blocks[i](x - 0.5 * given[5 - i])
        return x - given[0]


class Towers(Model):
    """Two streams through the same kind of block, joined at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flip(1)
        for i in range(0, len(self.blocks), 2):
            x, y = self.blocks[i](x), self.blocks[i + 1](y)
        return x - y


class Ensemble(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = [block(x) for block in self.blocks]
        return given[0] - given[1] + 2 * given[2] - given[3]


@pytest.mark.parametrize("model", (Skips, Towers, Ensemble))
def test_values_of_equal_blocks_are_told_apart(model):
    module, values = captured(model(count=6 if model is Skips else 4), X)
    _, parts, traces = traced_both_ways(module)
    assert parts is not None and traces < 6
    with torch.no_grad():
        assert torch.equal(parts(*values)[0], module(*values)[0])


class Autocast(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Grad(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        with torch.enable_grad():
            return super().forward(x)


@pytest.mark.parametrize("model", (Autocast, Grad), ids=("autocast", "grad mode"))
def test_what_changes_later_nodes_is_traced_as_a_whole(model):
    module, values = captured(model(), X)
    whole, parts, traces = traced_both_ways(module)
    assert parts is None and traces == 0
    with torch.no_grad():
        assert torch.equal(whole(*values)[0], module(*values)[0])


def test_a_model_without_blocks_and_one_of_symbolic_sizes_are_traced_as_a_whole():
    assert traced_both_ways(captured(Block(), X)[0])[1:] == (None, 0)
    module, _ = captured(Model(), X, dynamic=True)
    assert traced_both_ways(module)[1:] == (None, 0)
