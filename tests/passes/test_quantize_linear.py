"""quantize_linear: the graph before and after in both forms, and every reason to skip."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qs_compiler.blocks import block_of
from qs_compiler.options import Recipe
from qs_compiler.packed_linear import PackedLinear
from qs_compiler.passes.outline_repeated_blocks import OutlineRepeatedBlocks
from qs_compiler.passes.quantize_linear import QuantizeLinear
from tests.passes.conftest import targets
from tests.tolerances import relative_error

X = torch.randn(1, 64, 32)


class Three(nn.Module):
    """q, k and v read one x; out reads their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.q(x) + self.k(x) * self.v(x))


def test_plain_form(context) -> None:
    ctx = context(Three(), (X,))
    graph = ctx.capture.module.graph
    assert targets(graph).count("aten.linear.default") == 4
    result = QuantizeLinear().run(graph, ctx)
    after = targets(graph)
    assert (result.matched, result.skipped) == (4, [])
    assert "aten.linear.default" not in after
    assert after.count("quantsparse.linear.default") == 4
    assert after.count("quantsparse.quantize_rows.default") == 2, "q, k and v quantise x once"
    assert len(ctx.extra_inputs) == 8, "wq and ws of each weight are inputs, looked up at call time"
    graph.lint()


def test_attached_form_with_smoothing_and_int4(context) -> None:
    model = Three()
    recipe = Recipe.parse({"format": "w4a8", "group_size": 32})
    smooth = torch.rand(32) + 0.5
    for name in ("q", "k", "v", "out"):
        setattr(model, name, PackedLinear.from_linear(getattr(model, name), recipe, smooth=smooth))
    ctx = context(model, (X,), recipe="w4a8", attached=True)
    graph = ctx.capture.module.graph
    before = targets(graph)
    assert before.count("quantsparse.dequantize.default") == before.count("aten.linear.default") == 4
    result = QuantizeLinear().run(graph, ctx)
    after = targets(graph)
    assert (result.matched, result.skipped, ctx.extra_inputs) == (4, [], [])
    assert after.count("quantsparse.expand_w4.default") == after.count("quantsparse.linear.default") == 4
    assert "quantsparse.dequantize.default" not in after
    quantise = next(n for n in graph.nodes if str(n.target) == "quantsparse.quantize_rows.default")
    assert quantise.args[1].op == "placeholder" and quantise.args[3] == "int8"
    ctx.capture.module.recompile()


class Reader(nn.Module):
    """Reads the text in each block, as cross-attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.text = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return x + self.own(x) * self.text(text).mean(1, keepdim=True)


class Readers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Reader() for _ in range(3))

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        text = text * 2
        for block in self.blocks:
            x = block(x, text)
        return x


def test_what_all_blocks_read_is_quantised_before_the_first(context) -> None:
    ctx = context(Readers(), (X, torch.randn(1, 16, 32)))
    graph = ctx.capture.module.graph
    QuantizeLinear().run(graph, ctx)
    rows = [n for n in graph.nodes if str(n.target) == "quantsparse.quantize_rows.default"]
    assert [block_of(n) for n in rows] == [None, *((f"blocks.{i}", "Reader") for i in range(3))]
    assert str(rows[0].args[0].target) == "aten.mul.Tensor"
    assert OutlineRepeatedBlocks().run(graph, ctx).matched == 3, "the first block has the graph of the others"


def test_rows_that_a_layer_smooths_stay_in_its_block(context) -> None:
    model, recipe = Readers(), Recipe.parse("w8a8")
    for block in model.blocks:
        for name in ("own", "text"):
            smooth = torch.rand(32) + 0.5
            setattr(block, name, PackedLinear.from_linear(getattr(block, name), recipe, smooth=smooth))
    ctx = context(model, (X, torch.randn(1, 16, 32)), attached=True)
    QuantizeLinear().run(ctx.capture.module.graph, ctx)
    rows = [n for n in ctx.capture.module.graph.nodes if str(n.target) == "quantsparse.quantize_rows.default"]
    assert [block_of(n)[0] for n in rows] == [f"blocks.{i}" for i in range(3) for _ in range(2)]


def test_numerics_of_both_forms() -> None:
    torch.manual_seed(0)
    model = Three()
    with torch.no_grad():
        want = model(X)
        plain = torch.compile(model, backend="quantsparse")(X)
        for name in ("q", "k", "v", "out"):
            setattr(model, name, PackedLinear.from_linear(getattr(model, name), Recipe()))
        stored = model(X)
    assert relative_error(plain, want) < 0.02
    assert relative_error(stored, want) < 0.02


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(32, 32)}) for _ in range(2))
        self.embed, self.kept, self.free = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        x = x + self.embed(x[:, 0]).unsqueeze(1)
        x = F.linear(x, self.free.weight * self.scale)
        return F.linear(self.kept(x), given)


def test_reasons_to_skip(context) -> None:
    ctx = context(Odd(), (X, torch.randn(32, 32)), recipe={"format": "w8a8", "keep": ["kept"]})
    result = QuantizeLinear().run(ctx.capture.module.graph, ctx)
    assert result.matched == 0
    assert [reason for _, reason in result.skipped] == [
        "one row per clip (time, guidance or modulation)",
        "the weight is computed in the graph",
        "kept in 16 bit by the recipe",
        "the weight is not a parameter",
    ]
    assert result.skipped[0][0] == "linear (embed)"


@pytest.mark.parametrize(
    ("recipe", "attached", "reason"),
    [
        ("off", False, "recipe 'off'"),
        ("w8a8", True, "kept in 16 bit by the artifact"),
        ("w8a16", False, "'w8a16' is storage only; attach() stores it, a plain compile keeps the 16-bit weight"),
    ],
)
def test_reasons_of_the_recipe(context, recipe: str, attached: bool, reason: str) -> None:
    ctx = context(Three(), (X,), recipe=recipe, attached=attached)
    result = QuantizeLinear().run(ctx.capture.module.graph, ctx)
    assert {r for _, r in result.skipped} == {reason} and result.matched == 0


def test_a_linear_outside_the_repeated_blocks(context) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Three() for _ in range(2))
            self.out = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.out(x)

    ctx = context(Blocks(), (X,))
    result = QuantizeLinear().run(ctx.capture.module.graph, ctx)
    assert result.matched == 8
    assert [reason for _, reason in result.skipped] == ["outside the repeated blocks"]
