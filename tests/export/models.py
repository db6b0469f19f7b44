"""Models to export: a tiny Wan of diffusers, and one by hand with what real models have beside linears in blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def wan(layers: int = 2) -> nn.Module:
    """WanTransformer3DModel of `layers` blocks, 2 heads of 12 channels, random weights of seed 0."""
    diffusers = __import__("diffusers")
    torch.manual_seed(0)
    model: nn.Module = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return model.eval()


def wan_inputs(frames: int = 2, height: int = 8, width: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Latents (1, 16, frames, height, width), a timestep and 16 text tokens."""
    generator = torch.Generator().manual_seed(frames + height + width)
    return {
        "hidden_states": torch.randn(1, 16, frames, height, width, generator=generator).to(dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=generator).to(dtype),
        "return_dict": False,
    }


class MLPAttention(nn.Module):
    """No repeated blocks: a fused qkv, a weight used twice, one tied to an embedding, a computed one, a counter.

    Takes x (B, S, 32) and the ids (B, S) of added tokens; returns the result (B, S, 32) and x itself.
    """

    calls: torch.Tensor

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.heads = heads
        self.embed = nn.Embedding(width, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.mix = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.embed.weight
        self.basis = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("offset", torch.randn(width), persistent=False)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, scale: float | None = None) -> tuple[torch.Tensor, ...]:
        self.calls.add_(1)
        h = self.mix(self.mix(x + self.embed(ids)) + self.offset)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, dim=-1))
        h = x + self.out(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2))
        h = h + self.down(F.gelu(self.up(h)))
        return self.tied(h) + F.linear(h, self.basis * 2), x.float()


def mlp_inputs(tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(2, tokens, 32, generator=generator), torch.randint(0, 32, (2, tokens), generator=generator)
