"""Blocks that diffusers' group offloading moves by a stream beside the computation."""

import pytest
import torch

import qs_compiler as qs
from qs_compiler.packed_linear import PackedLinear
from tests.backend.diffusers_models import at_step, make
from tests.gpu.one_tile import assert_same_bits, one_tile_a_reduction

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS, DEVICE = 4, "cuda"
RECIPE = {"format": "w4a8", "density": 0.25, "block_size": 64, "warmup": 0.25, "interval": 3}


def denoise(model, inputs):
    out = []
    with torch.no_grad(), qs.denoising(model, STEPS) as run:
        for i in range(STEPS):
            run.step(i)
            given = at_step(inputs, i, STEPS)
            out.append(model(**{n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in given.items()})[0])
    return torch.stack(out)


def attached(offloaded):
    torch._dynamo.reset()
    model, inputs = make("hunyuan", layers=3, head_dim=64)
    qs.attach(model.to(DEVICE), recipe=RECIPE, compile="blocks")
    if offloaded:
        model.enable_group_offload(
            onload_device=torch.device(DEVICE), offload_device=torch.device("cpu"), offload_type="block_level",
            num_blocks_per_group=1, use_stream=True,
        )  # fmt: skip
    return model, inputs


def test_blocks_come_and_go_and_no_bit_changes():
    with one_tile_a_reduction():
        want = denoise(*attached(offloaded=False))
        model, inputs = attached(offloaded=True)
        for video in ("the first video, which learns the order of the blocks", "the second, with blocks fetched ahead"):
            assert_same_bits(denoise(model, inputs), want, video)
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    packed = [m for block in blocks for m in block.modules() if isinstance(m, PackedLinear)]
    devices = [m.wq.device.type for m in packed]
    assert len(packed) > 40 and devices.count("cuda") < len(devices) / 2, f"most lie in host memory again: {devices}"
    assert all(m.bias is None or m.bias.device == m.wq.device for m in packed)
