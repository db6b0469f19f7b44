"""Multi-scale salient attention distillation: learn what packing may choose, one block at a time.

    L = L_quant + lambda_global L_global + lambda_local L_local          (arXiv 2509.23681, eq. 9)

L_quant is the squared error of the block's output, L_global and L_local those of the two attention maps of
attention_maps.py, all against the full-precision model. Each term is divided by its value before the first step, so
that the lambdas compare terms of one size whatever the model; the paper reaches the same by choosing them for each.
Learnt are smoothing scales and rotations (lr 5e-3) and ranges (lr 5e-2) with AdamW on a cosine; weights stay as they
are. Beyond the paper the same loss can then choose the rounding of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..options import Recipe
from ..packing import PackedWeight
from .attention_maps import AttentionInputs, AttentionTap, LocalTarget, global_map, salient_tokens
from .closed_form import Choice, Compressed
from .fake_linear import FakeLinear, LearnedTransform, RoundedLinear
from .samples import Sample
from .settings import Settings
from .sparse_attention import SparseStudent, SparseTarget, SparseTargets
from .walk import replaced_forwards

Losses = dict[str, list[float]]


@dataclasses.dataclass(frozen=True, eq=False)
class MapTargets:
    """The maps of one self-attention in full precision, on the CPU."""

    pooled: torch.Tensor
    local: LocalTarget

    @classmethod
    @torch.no_grad()
    def of(cls, attention: AttentionInputs, settings: Settings) -> MapTargets:
        """Compute them; the salient tokens are chosen here once and for all (eq. 7)."""
        tokens = salient_tokens(attention, settings.salient, settings.salience_every)
        return cls(global_map(attention, settings.stride).cpu(), LocalTarget.of(attention, tokens))


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What the full-precision block gives for one sample; `sparse` is empty where attention is distilled dense."""

    output: Any
    maps: list[MapTargets]
    sparse: list[SparseTarget | None]


def make_target(block: Callable[[], Any], settings: Settings, recipe: Recipe, distil: bool) -> Target:
    """Run the full-precision block once; what distillation needs of its attentions is kept where it is wanted."""
    distil = distil and settings.steps > 0
    maps = distil and settings.lambda_global + settings.lambda_local > 0
    sparse = SparseTargets(recipe)
    # In both modes the tap is the inner one: it hears the model's calls, not those that the other makes of them.
    with sparse if distil and settings.attention == "sparse" else contextlib.nullcontext(), AttentionTap() as tap:
        output = block()
    return Target(output, [MapTargets.of(a, settings) for a in tap.seen] if maps else [], sparse.found)


def losses(output: Any, seen: list[AttentionInputs], target: Target, settings: Settings) -> torch.Tensor:
    """(3,) float32: mean squared errors of the output, of the pooled maps, of the salient rows; 0 where not wanted."""
    pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(target.output), strict=True)
    pairs = [(o, t.to(o)) for o, t in pairs if isinstance(t, torch.Tensor)]
    misses = [(o.float() - t.float()).square().sum() for o, t in pairs]
    miss = torch.stack(misses).sum() / sum(t.numel() for _, t in pairs)
    pooled, local = [miss.new_zeros(())], [miss.new_zeros(())]
    for attention, maps in zip(seen, target.maps, strict=True) if target.maps else ():
        if settings.lambda_global > 0:
            pooled.append((global_map(attention, settings.stride) - maps.pooled.to(miss.device)).square().mean())
        if settings.lambda_local > 0:
            local.append(maps.local.squared_error(attention))
    return torch.stack([miss, torch.stack(pooled).sum(), torch.stack(local).sum()])


def learn_choices(
    distiller: Distiller, linears: Mapping[str, nn.Linear], choices: Mapping[str, Choice]
) -> tuple[dict[str, Choice], Losses]:
    """Learn the transforms and the ranges of a block, starting from `choices`; weights count as rounded to nearest."""
    settings = distiller.settings
    learned = {
        c.transform: LearnedTransform(c.transform, linears[n].in_features, c.grid.ws.device)
        for n, c in choices.items()
        if c.activation != "none"
    }
    students = {
        n: FakeLinear(linears[n], c.grid, learned.get(c.transform), c.activation) for n, c in choices.items()
    }
    groups = [
        {"params": [p for t in learned.values() for p in t.parameters()], "lr": settings.lr_transform},
        {"params": [s.clip for s in students.values()], "lr": settings.lr_range},
    ]
    losses = distiller.learn({linears[n]: s for n, s in students.items()}, groups, settings.epochs)
    settled = {old: new.settled() for old, new in learned.items()}
    return {
        n: Choice(settled.get(c.transform, c.transform), students[n].grid(), c.activation) for n, c in choices.items()
    }, losses


def learn_rounding(
    distiller: Distiller, linears: Mapping[str, nn.Linear], found: Compressed
) -> tuple[dict[str, PackedWeight], Losses]:
    """Learn which way each weight of a block is rounded, starting from what GPTQ found.

    As in AdaRound (arXiv 2004.10568), but with straight-through gradients, and free to move further than to the
    neighbour.
    """
    settings, choices = distiller.settings, found.choices
    students = {
        n: RoundedLinear(linears[n], codes, choices[n].grid, choices[n].transform, choices[n].activation)
        for n, codes in found.unrounded.items()
    }
    groups = [{"params": [s.codes for s in students.values()], "lr": settings.lr_rounding}]
    losses = distiller.learn({linears[n]: s for n, s in students.items()}, groups, settings.epochs_rounding)
    return {n: s.pack() for n, s in students.items()}, losses


@dataclasses.dataclass(frozen=True)
class Distiller:
    """One block, what it gets and what it should give.

    Attributes:
        samples: inputs of the block, with the blocks before it compressed.
        targets: one a sample.
        recipe: its block size is that of a sparse student.
        seed: of the order of the samples.
        report: told the loss after each step.
    """

    block: nn.Module
    samples: list[Sample]
    targets: list[Target]
    settings: Settings
    recipe: Recipe
    seed: int
    report: Callable[[float], None]

    def learn(
        self, students: Mapping[nn.Linear, nn.Module], groups: list[dict[str, Any]], epochs: int
    ) -> Losses:
        """Learn the parameters in `groups` (AdamW's), with the block's linears computing through `students`.

        Returns:
            mean losses of output, global and local maps {"before": [...], "after": [...]}. Where their weighted sum
            has not fallen, the parameters are those of the start.
        """
        forwards = {linear: s.forward for linear, s in students.items()}
        groups = [group for group in groups if group["params"] and group["lr"] > 0]
        flat = [p for group in groups for p in group["params"]]
        start = [p.detach().clone() for p in flat]
        before = self._mean(forwards)
        scale = torch.tensor([1.0, self.settings.lambda_global, self.settings.lambda_local], device=before.device)
        scale = torch.where(before > 0, scale / before, 0.0)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(self.samples))
        draw = torch.Generator().manual_seed(self.seed)
        for _ in range(epochs):
            for i in torch.randperm(len(self.samples), generator=draw).tolist():
                with torch.enable_grad():
                    loss = (self._losses(forwards, i) * scale).sum()
                    # Not backward(): the block's own parameters get no gradients.
                    gradients = torch.autograd.grad(loss, flat, allow_unused=True)
                for parameter, gradient in zip(flat, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
                self.report(float(loss.detach()))
        after = self._mean(forwards)
        if not bool((after * scale).sum() < (before * scale).sum()):
            with torch.no_grad():
                for parameter, value in zip(flat, start, strict=True):
                    parameter.copy_(value)
        return {"before": before.tolist(), "after": after.tolist()}

    def _losses(self, forwards: Mapping[nn.Linear, Callable[..., Any]], i: int) -> torch.Tensor:
        device = next(self.block.parameters()).device
        sample = self.samples[i].to(device)
        sparse = self.targets[i].sparse
        student = SparseStudent(sparse, self.recipe.block_size) if sparse else contextlib.nullcontext()
        with replaced_forwards(forwards), sample.context(device)(), student, AttentionTap() as tap:
            output = self.block(*sample.args, **sample.kwargs)
        return losses(output, tap.seen, self.targets[i], self.settings)

    @torch.no_grad()
    def _mean(self, forwards: Mapping[nn.Linear, Callable[..., Any]]) -> torch.Tensor:
        return torch.stack([self._losses(forwards, i) for i in range(len(self.samples))]).mean(0)
