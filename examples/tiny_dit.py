"""A diffusion transformer of two blocks with random weights: what the examples compress."""

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, TOKENS = 64, 2, 512


class Block(nn.Module):
    """Modulated self-attention and feed-forward, as in every video DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(time).unsqueeze(1).chunk(2, dim=-1)
        h = F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        q, k, v = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))


class TinyDiT(nn.Module):
    """Takes tokens (B, S, 64) and a timestep (B,), returns the velocity (B, S, 64)."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.proj_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = F.silu(self.time(timestep[:, None] / 1000))
        for block in self.blocks:
            x = block(x, time)
        return self.proj_out(x)


def tiny_dit() -> TinyDiT:
    """The same random weights each time; q and k are large, so that few keys hold most of a row's attention."""
    torch.manual_seed(0)
    model = TinyDiT().eval()
    for block in model.blocks:
        for linear in (block.to_q, block.to_k):
            linear.weight.data *= 4
    return model


def noise() -> torch.Tensor:
    """Tokens (1, 512, 64) to start from."""
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of `wanted`."""
    return float((found - wanted).norm() / wanted.norm())
