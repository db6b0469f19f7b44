"""diffusers' group offloading: the blocks that are not at work lie elsewhere, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qs_compiler as qs
from tests.backend.diffusers_models import at_step, make

STEPS = 4
GRIDS = {"wan": (9, 8, 8)}  # its patch embedding is moved by itself, and so is in no graph
RECIPE = {"format": "w8a8", "density": 0.25, "block_size": 64, "warmup": 0.25, "interval": 3}


def denoise(name: str, folder: Path | None) -> list[torch.Tensor]:
    torch._dynamo.reset()
    model, inputs = make(name)
    qs.attach(model, recipe=RECIPE, grid=GRIDS.get(name))
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
