"""Tiny random transformers of diffusers, one for each family of video models, and inputs for one forward."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import nn


def wan(
    layers: int = 2, cls: type[nn.Module] = diffusers.WanTransformer3DModel, in_channels: int = 16, **more: object
) -> tuple[nn.Module, dict[str, object]]:
    """Self- and cross-attention without masks; 576 tokens. `cls`: another of Wan's kind, with fields of its own."""
    model = cls(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=in_channels,
        out_channels=16, text_dim=32, freq_dim=256, ffn_dim=32, num_layers=layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32, **more,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, in_channels, 9, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 12, 32),
    }
    return model, inputs


def hunyuan(layers: int = 2, head_dim: int = 10) -> tuple[nn.Module, dict[str, object]]:
    """Joint attention, text after 320 video tokens, a padding mask; dual and single blocks."""
    space = 2 * (head_dim // 5)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=head_dim, num_layers=layers,
        num_single_layers=layers, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(head_dim - 2 * space, space, space),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 5, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "encoder_attention_mask": torch.tensor([[1] * 9 + [0] * 3], dtype=torch.bool),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6000.0]),
    }
    return model, inputs


def cogvideox(layers: int = 2) -> tuple[nn.Module, dict[str, object]]:
    """Joint attention, text before 256 video tokens, modulation linears, sincos positions."""
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=layers, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 16, 32),
    }
    return model, inputs


def ltx(layers: int = 2) -> tuple[nn.Module, dict[str, object]]:
    """Packed tokens, cross-attention with an additive mask; 320 tokens."""
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=layers, caption_channels=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 5 * 8 * 8, 8),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.tensor([[1] * 9 + [0] * 7]),
        "num_frames": 5,
        "height": 8,
        "width": 8,
    }
    return model, inputs


def hunyuan15(layers: int = 2) -> tuple[nn.Module, dict[str, object]]:
    """Joint attention, three texts after 320 video tokens, padding hidden from keys and queries; no single graph."""
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=layers,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=12,
        image_embed_dim=10, rope_axes_dim=(4, 6, 6), target_size=16, task_type="t2v",
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 9, 5, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "encoder_attention_mask": torch.tensor([[1] * 9 + [0] * 3]),
        "encoder_hidden_states_2": torch.randn(1, 6, 12),
        "encoder_attention_mask_2": torch.tensor([[1] * 4 + [0] * 2]),
        "image_embeds": torch.zeros(1, 4, 10),
    }
    return model, inputs


MODELS = {"wan": wan, "hunyuan": hunyuan, "cogvideox": cogvideox, "ltx": ltx}
PARTED = {"hunyuan 1.5": hunyuan15}  # several graphs


def make(name: str, layers: int = 2, **sizes: int) -> tuple[nn.Module, dict[str, object]]:
    """A model in eval mode with a fixed seed, and the arguments of one forward."""
    return ready((MODELS | PARTED)[name], layers, **sizes)


def ready(build: Callable[..., tuple[nn.Module, dict[str, object]]], *args: int, **sizes: int):
    """The same of what `build(*args, **sizes)` gives."""
    torch.manual_seed(0)
    model, inputs = build(*args, **sizes)
    return model.eval(), {**inputs, "return_dict": False}


def at_step(inputs: dict[str, object], step: int, steps: int) -> dict[str, object]:
    """The arguments of one step of a denoising run: latents change slowly, the timestep falls."""
    sigma = 1 - step / steps
    drift = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(1))
    timestep = inputs["timestep"]
    return {
        **inputs,
        "hidden_states": sigma * inputs["hidden_states"] + (1 - sigma) * drift,
        "timestep": torch.full_like(timestep, 1000 * sigma),
    }
