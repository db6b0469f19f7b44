"""Small models whose graphs have what real video DiTs have."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

TOKENS, WIDTH = 320, 32
RECIPE = {"format": "w8a8", "density": 0.4, "block_size": 64, "warmup": 0.0, "interval": 4}
DENSE = {"format": "w8a8"}
CACHES = [
    {"correction": "first_order", "cache_format": "int4"},
    {"correction": "mixture", "cache_format": "int8", "mask": "mass"},
    {"correction": "second_order", "cache_format": "bf16"},
    {"correction": "second_order", "cache_format": "rank16"},
    {"correction": "complement", "cache_format": "fp8"},
]  # one of each correction and each kind of cache


class Block(nn.Module):
    """Modulated self-attention over `qkv` and a feed-forward."""

    def __init__(self, width: int = WIDTH, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 2 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(embedding).unsqueeze(1).chunk(2, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:])), approximate="tanh"))


class TinyDiT(nn.Module):
    """Takes (hidden_states (B, S, C), timestep (B,), encoder_hidden_states (B, T, C)) and returns (B, S, C)."""

    def __init__(self, blocks: int = 2, width: int = WIDTH, graph_break: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.graph_break = graph_break

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        embedding = self.embed(timestep[:, None] / 1000) + encoder_hidden_states.mean(1)
        x = self.proj_in(hidden_states)
        for block in self.blocks:
            x = block(x, embedding)
            if self.graph_break:
                torch._dynamo.graph_break()
        return self.proj_out(x)


class ExoticDiT(nn.Module):
    """By hand: Conv3d patches, fused qkv, one weight used twice, head dim 80, 1,000 tokens, no list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, 80, (1, 2, 2), (1, 2, 2))
        self.qkv, self.out = nn.Linear(80, 240, bias=False), nn.Linear(80, 80)
        self.scale = nn.Parameter(torch.rand(80) + 0.5)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        for _ in range(2):
            q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, dim=-1))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return F.linear(x, self.out.weight * self.scale)


def make(seed: int = 0, **kwargs: object) -> TinyDiT:
    """A model whose attention has structure: large q and k, so that few keys hold most of the mass."""
    torch.manual_seed(seed)
    model = TinyDiT(**kwargs).eval()
    for block in model.blocks:
        block.qkv.weight.data[: 2 * WIDTH] *= 4
    return model


def clip(seed: int, steps: int, batch: int = 1, tokens: int = TOKENS) -> list[dict[str, torch.Tensor]]:
    """Inputs of one denoising run: slowly changing latents, falling timesteps, one conditioning tensor."""
    generator = torch.Generator().manual_seed(seed)
    noise, target = (torch.randn(batch, tokens, WIDTH, generator=generator) for _ in range(2))
    text = torch.randn(batch, 4, WIDTH, generator=generator)
    inputs = []
    for i in range(steps):
        sigma = 1 - i / steps
        x, timestep = sigma * noise + (1 - sigma) * target, torch.full((batch,), 1000 * sigma)
        inputs.append({"hidden_states": x, "timestep": timestep, "encoder_hidden_states": text})
    return inputs
