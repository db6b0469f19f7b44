"""What the bundled model is calibrated on: noised clips of captions that it was trained on, never one that is shown."""

from __future__ import annotations

from typing import Any

import torch

from .data import draw_scenes, render
from .model import make_scheduler
from .text import CaptionEncoder
from .trace import Setting

SEED = 7001
UNSEEN_SEED = 7002


def calibration_set(text: CaptionEncoder, setting: Setting, dtype: torch.dtype, forwards: int) -> list[dict[str, Any]]:
    """Inputs of so many forwards, spread over the noise levels of a run.

    Every second one has the empty caption, as classifier-free guidance wants.

    Args:
        setting: its grid and its spread of noise levels are used.
        dtype: of the latents.
    """
    return _forwards(text, setting, dtype, forwards, SEED, held_out=False)


def unseen_set(text: CaptionEncoder, setting: Setting, dtype: torch.dtype, forwards: int) -> list[dict[str, Any]]:
    """The same of captions that neither training nor calibration saw, to compare calibrations on."""
    return _forwards(text, setting, dtype, forwards, UNSEEN_SEED, held_out=True)


def _forwards(
    text: CaptionEncoder, setting: Setting, dtype: torch.dtype, forwards: int, seed: int, held_out: bool
) -> list[dict[str, Any]]:
    device = text.positions.device
    scenes = draw_scenes(forwards, seed, held_out=held_out)
    clips = 2 * render(scenes, setting.frames, setting.side, device) - 1
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    timesteps = make_scheduler(forwards, setting.shift).timesteps.to(device)
    return [
        {
            "hidden_states": torch.lerp(clips[i : i + 1], noise[i : i + 1], timesteps[i] / 1000).to(dtype),
            "timestep": timesteps[i : i + 1],
            "encoder_hidden_states": text.encode([caption if i % 2 == 0 else ""]),
            "return_dict": False,
        }
        for i, caption in enumerate(scenes.captions())
    ]
