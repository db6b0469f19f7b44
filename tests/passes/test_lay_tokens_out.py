"""lay_tokens_out: tokens that come channels-apart are made contiguous before the first block, others are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qs_compiler as qs
from qs_compiler.passes.outline_repeated_blocks import OutlineRepeatedBlocks
from tests.passes.conftest import targets
from tests.tolerances import relative_error

CHANNELS, GRID = 32, (2, 4, 6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(self.norm(x))


class Patches(nn.Module):
    """Patches as diffusers embeds them, (B, C, T, H, W) -> (B, L, C), through blocks."""

    def __init__(self, contiguous: bool = False) -> None:
        super().__init__()
        self.embed, self.contiguous = nn.Conv3d(4, CHANNELS, 1), contiguous
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x.contiguous() if self.contiguous else x
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(1, 4, *GRID)


@pytest.mark.parametrize("contiguous", (False, True))
def test_blocks_read_and_write_whole_tokens(context, contiguous) -> None:
    ctx = context(Patches(contiguous).eval(), (X,), recipe="off")
    graph = ctx.capture.module.graph
    names = targets(graph)
    assert names.count("aten.contiguous.default") == 1 and names.index("aten.contiguous.default") == 3
    tokens = [n for n in graph.nodes if str(n.target) == "aten.add.Tensor"]
    assert len(tokens) == 3 and all(n.meta["val"].is_contiguous() for n in tokens)
    assert OutlineRepeatedBlocks().run(graph, ctx).matched == 3


class InPlace(Patches):
    """The last use reads the convolution's output, into which the blocks have written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.embed(x)
        tokens = patches.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens += block(tokens)
        return patches


class OfTheCaller(Patches):
    """Tokens that are a view of what the caller gave."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens += block(tokens)
        return tokens.sum()


@pytest.mark.parametrize("kind", (InPlace, OfTheCaller))
def test_a_storage_that_others_read_is_left_alone(context, kind) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    x = X if kind is InPlace else torch.randn(1, CHANNELS, *GRID)
    ctx = context(model, (x,), recipe="off")
    assert "aten.contiguous.default" not in targets(ctx.capture.module.graph)
    with torch.no_grad():
        ours, eagers = x.clone(), x.clone()
        got = torch.compile(model, backend="quantsparse", options={"recipe": "off"}, fullgraph=True)(ours)
        assert relative_error(got, model(eagers)) < 1e-6 and torch.allclose(ours, eagers, atol=1e-5)


def test_a_call_keeps_its_values() -> None:
    torch.manual_seed(0)
    model = Patches().eval()
    with torch.no_grad():
        want = model(X)
        got = torch.compile(model, backend="quantsparse", options={"recipe": "off"}, fullgraph=True)(X)
    assert not want.is_contiguous(), "eager hands the strides of the convolution on"
    assert got.is_contiguous() and relative_error(got, want) < 1e-6
    assert qs.reports()[-1].passes[-1].matched == 3
