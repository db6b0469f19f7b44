"""More video transformers of diffusers: how much of each is compressed, and how exactly."""

from __future__ import annotations

from collections.abc import Callable

import diffusers as D
import pytest
import torch
from torch import nn

import qs_compiler as qs
from tests.backend.diffusers_models import at_step, ready, wan
from tests.tolerances import RELATIVE_ERROR, relative_error

STEPS = 6
SPARSE = {"format": "off", "density": 0.25, "block_size": 64, "warmup": 0.2, "interval": 3}
pytestmark = [
    pytest.mark.usefixtures("eager_graphs"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's
]
Made = tuple[nn.Module, dict[str, object]]


def wan_from_an_image() -> Made:
    model, inputs = wan(in_channels=36, image_dim=16, added_kv_proj_dim=24)
    return model, {**inputs, "encoder_hidden_states_image": torch.randn(1, 7, 16)}


def wan_vace() -> Made:
    model, inputs = wan(3, D.WanVACETransformer3DModel, vace_layers=[0, 2], vace_in_channels=24)
    return model, {**inputs, "control_hidden_states": torch.randn(1, 24, 9, 16, 16)}


def skyreels() -> Made:
    return wan(cls=D.SkyReelsV2Transformer3DModel)


def framepack() -> Made:
    model = D.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), has_image_proj=True, image_proj_dim=16,
        has_clean_x_embedder=True,
    )  # fmt: skip
    history = {
        name: torch.randn(1, 4, frames, 16, 16)
        for name, frames in {"latents_clean": 2, "latents_history_2x": 2, "latents_history_4x": 4}.items()
    }
    inputs = {
        "hidden_states": torch.randn(1, 4, 5, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "encoder_attention_mask": torch.tensor([[1] * 9 + [0] * 3]),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6000.0]),
        "image_embeds": torch.randn(1, 3, 16),
        "indices_latents": torch.arange(5.0),
        **{f"indices_{name}": torch.ones(value.shape[2]) for name, value in history.items()},
    }
    return model, {**inputs, **history}


def ltx2() -> Made:
    model = D.LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False,
    )  # fmt: skip
    mask = torch.tensor([[1] * 9 + [0] * 7])
    inputs = {
        "hidden_states": torch.randn(1, 5 * 8 * 8, 8),
        "audio_hidden_states": torch.randn(1, 9, 4),
        "encoder_hidden_states": torch.randn(1, 16, 16),
        "audio_encoder_hidden_states": torch.randn(1, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 5,
        "height": 8,
        "width": 8,
        "audio_num_frames": 9,
        "fps": 25.0,
    }
    return model, inputs


def kandinsky5() -> Made:
    model = D.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=64, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip
    for block in model.visual_transformer_blocks:  # whose gates and shifts begin as zeros
        nn.init.normal_(block.visual_modulation.out_layer.weight, std=0.1)
    inputs = {
        "hidden_states": torch.randn(1, 9, 16, 16, 4),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": torch.randn(1, 8),
        "visual_rope_pos": [torch.arange(9), torch.arange(8), torch.arange(8)],
        "text_rope_pos": torch.arange(12),
    }
    return model, inputs


def easyanimate() -> Made:
    model = D.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, mmdit_layers=2, sample_width=16, sample_height=16, patch_size=2,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 5, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
    }
    return model, inputs


def mochi() -> Made:
    model = D.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=16, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 12, 5, 16, 16),
        "encoder_hidden_states": torch.randn(1, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.tensor([[1] * 9 + [0] * 7]).bool(),
    }
    return model, inputs


def sana_video() -> Made:
    model = D.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
        sample_size=16, rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 5, 16, 16),
        "encoder_hidden_states": torch.randn(1, 12, 8),
        "timestep": torch.tensor([500.0]),
    }
    return model, inputs


# Calls of sparse graphs with self-attention over video tokens in a step: one graph, or one for each block.
SPARSE_GRAPHS = {
    wan_from_an_image: 1, wan_vace: 1, skyreels: 1, framepack: 4, ltx2: 1, kandinsky5: 1, easyanimate: 1,
}  # fmt: skip
GRIDS = {ltx2: (5, 8, 8), kandinsky5: (9, 8, 8)}  # no convolution embeds their patches


@pytest.mark.parametrize("make", SPARSE_GRAPHS, ids=lambda make: make.__name__)
def test_dense_steps_and_refreshes_are_exact_and_the_others_sparse(make: Callable[[], Made]) -> None:
    (model, inputs), (exact, _), count = ready(make), ready(make), len(qs.reports())
    qs.attach(model, recipe=SPARSE, grid=GRIDS.get(make))
    with qs.denoising(model, STEPS) as run:
        for i in range(STEPS):
            run.step(i)
            step = at_step(inputs, i, STEPS)
            error = relative_error(model(**step)[0], exact(**step)[0])
            if i in (3, 4):
                assert 1e-5 < error < 0.3, f"sparse step {i}: {error}"
            else:
                assert error < RELATIVE_ERROR[torch.float32], f"step {i}: {error}"
    reports = qs.reports()[count:]
    assert sum(report.calls["sparse"] for report in reports) == 2 * SPARSE_GRAPHS[make]
    tiled = any(p.matched for report in reports for p in report.passes if p.name == "order_tokens")
    assert tiled == (make is not framepack), "its past frames lie in the sequence"


@pytest.mark.parametrize("make", [mochi, sana_video], ids=lambda make: make.__name__)
def test_others_keep_their_attention(make: Callable[[], Made]) -> None:
    """Mochi picks the tokens that count out of the text, which breaks graphs; SANA-Video's attention is linear."""
    (model, inputs), (exact, _), count = ready(make), ready(make), len(qs.reports())
    qs.attach(model, recipe={**SPARSE, "format": "w8a8"})
    with qs.denoising(model, STEPS) as run:
        for i in range(STEPS):
            run.step(i)
            step = at_step(inputs, i, STEPS)
            assert relative_error(model(**step)[0], exact(**step)[0]) < 0.02
    reports = qs.reports()[count:]
    assert sum(report.calls["sparse"] for report in reports) == 0 < sum(report.linears[0] for report in reports)
