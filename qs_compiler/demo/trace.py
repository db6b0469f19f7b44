"""Sample one clip and keep what happened on the way: the state after each step, and the phase that each step ran in."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..dump import reports
from ..runtime.tracker import DenoisingRun, denoising
from .captions import Caption
from .metrics import relative_error
from .model import FRAMES, SIDE, sample
from .text import CaptionEncoder

BRANCHES = ("cond", "uncond")

Listener = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a clip is sampled: steps, grid in pixels, scale of classifier-free guidance, shift towards high noise."""

    num_steps: int
    frames: int = FRAMES
    side: int = SIDE
    guidance: float = 3.0
    shift: float = 6.0

    @property
    def tokens(self) -> int:
        """Video tokens of a clip, at the model's patch of (1, 4, 4)."""
        return self.frames * (self.side // 4) ** 2


@dataclasses.dataclass
class KeptBlocks:
    """The key blocks that the sparse steps of one layer read.

    Attributes:
        layer: qualified name of the module that feeds its q.
        map: (heads, query blocks, key blocks) bool, of the first clip of the batch.
    """

    layer: str
    map: torch.Tensor

    @property
    def density(self) -> float:
        """Fraction of the blocks that is kept."""
        return float(self.map.float().mean())


@dataclasses.dataclass
class Trace:
    """One sampled clip.

    Attributes:
        clip: (3, F, H, W) fp32 in [0, 1], on the CPU.
        states: what each step started from, fp32 on the CPU.
        velocities: what the model predicted in each step, one tensor a branch.
        phases: "dense", "refresh" or "sparse" of each step; None where nothing of this package ran.
        kept: of the last refresh, one entry an attention layer; empty if no step was sparse.
    """

    clip: torch.Tensor
    states: list[torch.Tensor] = dataclasses.field(default_factory=list)
    velocities: list[list[torch.Tensor]] = dataclasses.field(default_factory=list)
    phases: list[str | None] = dataclasses.field(default_factory=list)
    kept: list[KeptBlocks] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class StepError:
    """Relative L2 distances to the twin at one step: of the predicted velocity, and of the state that it leads to."""

    step: int
    phase: str | None
    velocity: float
    state: float


def sample_traced(
    model: nn.Module,
    text: CaptionEncoder,
    caption: Caption,
    setting: Setting,
    seed: int,
    *,
    announce: bool,
    before_call: Listener | None = None,
) -> Trace:
    """Sample the clip of one caption.

    Args:
        announce: tell the compressed model its denoising steps, so that it may run sparse.
        before_call: told (step, branch) before each call of the model.
    """
    trace = Trace(torch.empty(0))

    def on_call(step: int, branch: str) -> None:
        if before_call is not None:
            before_call(step, branch)
        if run is not None:
            run.step(step, branch)

    def transformer(**inputs: Any) -> tuple[torch.Tensor]:
        before = _calls()
        output = model(**inputs)
        after = _calls()
        if len(trace.velocities) == 0 or len(trace.velocities[-1]) == branches:
            trace.states.append(inputs["hidden_states"].float().cpu())
            trace.velocities.append([])
            trace.phases.append(next((p for p in after if after[p] > before.get(p, 0)), None))
        trace.velocities[-1].append(output[0].float().cpu())
        return output

    branches = 1 if setting.guidance == 1 else len(BRANCHES)
    with _announced(model, setting.num_steps, announce) as run:
        clips = sample(transformer, text, [caption], seed=seed, on_call=on_call, **dataclasses.asdict(setting))
        trace.clip = clips[0].cpu()
        if run is not None:
            trace.kept = kept_blocks(model, run, BRANCHES[0])
    return trace


@contextlib.contextmanager
def _announced(model: nn.Module, num_steps: int, announce: bool) -> Iterator[DenoisingRun | None]:
    if not announce:
        yield None
        return
    with denoising(model, num_steps) as run:
        yield run


def _calls() -> dict[str, int]:
    """How often each phase has run in this process, over all graphs."""
    counts: dict[str, int] = {}
    for report in reports():
        for phase, number in report.calls.items():
            counts[phase] = counts.get(phase, 0) + number
    return counts


def kept_blocks(model: nn.Module, run: DenoisingRun, branch: str) -> list[KeptBlocks]:
    """The block lists of a running video as maps, layer by layer in the order in which they run."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    names = {id(tensor): name.rpartition(".")[0] for name, tensor in tensors}
    found = []
    for entry in run.caches(branch):
        numbers, indices = (entry.value(slot)[0].cpu() for slot in ("kv_num_blocks", "kv_indices"))
        kept = torch.arange(indices.shape[-1]) < numbers[..., None]
        blocks = torch.zeros((*numbers.shape, numbers.shape[-1]), dtype=torch.bool)  # as many key as query blocks
        blocks.scatter_(-1, indices.long(), kept)
        found.append(KeptBlocks(names.get(id(entry.owner()), "?"), blocks))
    return found


def step_errors(trace: Trace, twin: Trace) -> list[StepError]:
    """How far each step of `trace` is from the same step of its uncompressed twin."""
    ends = [[*t.states[1:], 2 * t.clip[None] - 1] for t in (trace, twin)]
    return [
        StepError(step, phase, relative_error(ours, theirs), relative_error([end], [twin_end]))
        for step, (phase, ours, theirs, end, twin_end) in enumerate(
            zip(trace.phases, trace.velocities, twin.velocities, *ends, strict=True)
        )
    ]
