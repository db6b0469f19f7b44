"""Real models at their real shapes with random weights, packed layer by layer, and the inputs of one call."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import nn

import qs_compiler as qs
from qs_compiler.loading import parameters_on_meta
from qs_compiler.packed_linear import PackedLinear
from qs_compiler.packing import empty_packed_weight
from qs_compiler.pipeline import plan_layers, repeated_lists, replace_linears

TOKENS = 48  # of HunyuanVideo's 256 text tokens that are no padding
WAN = {"patch_size": (1, 2, 2), "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
MODELS = {  # class, config, latent grid (frames, height, width), calls a step
    "wan-1.3b": (
        diffusers.WanTransformer3DModel,
        {**WAN, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
        (21, 60, 104),  # 480 x 832, 81 frames
        2,
    ),
    "wan-14b": (
        diffusers.WanTransformer3DModel,
        {**WAN, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
        (21, 90, 160),  # 720 x 1280, 81 frames
        2,
    ),
    "hunyuan": (
        diffusers.HunyuanVideoTransformer3DModel,
        {"num_layers": 20, "num_single_layers": 40, "guidance_embeds": True},
        (33, 90, 160),  # 720 x 1280, 129 frames
        1,
    ),
    "small": (  # to try a command; runs on a CPU too
        diffusers.WanTransformer3DModel,
        {**WAN, "num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "num_layers": 4, "text_dim": 64},
        (5, 32, 32),
        2,
    ),
}
EMBEDDERS = {"*embed*": {"format": "w8a16"}}  # an override: stored int8, computed in 16 bit
CLASSES = ("attention", "ffn", "modulation", "embedders", "norms and tables", "other")


def without_values(name: str, layers: int | None, recipe: qs.Recipe | None) -> nn.Module:
    """The model, packed by `recipe`, its parameters and packed tensors on the meta device."""
    model_class, config, *_ = MODELS[name]
    if layers is not None:
        config = {**config, **{key: layers for key in ("num_layers", "num_single_layers") if key in config}}
    with parameters_on_meta():
        model = model_class(**config).eval().requires_grad_(False)

    def empty(_: str, linear: nn.Linear, own: qs.Recipe) -> PackedLinear:
        shape = (linear.out_features, linear.in_features)
        return PackedLinear(empty_packed_weight(shape, own, "meta"), linear.bias, torch.bfloat16)

    if recipe is not None and recipe.weight_format is not None:
        replace_linears(model, plan_layers(model, recipe), empty)
    return model


def build(name: str, layers: int | None, device: str, recipe: qs.Recipe | None = None) -> nn.Module:
    """The model with random weights on `device`, packed by `recipe`, one linear in 16 bit at a time."""
    torch.manual_seed(0)
    model = without_values(name, layers, None)
    planned = plan_layers(model, recipe) if recipe is not None and recipe.weight_format is not None else {}
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path in [path for path, _ in model.named_modules()]:  # no list of modules: it would keep the replaced ones
        module = model.get_submodule(path)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                dtype = torch.float32 if keep & {*path.split("."), key} else torch.bfloat16
                tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
                filled = tensor.normal_(std=0.02) if parameter.dim() > 1 or key == "bias" else tensor.fill_(1.0)
                module._parameters[key] = nn.Parameter(filled, requires_grad=False)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
        if path in planned:
            replace_linears(model, {path: planned[path]})
    return model


def inputs_of(name: str, model: nn.Module, device: str) -> dict[str, torch.Tensor]:
    """Random inputs of one call."""
    grid, text = MODELS[name][2], 256 if name == "hunyuan" else 512
    width = getattr(model.config, "text_embed_dim", None) or model.config.text_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    inputs = {
        "hidden_states": random(1, model.config.in_channels, *grid),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": random(1, text, width),
    }
    if name == "hunyuan":
        inputs["encoder_attention_mask"] = (torch.arange(text, device=device) < TOKENS)[None]
        inputs["pooled_projections"] = random(1, model.config.pooled_projection_dim)
        inputs["guidance"] = torch.tensor([6000.0], device=device)
    return inputs


def class_of(path: str, module: nn.Module, blocks: tuple[str, ...]) -> str:
    """The class of a module's own parameters, by its name in diffusers' models."""
    linear = isinstance(module, (nn.Linear, PackedLinear))
    if not path.startswith(blocks):
        return "embedders" if "embed" in path else "other"
    if linear and "norm" in path:
        return "modulation"
    if linear and "attn" in path:
        return "attention"
    return "ffn" if linear else "norms and tables"


def bytes_by_class(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters and packed tensors; 16-bit parameters but for the class's `_keep_in_fp32_modules`."""
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    blocks = repeated_lists(model)
    found = dict.fromkeys(CLASSES, 0)
    for path, module in model.named_modules():
        kind = class_of(path, module, blocks)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[kind] += parameter.numel() * (4 if keep & {*path.split("."), name} else 2)
        if isinstance(module, PackedLinear):
            found[kind] += sum(t.nbytes for t in module.packed.tensors().values())
    return found


class WithoutMask:
    """An attention processor of HunyuanVideo that gets no mask: right where the text has no padding."""

    def __init__(self, processor: Callable) -> None:
        self.processor = processor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        return self.processor(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


def trim(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the padding of the text away and with it the mask: what the best dense bf16 computes."""
    if "encoder_attention_mask" not in inputs:
        return inputs
    for module in model.modules():
        if isinstance(getattr(module, "processor", None), HunyuanVideoAttnProcessor2_0):
            module.processor = WithoutMask(module.processor)
    cut = {key: inputs[key][:, :TOKENS].contiguous() for key in ("encoder_hidden_states", "encoder_attention_mask")}
    return {**inputs, **cut}
