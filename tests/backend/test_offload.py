"""diffusers' group offloading: the blocks that are not at work lie elsewhere, and nothing else changes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn

import qs_compiler as qs
from qs_compiler.packed_linear import PackedLinear
from qs_compiler.pipeline import replace_linears
from tests.backend.diffusers_models import at_step, make

STEPS = 4
RECIPE = {"format": "w8a8", "density": 0.25, "block_size": 64, "warmup": 0.25, "interval": 3}


def denoise(name: str, folder: Path | None) -> list[torch.Tensor]:
    torch._dynamo.reset()
    model, inputs = make(name)
    qs.attach(model, recipe=RECIPE)
    if folder is not None:
        # On a disk, so that a machine without a GPU moves tensors too: each block's are swapped before and after it.
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="block_level",
            num_blocks_per_group=1, offload_to_disk_path=str(folder),
        )  # fmt: skip
    with torch.no_grad(), qs.denoising(model, STEPS) as run:
        out = []
        for i in range(STEPS):
            run.step(i)
            out.append(model(**at_step(inputs, i, STEPS))[0])
    return out


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_offloaded_blocks_run_sparse_and_change_no_bit(name: str, tmp_path: Path) -> None:
    """HunyuanVideo's get their padding mask as an argument."""
    want, count = denoise(name, None), len(qs.reports())
    got = denoise(name, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(list(tmp_path.glob("group_*.safetensors"))) >= 2, "each block's packed tensors were moved away"
    calls = [report.calls for report in qs.reports()[count:]]
    assert {"dense": 2, "refresh": 2, "sparse": 4} in calls, "two blocks through one graph of their own"


def test_streams_take_packed_tensors_back_and_no_other_buffer() -> None:
    """A group of a stream, without one: what is brought to the device is a copy in any case."""
    block = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    replace_linears(block, {"0": qs.Recipe.parse("w4a8")})
    packed = block[0]
    assert isinstance(packed, PackedLinear)
    cpu = torch.device("cpu")
    group = ModuleGroup([block], cpu, cpu, block, stream=object(), record_stream=True, low_cpu_mem_usage=True)
    kept = {name: group.cpu_param_dict[tensor] for name, tensor in packed.named_buffers()}
    assert {"wq", "ws", "multipliers"} <= kept.keys()
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data = tensor.data.clone()
    block[1].running_mean.fill_(7)
    group._offload_to_memory()
    assert all(tensor.data_ptr() == kept[name].data_ptr() for name, tensor in packed.named_buffers() if tensor.numel())
    assert packed.bias.data_ptr() == group.cpu_param_dict[packed.bias].data_ptr()
    assert block[1].running_mean.eq(7).all(), "a forward wrote it"


@pytest.mark.usefixtures("eager_graphs")
def test_blocks_compiled_apart_keep_no_inputs() -> None:
    """A graph lives as long as its model, and the tokens of a block at 720p take 0.7 GiB."""
    model, inputs = make("hunyuan")
    qs.attach(model, recipe=RECIPE, compile="blocks")
    tokens = inputs["hidden_states"].shape[2:].numel()  # patches are single latents

    def of_all_tokens() -> dict[int, tuple[int, ...]]:
        found = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dim() == 3 and o.shape[1] >= tokens]
        return {id(o): tuple(o.shape) for o in found}

    gc.collect()
    gc.disable()
    try:
        before = of_all_tokens()
        with torch.no_grad(), qs.denoising(model, STEPS) as run:
            for i in range(STEPS):
                run.step(i)
                model(**at_step(inputs, i, STEPS))
        assert not [shape for number, shape in of_all_tokens().items() if number not in before]
    finally:
        gc.enable()
