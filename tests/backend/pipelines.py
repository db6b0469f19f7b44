"""Tiny diffusers pipelines that run offline: random weights, tokenizers made from short vocabularies."""

from __future__ import annotations

import string
from typing import Any

import diffusers as D
import torch
import transformers as T

from tests.backend.diffusers_models import make


def flow_match(**options: Any) -> D.FlowMatchEulerDiscreteScheduler:
    return D.FlowMatchEulerDiscreteScheduler(**options)


def t5() -> dict[str, Any]:
    """A tokenizer over letters and a two-layer encoder."""
    torch.manual_seed(0)
    letters = string.ascii_lowercase + string.digits + ".,"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in letters)]
    config = T.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    tokenizer = T.T5Tokenizer(vocab=vocab, extra_ids=0, additional_special_tokens=None, model_max_length=16)
    return {"tokenizer": tokenizer, "text_encoder": T.T5EncoderModel(config).eval()}


def wan(dual: bool = False) -> D.WanPipeline:
    """Sequential guidance; cache contexts with a step index. `dual`: Wan 2.2's two experts."""
    text = t5()
    vae = D.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    second = {"transformer_2": make("wan")[0], "boundary_ratio": 0.875} if dual else {"transformer_2": None}
    if dual:
        torch.manual_seed(1)
        for parameter in second["transformer_2"].parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return D.WanPipeline(**text, vae=vae, scheduler=flow_match(shift=7.0), transformer=make("wan")[0], **second)


def cogvideox() -> D.CogVideoXPipeline:
    """Batched guidance; cache contexts with a name only; a scheduler of integers."""
    text = t5()
    vae = D.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8,) * 4, latent_channels=4,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    ).eval()  # fmt: skip
    return D.CogVideoXPipeline(**text, vae=vae, transformer=make("cogvideox")[0], scheduler=D.DDIMScheduler())


def ltx() -> D.LTXPipeline:
    """Batched guidance; packed latents; a mask on the text."""
    text = t5()
    vae = D.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    ).eval()  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return D.LTXPipeline(**text, vae=vae, transformer=make("ltx")[0], scheduler=flow_match())


def hunyuan() -> D.HunyuanVideoPipeline:
    """Embedded guidance: one call a step; a padding mask."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {word: i for i, word in enumerate([*special, "a", "dance", "monkey"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = T.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        model_max_length=77,
    )  # fmt: skip
    letters = string.ascii_lowercase
    pieces = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    clip = T.CLIPTokenizer(vocab={c: i for i, c in enumerate(pieces)}, merges=[], model_max_length=77)
    common = {"intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
    llama = T.LlamaConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_size=16, hidden_act="gelu", **common
    )
    clip_text = T.CLIPTextConfig(
        bos_token_id=52, eos_token_id=53, pad_token_id=53, hidden_size=8, projection_dim=32, hidden_act="gelu",
        **common,
    )  # fmt: skip
    vae = D.AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1,
        act_fn="silu", norm_num_groups=4, scaling_factor=0.476986, spatial_compression_ratio=8,
        temporal_compression_ratio=4, mid_block_add_attention=True,
    ).eval()  # fmt: skip
    return D.HunyuanVideoPipeline(
        text_encoder=T.LlamaModel(llama).eval(), tokenizer=tokenizer, transformer=make("hunyuan")[0], vae=vae,
        scheduler=flow_match(shift=7.0), text_encoder_2=T.CLIPTextModel(clip_text).eval(), tokenizer_2=clip,
    )  # fmt: skip


def hunyuan15() -> D.HunyuanVideo15Pipeline:
    """Sequential guidance by a guider; texts and their masks are given, each branch with padding of its own."""
    torch.manual_seed(0)
    vae = D.AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1).eval()
    return D.HunyuanVideo15Pipeline(
        text_encoder=None, tokenizer=None, transformer=make("hunyuan 1.5")[0], vae=vae,
        scheduler=flow_match(shift=7.0), text_encoder_2=None, tokenizer_2=None,
        guider=D.ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip


def texts15() -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and a negative one by both encoders, with masks of unlike lengths."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, kept in {"prompt": (9, 4), "negative_prompt": (5, 0)}.items():
        for end, keep, tokens, width in zip(("", "_2"), kept, (12, 6), (16, 12), strict=True):
            found[f"{name}_embeds{end}"] = torch.randn(1, tokens, width, generator=generator)
            found[f"{name}_embeds_mask{end}"] = (torch.arange(tokens) < keep)[None].long()
    return found


PIPELINES = {
    "wan": wan,
    "wan 2.2": lambda: wan(dual=True),
    "cogvideox": cogvideox,
    "ltx": ltx,
    "hunyuan": hunyuan,
    "hunyuan 1.5": hunyuan15,
}
_SIZE = {"height": 128, "width": 128, "num_frames": 33}
_TEXT = {"prompt": "dance monkey", "max_sequence_length": 16, "output_type": "latent"}
_WAN = {**_TEXT, **_SIZE, "negative_prompt": "negative", "guidance_scale": 6.0}
CALLS: dict[str, dict[str, Any]] = {
    "wan": _WAN,
    "wan 2.2": _WAN,
    "cogvideox": {**_TEXT, **_SIZE, "negative_prompt": "", "guidance_scale": 6.0},
    "ltx": {
        **_TEXT, "height": 32, "width": 32, "num_frames": 17, "negative_prompt": "", "guidance_scale": 3.0,
    },
    "hunyuan": {
        **_TEXT, **_SIZE, "guidance_scale": 4.5, "prompt_template": {"template": "{}", "crop_start": 0},
    },
    "hunyuan 1.5": {**texts15(), "height": 128, "width": 128, "num_frames": 17, "output_type": "latent"},
}  # fmt: skip


def run(name: str, pipe: Any, steps: int = 8, seed: int = 0, **more: Any) -> torch.Tensor:
    """Final latents of one video."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(**{**CALLS[name], **more}, num_inference_steps=steps, generator=generator).frames
