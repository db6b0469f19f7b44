"""The two attention maps that MSAD distils, neither ever L x L (arXiv 2509.23681, section 3.2).

    global (eq. 6)   A = softmax(Q~ K~^T / sqrt(d)),  Q~, K~ averaged over `stride` neighbouring tokens: (L/stride)^2
    local  (eq. 7-8) A = softmax(Q_I K^T / sqrt(d)),  I the tokens that receive most attention: k x L

q and k are what the model hands to scaled_dot_product_attention, so after its norms and rotary embedding. They are seen
by a function mode around the forward; no attention class is known by name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MAP_ROWS = 256  # query rows whose attention over all keys is computed at a time, for one head


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionInputs:
    """One self-attention: q and k (B, H, L, D), scale of the logits, and which keys are real, (B, L) bool or None."""

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    real: torch.Tensor | None = None

    def detached(self, device: torch.device | str) -> AttentionInputs:
        """A copy without gradients on `device`."""
        real = None if self.real is None else self.real.to(device)
        return AttentionInputs(self.q.detach().to(device), self.k.detach().to(device), self.scale, real)


class AttentionTap(TorchFunctionMode):
    """While open, keeps the inputs of every self-attention in `seen`, in the order of the calls.

    Attributes:
        skipped: why an attention was not kept -> how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[AttentionInputs] = []
        self.skipped: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._see(*args, **kwargs)
        return func(*args, **kwargs)

    def _see(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        why = None
        real = None
        if query.dim() != 4 or query.shape[-2] != key.shape[-2]:
            why = "cross attention"
        elif is_causal:
            why = "causal attention"
        elif attn_mask is not None:
            if attn_mask.dtype == torch.bool and attn_mask.dim() == 4 and attn_mask.shape[1:3] == (1, 1):
                real = attn_mask[:, 0, 0].expand(len(query), -1)
            else:
                why = "attention with a mask that is not of keys alone"
        if why is not None:
            self.skipped[why] = self.skipped.get(why, 0) + 1
            return
        if enable_gqa:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        self.seen.append(AttentionInputs(query, key, query.shape[-1] ** -0.5 if scale is None else scale, real))


def _softmax(logits: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Over keys: logits (B, H, M, L) float32, real (B, L)."""
    if real is not None:
        logits = logits.masked_fill(~real[:, None, None], torch.finfo(logits.dtype).min)
    return logits.softmax(-1)


def global_map(attention: AttentionInputs, stride: int) -> torch.Tensor:
    """Eq. 6: (B, H, n, n) float32 with n = ceil(L / stride). Padding is left out of the averages."""
    q, k, real = attention.q.float(), attention.k.float(), attention.real
    batch, length = len(q), q.shape[-2]
    real = torch.ones(batch, length, dtype=torch.bool, device=q.device) if real is None else real
    pad = -length % stride
    weights = F.pad(real, (0, pad)).unflatten(1, (-1, stride)).float()
    count = weights.sum(-1)

    def pool(x: torch.Tensor) -> torch.Tensor:
        parts = F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, stride))
        return torch.einsum("bhnsd,bns->bhnd", parts, weights / count.clamp(min=1)[..., None])

    return _softmax(pool(q) @ pool(k).mT * attention.scale, count > 0)


def local_map(attention: AttentionInputs, tokens: torch.Tensor) -> torch.Tensor:
    """Eq. 8: attention of the queries `tokens` (B, k) int64 over all keys, (B, H, k, L) float32."""
    q, k = attention.q.float(), attention.k.float()
    rows = q.gather(2, tokens[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    return _softmax(rows @ k.mT * attention.scale, attention.real)


@torch.no_grad()
def salient_tokens(attention: AttentionInputs, count: int, every: int = 1) -> torch.Tensor:
    """Eq. 7: the `count` tokens with most attention, summed over heads and queries; (B, count) int64, ascending.

    Args:
        every: takes every n-th query only; for very long sequences an estimate of the same sums.
    """
    return received_mass(attention, every).topk(min(count, attention.k.shape[2]), dim=-1).indices.sort(-1).values


@torch.no_grad()
def received_mass(attention: AttentionInputs, every: int = 1) -> torch.Tensor:
    """sum over heads h and queries i of A[h, i, j], (B, L) float32; MAP_ROWS rows of one head exist at a time."""
    q, k = attention.q[:, :, ::every], attention.k
    real = None if attention.real is None else attention.real[:, None, ::every, None]
    mass = torch.zeros(len(k), k.shape[2], device=k.device)
    for head in range(k.shape[1]):
        keys = k[:, head : head + 1].float().mT
        for start in range(0, q.shape[2], MAP_ROWS):
            rows = q[:, head : head + 1, start : start + MAP_ROWS].float()
            weights = _softmax(rows @ keys * attention.scale, attention.real)
            if real is not None:
                weights = weights * real[:, :, start : start + MAP_ROWS]
            mass += weights.sum((1, 2))
    return mass
