"""Train the demo's model: `python -m qs_compiler.demo.train --out FOLDER [--resume FOLDER] --stage GRIDS:SECONDS ...`

A stage is a set of grids and a number of seconds: `8x32@256:150` is 150 s on 8 frames of 32 x 32 in batches of 256, and
`16x64@32*9+24x96@4:300` mixes nine batches of one grid with one of another. Small grids come first: layout and motion
are learnt there at a tenth of the price, and pixels keep their meaning (see data.py) when the grid grows.

What is saved, and resumed from, is the moving average of the weights in bf16; optimiser moments are rebuilt by a short
warm-up. Every stage ends with a save, clips of held-out captions as a picture, and their accuracy.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .check import accuracy
from .data import draw_scenes, render
from .model import CONFIG, build_model, load_model, sample, save_model
from .muon import Muon
from .sheet import contact_sheet
from .text import tokenize

CAPTION_DROPOUT = 0.1  # for classifier-free guidance
EMA_DECAY = 0.998
WARM_UP_STEPS = 100
REPORT_SECONDS = 20
LAYOUT_NOISE = 0.95  # above this noise level only layout and motion can be seen, so their loss is reported apart
ATTENTION = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclasses.dataclass(frozen=True)
class Grid:
    """One batch: frames, side in pixels, clips."""

    frames: int
    side: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """Grids that take turns for a number of seconds."""

    grids: tuple[Grid, ...]
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Read `FRAMESxSIDE@BATCH[*TURNS][+...]:SECONDS`."""
        grids, seconds = text.split(":")
        turns = []
        for part in grids.split("+"):
            grid, _, count = part.partition("*")
            size, batch = grid.split("@")
            frames, side = size.split("x")
            turns.append([Grid(int(frames), int(side), int(batch))] * int(count or 1))
        # The rarer grids are spread, so that no two of their batches meet.
        longest = max(map(len, turns))
        spread = sorted((i * longest / len(t), n, g) for n, t in enumerate(turns) for i, g in enumerate(t))
        return cls(tuple(grid for *_, grid in spread), float(seconds))


class Denoiser(nn.Module):
    """Transformer and caption encoder as one module: what the average is taken of."""

    def __init__(self, transformer: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.transformer, self.text = transformer, text

    def forward(self, clips: torch.Tensor, noise_level: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.transformer(clips, 1000 * noise_level, self.text(tokens), return_dict=False)[0]


def flow_matching_loss(
    model: nn.Module, clips: torch.Tensor, tokens: torch.Tensor, shift: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of the velocity for each clip, (B,) fp32, and the noise levels, (B,).

    Levels are stratified over the batch and shifted towards 1 by s -> shift s / (1 + (shift - 1) s).
    """
    batch = len(clips)
    even = (torch.randperm(batch, device=clips.device) + torch.rand(batch, device=clips.device)) / batch
    level = shift * even / (1 + (shift - 1) * even)
    noise = torch.randn_like(clips)
    mixed = torch.lerp(clips, noise, level[:, None, None, None, None])
    velocity = model(mixed, level, tokens)
    return (velocity.float() - (noise - clips)).square().mean((1, 2, 3, 4)), level


def make_batch(grid: Grid, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (B, 3, F, S, S) fp32 in [-1, 1] of training captions, and tokens (B, T), some of them the empty caption."""
    scenes = draw_scenes(grid.batch, seed)
    tokens = tokenize(scenes.captions())
    tokens[torch.rand(grid.batch, generator=torch.Generator().manual_seed(seed)) < CAPTION_DROPOUT] = 0
    clips = render(scenes, grid.frames, grid.side, device)
    return clips * 2 - 1, tokens.to(device, non_blocking=True)


def make_optimisers(model: Denoiser, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


class Training:
    """The run: model, average, optimisers and clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.clock = options, time.monotonic()
        self.device = torch.device(options.device)
        self.stages = [Stage.parse(text) for text in options.stage]
        self.total = sum(stage.seconds for stage in self.stages)
        torch.manual_seed(options.seed)
        modules = load_model(self.device, folder=options.resume) if options.resume else build_model()
        self.model = Denoiser(*modules).to(self.device).requires_grad_(True).train()
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        if not options.eager:
            self.model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        self.optimisers = make_optimisers(self.model, options.lr)
        self.step = 0

    def seconds(self) -> float:
        return time.monotonic() - self.clock

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def learning_rate(self) -> float:
        """Linear warm-up by steps, constant, linear decay to zero over the last `--decay` seconds."""
        left = (self.total - self.seconds()) / max(self.options.decay, 1e-6)
        return self.options.lr * min(1.0, (self.step + 1) / WARM_UP_STEPS, max(left, 0.01))

    def update(self, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        clips, tokens = make_batch(grid, self.options.seed * 1_000_000 + self.step, self.device)
        with self.autocast():
            losses, level = flow_matching_loss(self.model, clips, tokens, self.options.shift)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.param_groups[0]["lr"] = self.learning_rate()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.average.update_parameters(self.model)
        self.step += 1
        return losses.detach(), level

    def run_stage(self, stage: Stage, until: float) -> None:
        """Train till `until` seconds on the clock, with a line of progress now and then."""
        since, sums, first = self.seconds(), torch.zeros(4, device=self.device), self.step
        for grid in itertools.cycle(stage.grids):
            losses, level = self.update(grid)
            layout = level > LAYOUT_NOISE
            sums += torch.stack([losses.sum(), torch.ones_like(losses).sum(), (losses * layout).sum(), layout.sum()])
            now = self.seconds()
            if now - since > REPORT_SECONDS or now > until:
                loss, count, layout_loss, layout_count = sums.tolist()
                now = self.seconds()
                print(
                    f"{now:6.0f} s  step {self.step:6d}  {(self.step - first) / (now - since):5.1f} steps/s  "
                    f"lr {self.learning_rate():.1e}  loss {loss / count:.4f}  "
                    f"layout {layout_loss / max(layout_count, 1):.4f}",
                    flush=True,
                )
                since, first = now, self.step
                sums.zero_()
            if now > until:
                return

    def finish_stage(self, index: int, stage: Stage) -> None:
        """Save, sample held-out captions on the stage's first grid, print their accuracy."""
        best: Denoiser = self.average.module
        save_model(best.transformer, best.text, self.options.out, CONFIG)
        if not self.options.samples:
            return
        scenes = draw_scenes(self.options.samples, seed=index, held_out=True)
        captions, grid = scenes.captions(), stage.grids[0]
        best.eval()
        with self.autocast():
            clips = sample(best.transformer, best.text, captions, frames=grid.frames, side=grid.side, num_steps=20)
        print(f"{self.seconds():6.0f} s  {grid}: {accuracy(clips, captions)}", flush=True)
        contact_sheet(clips[:12], Path(self.options.out) / f"stage{index}.png", [str(c) for c in captions[:12]])

    def run(self) -> None:
        until = 0.0
        backends = [ATTENTION[self.options.attention]] if self.options.attention else list(ATTENTION.values())
        for index, stage in enumerate(self.stages):
            until += stage.seconds
            with sdpa_kernel(backends) if self.device.type == "cuda" else contextlib.nullcontext():
                self.run_stage(stage, until)
            self.finish_stage(index, stage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for weights and pictures")
    parser.add_argument("--resume", help="folder of earlier weights")
    parser.add_argument("--stage", action="append", required=True, help="GRIDS:SECONDS, repeated")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.0, help="seconds of linear decay at the end")
    parser.add_argument("--shift", type=float, default=6.0, help="of the noise levels towards 1")
    parser.add_argument("--seed", type=int, default=0, help="of data and noise; take another one to resume")
    parser.add_argument("--samples", type=int, default=32, help="held-out captions sampled after each stage")
    parser.add_argument("--attention", choices=sorted(ATTENTION), help="CUDA attention backend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    torch.set_float32_matmul_precision("high")
    Training(parser.parse_args()).run()


if __name__ == "__main__":
    main()
