"""block_scores and select_blocks: from q and k to block lists."""

import pytest
import torch

from qs_compiler.ops.library import OpInputError
from tests.ops.attention_cases import BLOCK, random_qkv
from tests.ops.test_sparse_attention import blocks
from tests.tolerances import assert_close

block_scores = torch.ops.quantsparse.block_scores
select_blocks = torch.ops.quantsparse.select_blocks


def naive_scores(q, k, lengths, scale):
    repeat = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], blocks(q.shape[2]), blocks(k.shape[2]), dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(out.shape[2]):
                mean_q = q[b, h, i * BLOCK : (i + 1) * BLOCK].double().mean(0)
                logits = torch.full((out.shape[3],), float("-inf"), dtype=torch.float64)
                for j in range(out.shape[3]):
                    rows = k[b, h // repeat, j * BLOCK : min((j + 1) * BLOCK, lengths[b])].double()
                    if len(rows):
                        logits[j] = scale * mean_q @ rows.mean(0) + torch.tensor(float(len(rows))).log()
                if torch.isfinite(logits).any():
                    out[b, h, i] = torch.softmax(logits, 0)
    return out


@pytest.mark.parametrize("tokens", (1, 63, 65, 129))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_scores_are_the_softmax_of_pooled_blocks(tokens, dtype):
    q, k, _ = random_qkv(2, 4, 2, tokens, tokens + 40, 16, dtype)
    got = block_scores(q, k, None, 0.7, BLOCK)
    assert_close(got, naive_scores(q, k, [tokens + 40] * 2, 0.7))


def test_keys_past_the_length_are_never_read():
    q, k, _ = random_qkv(3, 2, 2, 70, 100, 16, torch.float32)
    lengths = [100, 40, 0]
    wanted = naive_scores(q, k, lengths, 0.7)
    for b, length in enumerate(lengths):
        k[b, :, length:] = float("nan")
    got = block_scores(q, k, torch.tensor(lengths, dtype=torch.int32), 0.7, BLOCK)
    assert_close(got, wanted)
    assert (got[1, :, :, 2:] == 0).all() and (got[2] == 0).all()


def test_uniform_attention_is_predicted_exactly():
    """Equal keys: the mass of a block is its share of the keys, partial last block included."""
    q, k, v = random_qkv(1, 2, 2, 64, 80, 16, torch.float32)
    k = k[:, :, :1].expand_as(k)
    lists = select_blocks(torch.zeros(1, 2, 2, 3), None, 1)
    mass = torch.ops.quantsparse.refresh_attention(
        q, k, v, None, None, None, *lists, None, None, "residual", 0.2, BLOCK, torch.float32
    )[4]
    assert_close(block_scores(q, k, None, 0.2, BLOCK), mass)
    torch.testing.assert_close(mass[0, 0, 0], torch.tensor([32 / 80, 32 / 80, 16 / 80]))


def test_the_best_are_kept_ascending_and_the_rest_follow():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.7])[None, None, None]
    counts, indices = select_blocks(scores, None, 3)
    assert counts.tolist() == [[[3]]] and counts.dtype == indices.dtype == torch.int32
    assert indices.tolist() == [[[[1, 2, 4, 0, 3]]]]  # of the two 0.5 the lower index


@pytest.mark.parametrize("budget", (0, 1, 4, 7))
def test_lists_hold_the_best_and_permute_all(budget):
    scores = torch.rand(2, 3, 5, 7)
    counts, indices = select_blocks(scores, None, budget)
    assert (counts == budget).all()
    assert torch.equal(indices.sort(-1).values, torch.arange(7, dtype=torch.int32).expand(2, 3, 5, 7))
    kept, rest = indices[..., :budget].long(), indices[..., budget:].long()
    assert (kept.diff(dim=-1) > 0).all() and (rest.diff(dim=-1) > 0).all()
    if 0 < budget < 7:
        assert (scores.gather(-1, kept).amin(-1) >= scores.gather(-1, rest).amax(-1)).all()


def test_always_kept_blocks_count_inside_the_budget():
    scores = torch.rand(1, 2, 4, 6)
    always = torch.zeros(4, 6, dtype=torch.bool)
    always[:, 5] = True
    always[2, 0] = True
    counts, indices = select_blocks(scores, always, 2)
    assert (counts == 2).all()
    assert (indices[..., 1] == 5).all()
    assert (indices[:, :, 2, 0] == 0).all()
    with pytest.raises(OpInputError, match="always_keep holds 2 blocks of a row and the budget is 1"):
        select_blocks(scores, always, 1)


def test_heads_may_keep_unlike_numbers():
    scores, always = torch.rand(2, 3, 5, 7), torch.eye(5, 7, dtype=torch.bool)
    budgets = torch.tensor([1, 7, 4], dtype=torch.int32)
    counts, indices = select_blocks(scores, always, 4, budgets)
    assert counts.dtype == torch.int32 and counts.is_contiguous()
    for head, budget in enumerate(budgets.tolist()):
        wanted = select_blocks(scores[:, head : head + 1], always, budget)
        assert torch.equal(counts[:, head : head + 1], wanted[0])
        assert torch.equal(indices[:, head : head + 1], wanted[1])


def test_opcheck():
    q, k, _ = random_qkv(1, 2, 1, 65, 40, 16, torch.bfloat16)
    torch.library.opcheck(block_scores, (q, k, torch.tensor([33], dtype=torch.int32), 0.2, BLOCK))
    torch.library.opcheck(block_scores, (q, k, None, 0.2, BLOCK))
    always = torch.eye(5, 7, dtype=torch.bool)
    torch.library.opcheck(select_blocks, (torch.rand(2, 3, 5, 7), always, 3))
    torch.library.opcheck(
        select_blocks, (torch.rand(2, 3, 5, 7), always, 3, torch.tensor([2, 3, 4], dtype=torch.int32))
    )


def test_bad_input_is_named():
    with pytest.raises(OpInputError, match=r"budget is 8.*0\.\.7"):
        select_blocks(torch.rand(1, 1, 5, 7), None, 8)
    with pytest.raises(OpInputError, match=r"always_keep has shape \(7, 5\)"):
        select_blocks(torch.rand(1, 1, 5, 7), torch.zeros(7, 5, dtype=torch.bool), 3)
    for budgets, words in (
        (torch.ones(2, dtype=torch.int32), r"budgets has shape \(2,\)"),
        (torch.ones(1), "budgets is float32"),
        (torch.full((1,), 8, dtype=torch.int32), r"budgets lie in 8\.\.8.*0\.\.7"),
    ):
        with pytest.raises(OpInputError, match=words):
            select_blocks(torch.rand(1, 1, 5, 7), None, 3, budgets)
    with pytest.raises(OpInputError, match="block_size is -1"):
        block_scores(torch.rand(1, 1, 5, 8), torch.rand(1, 1, 5, 8), None, 1.0, -1)
