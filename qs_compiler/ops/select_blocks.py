"""quantsparse::select_blocks: the `budget` best key blocks of each query block, as block lists.

scores (B, H, nQ, nK) float; always_keep (nQ, nK) bool or None, counted inside the budget. budgets (H,) int32 or None:
how many each head keeps, at least as many as always_keep holds of a row and at most nK, instead of `budget`. Returns
kv_num_blocks (B, H, nQ) int32, the budgets, and kv_indices (B, H, nQ, nK) int32: the kept blocks ascending, then the
rest ascending, so that every entry is a valid index. Deterministic: of equal scores the lower index wins.
"""

from __future__ import annotations

import torch

from .library import FLOAT_DTYPES, OpCost, define_op, itemsize, require, require_dtype, require_shape, symbols

NAME = "select_blocks"
rows, nK, b_s, mask = symbols("rows nK b_s mask")


def check(scores, always_keep, budget, budgets=None):
    require_shape(NAME, "scores", scores, (None, None, None, None))
    require_dtype(NAME, "scores", scores.dtype, FLOAT_DTYPES)
    key_blocks = scores.shape[3]
    require(0 <= budget <= key_blocks, NAME, f"budget is {budget}", f"It must lie in 0..{key_blocks}, the key blocks.")
    if always_keep is not None:
        require_shape(NAME, "always_keep", always_keep, tuple(scores.shape[2:]))
        require_dtype(NAME, "always_keep", always_keep.dtype, (torch.bool,))
    if budgets is not None:
        require_shape(NAME, "budgets", budgets, (scores.shape[1],))
        require_dtype(NAME, "budgets", budgets.dtype, (torch.int32,))


def reference(scores, always_keep, budget, budgets=None):
    scores = scores.float()
    key_blocks = scores.shape[3]
    least = budget
    if budgets is None:
        budgets = torch.full(scores.shape[1:2], budget, dtype=torch.int32, device=scores.device)
    elif budgets.device.type == "cpu" and budgets.numel():
        least, most = int(budgets.min()), int(budgets.max())
        require(
            least >= 0 and most <= key_blocks,
            NAME,
            f"budgets lie in {least}..{most}",
            f"They must lie in 0..{key_blocks}, the key blocks.",
        )
    if always_keep is not None:
        # Reading the values of a mask on the device would stall it, so only masks on the host are checked here.
        most = int(always_keep.sum(-1).max()) if always_keep.numel() and always_keep.device.type == "cpu" else 0
        require(
            most <= least,
            NAME,
            f"always_keep holds {most} blocks of a row and the budget is {least}",
            "Raise the density or keep fewer blocks always.",
        )
        scores = scores.masked_fill(always_keep, float("inf"))
    numbers = budgets.view(1, -1, 1).expand(scores.shape[:3])
    order = scores.argsort(dim=-1, descending=True, stable=True)
    dropped = torch.arange(key_blocks, device=scores.device) >= numbers[..., None]
    dropped = torch.empty_like(dropped).scatter_(-1, order, dropped)
    indices = dropped.to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
    return numbers.contiguous(), indices


def fake(scores, always_keep, budget, budgets=None):
    return scores.new_empty(scores.shape[:3], dtype=torch.int32), scores.new_empty(scores.shape, dtype=torch.int32)


def bind(scores, always_keep, budget, budgets=None):
    key_blocks = scores.shape[3]
    return {
        rows: scores.shape[0] * scores.shape[1] * scores.shape[2],
        nK: key_blocks,
        b_s: itemsize(scores),
        mask: 0 if always_keep is None else always_keep.numel(),
    }


define_op(
    "select_blocks(Tensor scores, Tensor? always_keep, int budget, Tensor? budgets=None) "
    "-> (Tensor kv_num_blocks, Tensor kv_indices)",
    check=check,
    reference=reference,
    fake=fake,
    cost=OpCost(flops=0 * rows, bytes=rows * nK * (b_s + 4) + 4 * rows + mask, bind=bind),
)
