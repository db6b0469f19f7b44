"""The demo's model: diffusers' own WanTransformer3DModel in pixel space, its bundled weights, and a sampler.

A clip of 16 frames of 64 x 64 pixels at patch (1, 4, 4) is 4,096 tokens, 24 frames of 96 x 96 are 13,824. The model
predicts the flow-matching velocity: with x_s = (1 - s) x + s e for a clip x in [-1, 1] and noise e, it returns e - x
at timestep 1000 s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import ArtifactError
from .text import CaptionEncoder

WEIGHTS = Path(__file__).parent / "weights"
FRAMES, SIDE = 16, 64

CONFIG = {
    "transformer": {
        "patch_size": [1, 4, 4],
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "in_channels": 3,
        "out_channels": 3,
        "text_dim": 128,
        "freq_dim": 256,
        "ffn_dim": 768,
        "num_layers": 8,
        "rope_max_seq_len": 128,
    },
    "text": {"dim": 128},
}

OnCall = Callable[[int, str], None]
Progress = Callable[[int, int], None]


def build_model(config: dict = CONFIG) -> tuple[WanTransformer3DModel, CaptionEncoder]:
    """A fresh model in fp32 on the CPU. It starts as the zero velocity, with blocks unmodulated by the timestep."""
    transformer = WanTransformer3DModel(**config["transformer"])
    for linear in (transformer.proj_out, transformer.condition_embedder.time_proj):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer, CaptionEncoder(**config["text"])


def load_model(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, folder: str | Path = WEIGHTS
) -> tuple[WanTransformer3DModel, CaptionEncoder]:
    """The trained transformer and caption encoder, in eval mode.

    As diffusers' from_pretrained does, the modules that Wan wants in fp32 (norms, time embedder, modulation tables)
    stay fp32 whatever `dtype` is. Raises ArtifactError where `folder` does not hold a model.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise ArtifactError(
            f"no demo model in {folder}: {error.filename} is missing. Reinstall the package, or train a model with "
            "`python -m qs_compiler.demo.train --out FOLDER`."
        ) from error
    transformer, text = build_model(config)
    for prefix, module in (("transformer.", transformer), ("text.", text)):
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        module.load_state_dict(own)
        module.to(device).requires_grad_(False).eval()
    for name, parameter in transformer.named_parameters():
        if not any(part in name.split(".") for part in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return transformer, text.to(dtype)


def save_model(
    transformer: WanTransformer3DModel, text: CaptionEncoder, folder: str | Path, config: dict = CONFIG
) -> None:
    """Write both modules in bf16 as `folder`/model.safetensors, with config.json beside it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        prefix + name: t.detach().to("cpu", torch.bfloat16).contiguous()
        for prefix, module in (("transformer.", transformer), ("text.", text))
        for name, t in module.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_scheduler(num_steps: int, shift: float) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' Euler scheduler over `num_steps` noise levels, evenly spread and then shifted towards high noise."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist())
    return scheduler


@torch.no_grad()
def sample(
    transformer: Callable[..., tuple[torch.Tensor]],
    text: CaptionEncoder,
    captions: Sequence[object],
    *,
    frames: int = FRAMES,
    side: int = SIDE,
    num_steps: int = 30,
    guidance: float = 3.0,
    shift: float = 6.0,
    seed: int = 0,
    on_call: OnCall | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Generate one clip a caption: (B, 3, frames, side, side) fp32 in [0, 1], on the encoder's device.

    transformer: the model of load_model, or the same compiled. It is called twice a step, first on the captions and
        then on the empty caption (classifier-free guidance); once where `guidance` is 1.
    side: in pixels, a multiple of the patch's 4.
    seed: of the starting noise, which is drawn on the CPU and so is the same on every device.
    on_call: told (step, "cond" or "uncond") before each call of the transformer, for a denoising step signal.
    progress: told (steps done, num_steps) after each step.
    """
    conditions = {"cond": text.encode(captions)}
    if guidance != 1:
        conditions["uncond"] = text.encode([""] * len(captions))
    example = conditions["cond"]
    noise = torch.randn(len(captions), 3, frames, side, side, generator=torch.Generator().manual_seed(seed))
    clips = noise.to(example.device)
    scheduler = make_scheduler(num_steps, shift)
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = {}
        for branch, condition in conditions.items():
            if on_call is not None:
                on_call(step, branch)
            velocity[branch] = transformer(
                hidden_states=clips.to(example.dtype),
                timestep=timestep.expand(len(captions)).to(example.device),
                encoder_hidden_states=condition,
                return_dict=False,
            )[0].float()
        guided = velocity["cond"]
        if guidance != 1:
            guided = torch.lerp(velocity["uncond"], guided, guidance)
        clips = scheduler.step(guided, timestep, clips, return_dict=False)[0]
        if progress is not None:
            progress(step + 1, num_steps)
    return ((clips + 1) / 2).clamp(0, 1)
