"""A small video transformer that is nobody's: blocks of self-attention, cross-attention and an MLP, in plain torch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

CHANNELS, HEADS, TEXT = 64, 2, 32


class Attention(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.to_k, self.to_v = nn.Linear(context, CHANNELS), nn.Linear(context, CHANNELS, bias=False)

    def forward(self, x, context):
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(CHANNELS), Attention(TEXT)
        self.up, self.down = nn.Linear(CHANNELS, 2 * CHANNELS), nn.Linear(2 * CHANNELS, CHANNELS)
        self.modulation = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x, time, text):
        h = F.layer_norm(x, (CHANNELS,)) * (1 + 0.1 * self.modulation(time)[:, None])
        x = x + self.attn1(h, h)
        x = x + self.attn2(F.layer_norm(x, (CHANNELS,)), text)
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (CHANNELS,)))))


class Model(nn.Module):
    """Two blocks, then a skip connection from the input around a third."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, CHANNELS), nn.Linear(CHANNELS, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, *, timestep, text):
        h = first = self.embed(x)
        time = torch.stack([(timestep / 1000 * f).cos() for f in range(1, CHANNELS + 1)], -1)
        for i, block in enumerate(self.blocks):
            h = block(h + first if i == 2 else h, time, text=text)
        return self.out(self.dropout(h))


def make_model(seed: int = 0, blocks: int = 3) -> Model:
    """Weights with outlying input channels, as trained ones have."""
    torch.manual_seed(seed)
    model = Model(blocks)
    for linear in model.blocks.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data[:, ::16] *= 4
    return model


def make_forwards(count: int, seed: int = 0, tokens: int = 48) -> list[tuple[tuple, dict]]:
    """Correlated tokens: (args, kwargs) of `count` forwards."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(99))
    return [
        (
            (torch.randn(2, tokens, 8, generator=draw) @ mix,),
            {
                "timestep": torch.rand(2, generator=draw) * 1000,
                "text": torch.randn(2, 5, TEXT, generator=draw),
            },
        )
        for _ in range(count)
    ]
