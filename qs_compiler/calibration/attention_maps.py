"""The two attention maps that MSAD distils, neither ever L x L (arXiv 2509.23681, section 3.2).

    global (eq. 6)   A = softmax(Q~ K~^T / sqrt(d)),  Q~, K~ averaged over `stride` neighbouring tokens: (L/stride)^2
    local  (eq. 7-8) A = softmax(Q_I K^T / sqrt(d)),  I the tokens that receive most attention: k x L

q and k are what the model hands to scaled_dot_product_attention, so after its norms and rotary embedding.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention_call import AttentionCall, AttentionListener

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


class AttentionTap(AttentionListener):
    """While open, keeps the inputs of every self-attention in `seen`, in the order of the calls.

    Attributes:
        skipped: why an attention was not kept -> how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[AttentionInputs] = []
        self.skipped: dict[str, int] = {}

    def hear(self, call: AttentionCall) -> None:
        """Keep it, or count why not."""
        why = None
        if not call.is_self_attention:
            why = "cross attention"
        elif call.is_causal:
            why = "causal attention"
        elif call.attn_mask is not None and not call.masks_keys_alone:
            why = "attention with a mask that is not of keys alone"
        if why is not None:
            self.skipped[why] = self.skipped.get(why, 0) + 1
            return
        key, mask = call.key, call.attn_mask
        if call.enable_gqa:
            key = key.repeat_interleave(call.query.shape[1] // key.shape[1], 1)
        real = None if mask is None else mask[:, 0, 0].expand(len(key), -1)
        self.seen.append(AttentionInputs(call.query, key, call.logit_scale, real))


def _softmax(logits: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Over keys: logits (B, H, M, L) float32, real (B, L)."""
    if real is not None:
        logits = logits.masked_fill(~real[:, None, None], torch.finfo(logits.dtype).min)
    return logits.softmax(-1)


def global_map(attention: AttentionInputs, stride: int) -> torch.Tensor:
    """Eq. 6: (B, H, n, n) float32 with n = ceil(L / stride). Padding is left out of the averages."""
    batch, length = len(attention.q), attention.q.shape[-2]
    real = attention.real
    pad = -length % stride
    counted = torch.ones(batch, length, device=attention.q.device) if real is None else real.float()
    count = F.pad(counted, (0, pad)).unflatten(1, (-1, stride)).sum(-1)

    def pool(x: torch.Tensor) -> torch.Tensor:
        # Summed in fp32 from the dtype that it has: a copy in fp32 would be the largest tensor of a distillation.
        x = x if real is None else x * real[:, None, :, None]
        x = F.pad(x, (0, 0, 0, pad)) if pad else x
        return x.unflatten(2, (-1, stride)).sum(3, dtype=torch.float32) / count.clamp(min=1)[:, None, :, None]

    return _softmax(pool(attention.q) @ pool(attention.k).mT * attention.scale, count > 0)


def query_rows(attention: AttentionInputs, tokens: torch.Tensor) -> torch.Tensor:
    """The queries `tokens` (B, k) int64 of all heads, (B, H, k, D)."""
    q = attention.q
    return q.gather(2, tokens[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))


def local_map(attention: AttentionInputs, tokens: torch.Tensor) -> torch.Tensor:
    """Eq. 8: attention of the queries `tokens` (B, k) int64 over all keys, (B, H, k, L) float32."""
    rows = query_rows(attention, tokens).float()
    return _softmax(rows @ attention.k.float().mT * attention.scale, attention.real)


@dataclasses.dataclass(frozen=True, eq=False)
class LocalTarget:
    """The local map of full precision as what it is computed from, which is smaller: D values a key, not k floats.

    Attributes:
        tokens: (B, k) int64.
        rows, k: (B, H, k, D) and (B, H, L, D), on the CPU.
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    k: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, attention: AttentionInputs, tokens: torch.Tensor) -> LocalTarget:
        """The target that this attention gives."""
        return cls(tokens.cpu(), query_rows(attention, tokens).cpu(), attention.k.detach().cpu())

    def squared_error(self, attention: AttentionInputs) -> torch.Tensor:
        """Mean over the local map of another attention's squared difference; the map of one head exists at a time."""
        device, real = attention.q.device, attention.real
        rows, k = query_rows(attention, self.tokens.to(device)), attention.k
        total = torch.zeros((), device=device)

        def of_head(q: torch.Tensor, k: torch.Tensor, q_full: torch.Tensor, k_full: torch.Tensor) -> torch.Tensor:
            full = _softmax(q_full.float() @ k_full.float().mT * attention.scale, real)
            return (_softmax(q.float() @ k.float().mT * attention.scale, real) - full).square().sum()

        once = functools.partial(checkpoint, of_head, use_reentrant=False, preserve_rng_state=False)
        for head in range(k.shape[1]):
            own = slice(head, head + 1)
            total = total + once(rows[:, own], k[:, own], self.rows[:, own].to(device), self.k[:, own].to(device))
        return total / (rows.shape[0] * rows.shape[1] * rows.shape[2] * k.shape[2])


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
