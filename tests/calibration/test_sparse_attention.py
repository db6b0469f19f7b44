"""Distillation through the blocks that sparse steps keep."""

import pytest
import torch
from torch.nn import functional as F

import qs_compiler as qs
from qs_compiler.calibration.attention_maps import AttentionTap
from qs_compiler.calibration.sparse_attention import SparseStudent, SparseTargets, attend
from qs_compiler.errors import OptionError
from qs_compiler.options import Recipe

from ..tolerances import assert_close
from .models import make_forwards, make_model
from .test_attention_maps import Live

SIZE, LENGTH, COUNT = 64, 300, 5  # tokens a block, tokens, blocks; the last one is shorter
SPARSE = {"format": "w4a8", "group_size": 32, "density": 0.4, "block_size": SIZE, "correction": "first_order"}
FAST = {"epochs": 10, "lr_transform": 2e-2, "lr_range": 0.2, "lambda_global": 0, "lambda_local": 0}


def qkv(seed: int = 0, length: int = LENGTH):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, length, 8, generator=draw, requires_grad=True) for _ in "qkv"]


def test_kept_blocks_are_attended_as_under_a_mask_gradients_included():
    q, k, v = qkv()
    blocks = torch.rand(1, 2, COUNT, COUNT, generator=torch.Generator().manual_seed(1)).topk(3, dim=-1).indices
    kept = torch.zeros(1, 2, COUNT, COUNT, dtype=torch.bool).scatter_(-1, blocks, True)
    mask = kept.repeat_interleave(SIZE, 2).repeat_interleave(SIZE, 3)[:, :, :LENGTH, :LENGTH]
    ours, theirs = attend(q, k, v, blocks, SIZE, 0.3), F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    assert_close(ours.detach(), theirs.detach())
    seen = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    for a, b in zip(*(torch.autograd.grad((o * seen).sum(), (q, k, v)) for o in (ours, theirs)), strict=True):
        assert_close(a, b)


def test_without_quantisation_the_student_gives_what_dense_attention_does():
    tensors, recipe = qkv(), Recipe.parse(SPARSE)
    with SparseTargets(recipe) as targets:
        dense = F.scaled_dot_product_attention(*tensors)
        F.scaled_dot_product_attention(tensors[0], *(t[:, :, :SIZE] for t in tensors[1:]))  # across: nobody's
    (target,) = targets.found
    assert target.blocks.shape == (1, 2, COUNT, 2) and target.residual.norm() > 0.1 * dense.norm()
    with SparseStudent(targets.found, SIZE), AttentionTap() as tap:
        assert_close(F.scaled_dot_product_attention(*tensors).detach(), dense.detach())
    assert [seen.q is tensors[0] for seen in tap.seen] == [True] and not tap.skipped
    other = qkv(seed=3)
    with SparseStudent(targets.found, SIZE):
        moved = F.scaled_dot_product_attention(*other)
    assert_close((moved - target.residual).detach(), attend(*other, target.blocks, SIZE, 8**-0.5).detach())


def test_no_gathered_copy_of_all_rows_is_held():
    q, k, v = qkv(length=512)
    blocks = torch.arange(16).expand(1, 2, 32, 16)  # half of 32 blocks of 16
    with Live() as live:
        torch.autograd.grad(attend(q, k, v, blocks, 16, 0.3).sum(), (q, k, v))
    assert live.peak < (32 * 16 * 2 * k[:, :, :16].nbytes) / 2, "k and v of all rows"


def test_a_calibration_distils_what_sparse_steps_compute():
    model, data = make_model(blocks=1), make_forwards(1, tokens=LENGTH)
    recipe = {**SPARSE, "budgets": "uniform"}  # of forwards alone no others can be fitted
    options = {"recipe": recipe, "progress": False, "rounding": "nearest", **FAST}
    blocks = [qs.calibrate(model, data, attention=kind, **options).metrics["blocks"] for kind in ("dense", "sparse")]
    dense, sparse = (next(iter(found.values()))["losses"] for found in blocks)
    assert sparse["before"][0] != dense["before"][0]
    assert sparse["after"][0] < 0.9 * sparse["before"][0]
    with pytest.raises(OptionError, match="needs a sparse recipe"):
        qs.calibrate(model, data, attention="sparse", recipe="w4a8", progress=False)
