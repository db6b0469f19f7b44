"""Sparse attention with reuse between denoising steps, by the plain formulas: for sweeps over methods.

Independent of the graph passes and much faster than their references on a GPU, where the kept blocks are gathered and
go through flash attention. A row of benchmarks/ssar.py says what a `Method` does in each step.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qs_compiler.ops.refresh_attention import growth
from qs_compiler.runtime.cache_layout import MASS, probe_stride
from qs_compiler.runtime.schedule import Decision, Schedule

BLOCK = 128
HEAD_BUDGETS = Path(__file__).parent / "results" / "head_budgets.json"


@dataclasses.dataclass(frozen=True)
class Method:
    """What runs in each step.

    Attributes:
        phases: one letter a step: d dense, r refresh, s sparse, p dense just before a refresh ("adjacent" alone), a
            refresh or sparse by `max_drift`; one string for all layers, or one a layer.
        correction: "none", "first_order", "second_order", "adjacent" (second order, D_prev of the step before the
            refresh), "complement", or "mixture".
        gain: of the extrapolation, as in a Recipe; of a mixture: a number, or "fitted".
        mask: "pooled"; "estimate", the mass of the refresh before, by the log-sum-exps of the one before that, hence
            pooled at the first two: what a Recipe calls "mass"; or "exact", the mass of the refresh itself, which an
            extra sparse pass after the refresh allows.
        budgets: "uniform", or "fitted": a number of blocks for each head and layer, which make up the density together
            (those for the corrected error in benchmarks/results/head_budgets.json).
        frozen: a video keeps the mask of its first refresh.
        cache: storage of the first-order term: "bf16", "fp8", "int8", "int4" or "rankN".
        rank: of the second-order term; None for all.
        max_drift, most: of an adaptive schedule, as in a Recipe: its `max_drift` and `interval`; `min_interval` is 2.
    """

    phases: tuple[str, ...]
    density: float = 0.25
    correction: str = "first_order"
    gain: Any = "0"
    mask: str = "pooled"
    budgets: str = "uniform"
    frozen: bool = False
    cache: str = "bf16"
    rank: int | None = 16
    max_drift: float | None = None
    most: int = 5


class Reuse(TorchFunctionMode):
    """While open, self-attentions over `tokens` tokens run by `method`; `announce` must hear of each forward.

    Args:
        gains: layer -> (H,), of a fitted mixture.
    """

    def __init__(self, method: Method, tokens: int, gains: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.method, self.tokens, self.gains = method, tokens, gains
        self.budgets = fitted_budgets(method.density) if method.budgets == "fitted" else {}
        self.state: dict[tuple[str, int], dict[str, Any]] = {}
        self.step, self.branch, self.layer, self.now = 0, "", 0, ""
        self.schedule = Schedule(method.most, 0.0, max_drift=method.max_drift, min_interval=2)
        self.decisions: dict[str, Decision] = {}
        self.drifts: dict[str, list[torch.Tensor]] = {}
        self.ran: dict[str, str] = {}  # branch -> what its steps were, in letters

    def announce(self, step: int, branch: str) -> None:
        """The next forward computes `branch` of `step`."""
        self.step, self.branch, self.layer = step, branch, 0
        steps = self.method.phases[0]
        self.now = steps[step]
        if self.now == "a":
            drifts, last = self.drifts[branch], self.decisions.get(branch)
            one = self.schedule.decide(step, len(steps), last, lambda: float(torch.stack(drifts).mean()))
            self.decisions[branch], self.now = one, "r" if one.refresh == step else "s"
        self.drifts[branch] = []
        self.ran[branch] = self.ran.get(branch, "") + self.now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        q, k, v = names["query"], names["key"], names["value"]
        if not q.shape[2] == k.shape[2] == self.tokens:
            return func(*args, **kwargs)
        layer, self.layer = self.layer, self.layer + 1
        phases = self.method.phases
        phase = phases[layer % len(phases)][self.step].replace("a", self.now)
        state = self.state.setdefault((self.branch, layer), {})
        if phase == "d" or (phase == "p" and not state):
            return func(*args, **kwargs)
        run = {"r": self.refresh, "s": self.sparse, "p": self.look}[phase]
        return run(state, layer, q, k, v, q.shape[-1] ** -0.5).to(q.dtype)

    def look(self, state: dict[str, Any], layer: int, q: Any, k: Any, v: Any, scale: float) -> torch.Tensor:
        """A dense step that keeps D for the refresh after it."""
        dense, _ = flash(q, k, v, scale)
        state["before"] = dense - attend(q, k, v, state["blocks"], scale)[0]
        return dense

    def refresh(self, state: dict[str, Any], layer: int, q: Any, k: Any, v: Any, scale: float) -> torch.Tensor:
        method = self.method
        dense, lse = flash(q, k, v, scale)
        state["probe"] = probe(q) if method.max_drift is not None else None
        if not (method.frozen and "blocks" in state):
            scores = block_mass(q, k, scale) if method.mask == "exact" else state.get("mass")
            scores = pooled_scores(q, k, scale) if scores is None else scores
            state["blocks"] = select(scores, method.density, self.budgets.get(layer))
            if method.mask == "estimate":
                before, state["lse_prev"] = state.get("lse_prev"), lse
                state["mass"] = None if before is None else block_mass(q, k, scale, before).to(MASS)
        if method.correction == "none":
            return dense
        kept, lse_kept = attend(q, k, v, state["blocks"], scale)
        dropped = (1 - torch.exp(lse_kept - lse)).clamp_min(1e-6)[..., None]
        state["previous"] = {name: state.get(name) for name in ("residual", "o", "lse")}
        residual = dense - kept
        if method.correction == "complement":
            state["o"] = store((dense - (1 - dropped) * kept) / dropped, method.cache)
            state["lse"] = lse + torch.log(dropped[..., 0])
        follows = 0
        if method.correction == "mixture":
            fitted = method.gain == "fitted"
            gain = self.gains[layer].to(q.device).view(-1, 1, 1) if fitted else float(method.gain)
            follows = gain * dropped
        state["weight"] = 1 - follows
        state["residual"] = store(residual + follows * kept, method.cache)
        before = state.get("before") if method.correction == "adjacent" else state["previous"]["residual"]
        if before is not None and method.correction in ("second_order", "adjacent"):
            change = state["residual"] - before
            state["change"] = change if method.rank is None else low_rank(change, method.rank)
        state["tau"], state["step"] = self.step - state.get("step", self.step), self.step
        return dense

    def sparse(self, state: dict[str, Any], layer: int, q: Any, k: Any, v: Any, scale: float) -> torch.Tensor:
        method = self.method
        if method.max_drift is not None:
            then, now = state["probe"], probe(q)
            self.drifts[self.branch].append((now - then).norm() / then.norm())
        o, lse = attend(q, k, v, state["blocks"], scale)
        if method.correction == "none":
            return o
        lag = self.step - state["step"]
        gain = extrapolation(method.gain, lag, state["tau"]) if state["tau"] else 0.0
        if method.correction == "complement":
            previous = state["previous"]
            state_o, state_lse = state["o"], state["lse"]
            if gain:
                state_o = state_o + gain * (state_o - previous["o"])
                state_lse = state_lse + gain * (state_lse - previous["lse"])
            share = torch.sigmoid(lse - state_lse)[..., None]
            return share * o + (1 - share) * state_o
        y = state["weight"] * o + state["residual"]
        return y + gain * state["change"] if gain and "change" in state else y


def probe(q: torch.Tensor) -> torch.Tensor:
    """The rows of q by which drift is measured."""
    return q[:, :, :: probe_stride(q.shape[2])].float()


def extrapolation(gain: Any, lag: int, tau: int) -> float:
    """f(k) of the terms that extrapolate; 0 for a mixture's gains."""
    shares = {"1": 1.0, "k/tau": lag / tau, "clipped": min(lag / tau, 0.5)}
    return shares.get(gain, 0.0) if isinstance(gain, str) else 0.0


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float32 (from bf16 products on a GPU) and its log-sum-exp."""
    if q.is_cuda:
        o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return o.float(), lse
    logits = q.float() @ k.float().mT * scale
    return torch.softmax(logits, -1) @ v.float(), torch.logsumexp(logits, -1)


Blocks = torch.Tensor | list[torch.Tensor]  # (B, H, nQ, kept), or one such tensor for each head


def attend(q: Any, k: Any, v: Any, blocks: Blocks, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same over the listed key blocks of each query block."""
    if isinstance(blocks, list):
        heads = (attend(*(x[:, h : h + 1] for x in (q, k, v)), own, scale) for h, own in enumerate(blocks))
        o, lse = zip(*heads, strict=True)
        return torch.cat(o, 1), torch.cat(lse, 1)
    batch, heads, tokens, depth = q.shape
    count, kept = blocks.shape[2:]
    place = (torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * count + blocks).flatten()
    gathered = [x.reshape(-1, BLOCK * depth)[place].view(-1, 1, kept * BLOCK, depth) for x in (k, v)]
    o, lse = flash(q.reshape(-1, 1, BLOCK, depth), *gathered, scale)
    return o.reshape(q.shape), lse.reshape(batch, heads, tokens)


def pooled_scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """What the package's block_scores computes."""
    return torch.ops.quantsparse.block_scores.default(q, k, None, scale, BLOCK)


def block_mass(q: torch.Tensor, k: torch.Tensor, scale: float, lse_prev: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax mass of each key block, mean over the rows of each query block: (B, H, nQ, nK).

    Args:
        lse_prev: log-sum-exps (B, H, S) of an earlier step; with them the mass is as refresh_attention estimates it.
    """
    shares = []
    for clip in range(len(q)):
        logits = q[clip].float() @ k[clip].float().mT * scale
        by_row = torch.softmax(logits, -1).unflatten(-1, (-1, BLOCK)).sum(-1)
        if lse_prev is not None:
            by_row *= growth(torch.logsumexp(logits, -1), lse_prev[clip])[..., None]
        share = by_row.unflatten(1, (-1, BLOCK)).mean(2)
        shares.append(share if lse_prev is None else share / share.sum(-1, keepdim=True).clamp_min(1e-37))
    return torch.stack(shares)


def fitted_budgets(density: float) -> dict[int, list[int]]:
    """Layer -> the blocks that each head keeps."""
    rows = json.loads(HEAD_BUDGETS.read_text())["rows"]
    (row,) = (r for r in rows if (r["density"], r["budgets"]) == (density, "corrected error"))
    return {int(layer): kept for layer, kept in row["kept"].items()}


def select(scores: torch.Tensor, density: float, budgets: list[int] | None = None) -> Blocks:
    """Indices of the kept blocks, the diagonal among them."""
    count = scores.shape[-1]
    own = torch.eye(count, dtype=torch.bool, device=scores.device)
    order = scores.masked_fill(own, float("inf")).argsort(dim=-1, descending=True, stable=True)
    if budgets is not None:
        return [order[:, h : h + 1, :, :kept].sort(-1).values for h, kept in enumerate(budgets)]
    return order[..., : max(1, round(density * count))].sort(-1).values


def store(x: torch.Tensor, cache: str) -> torch.Tensor:
    """x as it comes back from a cache."""
    if cache == "bf16":
        return x.to(torch.bfloat16).float()
    if cache.startswith("rank"):
        return low_rank(x, int(cache[4:]))
    top = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}[cache]
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
    codes = (x / scale).to(torch.float8_e4m3fn).float() if cache == "fp8" else (x / scale).round()
    return codes * scale


def low_rank(x: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of each head by so many factors."""
    basis = torch.linalg.eigh(x.mT @ x).eigenvectors[..., -rank:]
    return x @ basis @ basis.mT
