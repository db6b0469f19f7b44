"""A tiny random model of the demo's architecture on disk, with settings that leave it something to compress."""

from pathlib import Path

import torch

from qs_compiler import Recipe
from qs_compiler.demo import model as demo
from qs_compiler.demo.trace import Setting

CONFIG = {
    "transformer": {**demo.CONFIG["transformer"], "num_attention_heads": 2, "num_layers": 2, "ffn_dim": 64},
    "text": demo.CONFIG["text"],
}
SETTING = Setting(num_steps=4, frames=16, side=16)  # 256 tokens: four blocks of 64
SPARSE = Recipe.parse({"format": "w8a8", "density": 0.5, "block_size": 64, "interval": 3, "warmup": 0.25})
"""One dense step of four, then a refresh and two sparse steps."""


def write_model(folder: Path) -> Path:
    """Save it; returns `folder`."""
    torch.manual_seed(0)
    transformer, text = demo.build_model(CONFIG)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    demo.save_model(transformer, text, folder, CONFIG)
    return folder
