"""Multi-scale salient attention distillation: learn what packing may choose, one block at a time.

    L = L_quant + lambda_global L_global + lambda_local L_local          (arXiv 2509.23681, eq. 9)

L_quant is the squared error of the block's output, L_global and L_local those of the two attention maps of
attention_maps.py, all against the full-precision model. Each term is divided by its value before the first step, so
that the lambdas compare terms of one size whatever the model; the paper reaches the same by choosing them for each.
Learnt are smoothing scales and rotations (lr 5e-3) and ranges (lr 5e-2) with AdamW on a cosine; weights stay as they
are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .attention_maps import AttentionInputs, AttentionTap, global_map, local_map, salient_tokens
from .closed_form import Choice
from .fake_linear import FakeLinear, LearnedTransform
from .samples import Sample
from .settings import Settings
from .walk import replaced_forwards

TINY = 1e-30  # a term that is 0 before the first step stays out of the loss


@dataclasses.dataclass(frozen=True, eq=False)
class MapTargets:
    """The maps of one self-attention in full precision, on the CPU, and the salient tokens (B, k)."""

    tokens: torch.Tensor
    pooled: torch.Tensor
    salient: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, attention: AttentionInputs, settings: Settings) -> MapTargets:
        """Compute them; the tokens are chosen here once and for all (eq. 7)."""
        tokens = salient_tokens(attention, settings.salient, settings.salience_every)
        maps = global_map(attention, settings.stride), local_map(attention, tokens)
        return cls(tokens.cpu(), *(m.cpu() for m in maps))


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What the full-precision block gives for one sample."""

    output: Any
    maps: list[MapTargets]


def make_target(block: Callable[[], Any], settings: Settings, maps: bool) -> Target:
    """Run the full-precision block once; its attention maps are kept where `maps` and the settings want them."""
    with AttentionTap() as tap:
        output = block()
    maps = maps and settings.epochs > 0 and settings.lambda_global + settings.lambda_local > 0
    return Target(output, [MapTargets.of(a, settings) for a in tap.seen] if maps else [])


def losses(output: Any, seen: list[AttentionInputs], target: Target, settings: Settings) -> torch.Tensor:
    """(3,) float32: mean squared errors of the output, of the pooled maps, of the salient rows; 0 where not wanted."""
    pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(target.output), strict=True)
    misses = [(o.float() - t.float()).square().flatten() for o, t in pairs if isinstance(t, torch.Tensor)]
    found = [torch.cat(misses).mean()]
    zero = found[0].new_zeros(())
    for weight, kind in ((settings.lambda_global, "pooled"), (settings.lambda_local, "salient")):
        terms = [zero]
        for attention, maps in zip(seen, target.maps, strict=True) if weight > 0 and target.maps else ():
            if kind == "pooled":
                map = global_map(attention, settings.stride)
            else:
                map = local_map(attention, maps.tokens.to(attention.q.device))
            terms.append((map - getattr(maps, kind).to(map.device)).square().mean())
        found.append(torch.stack(terms).sum())
    return torch.stack(found)


def learn_choices(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    choices: Mapping[str, Choice],
    samples: list[Sample],
    targets: list[Target],
    settings: Settings,
    seed: int,
    report: Callable[[float], None],
) -> tuple[dict[str, Choice], dict[str, list[float]]]:
    """Distil one block: transforms and grids that bring it nearer to full precision.

    Args:
        choices: where they start.
        samples: inputs of the block.
        targets: one a sample.
        seed: of the order of the samples.
        report: told the loss after each step.

    Returns:
        the choices, and the mean losses of output, global and local maps {"before": [...], "after": [...]}. Where
        their weighted sum did not fall, the choices are those of the start.
    """
    transforms = {
        c.transform: LearnedTransform(c.transform, linears[n].in_features, c.grid.ws.device)
        for n, c in choices.items()
        if c.activation != "none"
    }
    students = {
        linears[n]: FakeLinear(linears[n], c.grid, transforms.get(c.transform), c.activation)
        for n, c in choices.items()
    }
    measured = distill(block, students, samples, targets, settings, seed, report)
    weights = torch.tensor([1.0, settings.lambda_global, settings.lambda_local])
    before, after = (torch.tensor(measured[k]) for k in ("before", "after"))
    if not bool((after / before.clamp(min=TINY) * weights).sum() < weights[before > 0].sum()):
        return dict(choices), measured
    settled = {old: new.settled() for old, new in transforms.items()}
    return {
        n: Choice(settled.get(c.transform, c.transform), students[linears[n]].grid(), c.activation)
        for n, c in choices.items()
    }, measured


def distill(
    block: nn.Module,
    students: Mapping[nn.Linear, FakeLinear],
    samples: list[Sample],
    targets: list[Target],
    settings: Settings,
    seed: int,
    report: Callable[[float], None],
) -> dict[str, list[float]]:
    """Learn the parameters of `students` in place, with the block's linears computing through them."""
    device = next(block.parameters()).device
    weights = torch.tensor([1.0, settings.lambda_global, settings.lambda_local], device=device)

    def measure(sample: Sample, target: Target) -> torch.Tensor:
        with replaced_forwards({linear: s.forward for linear, s in students.items()}), sample.context(device)():
            with AttentionTap() as tap:
                output = block(*sample.args, **sample.kwargs)
            return losses(output, tap.seen, target, settings)

    @torch.no_grad()
    def mean() -> torch.Tensor:
        return torch.stack([measure(s, t) for s, t in zip(samples, targets, strict=True)]).mean(0)

    before = mean()
    groups = _parameter_groups(students, settings)
    flat = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * len(samples))
    draw = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        for i in torch.randperm(len(samples), generator=draw).tolist():
            with torch.enable_grad():
                loss = (measure(samples[i], targets[i]) / before.clamp(min=TINY) * weights).sum()
                # Not backward(): the block's own parameters get no gradients.
                gradients = torch.autograd.grad(loss, flat, allow_unused=True)
            for parameter, gradient in zip(flat, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            report(float(loss.detach()))
    return {"before": before.tolist(), "after": mean().tolist()}


def _parameter_groups(students: Mapping[nn.Linear, FakeLinear], settings: Settings) -> list[dict[str, Any]]:
    transforms = dict.fromkeys(s.transform for s in students.values() if s.transform is not None)
    groups = [
        {"params": [p for t in transforms for p in t.parameters()], "lr": settings.lr_transform},
        {"params": [s.log_ratio for s in students.values()], "lr": settings.lr_range},
    ]
    return [group for group in groups if group["params"] and group["lr"] > 0]
