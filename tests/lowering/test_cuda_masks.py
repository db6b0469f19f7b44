"""The CUDA lowerings of quantsparse::block_scores and quantsparse::select_blocks, without a GPU."""

import pytest
import torch

from qs_compiler.lowering import collect_fallbacks
from tests.fake_h100 import SHARED_MEMORY, cuda_code
from tests.kernel_text import compile_offline, kernel_sources
from tests.lowering.compiled import library_calls
from tests.lowering.interpret import interpret
from tests.ops.attention_cases import BLOCK, random_qkv
from tests.tolerances import assert_close

quantsparse = torch.ops.quantsparse
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")


def score(q, k, kv_len, block=BLOCK):
    """A function of tensors only, and its arguments."""

    def function(*given):
        q, k, length = given if len(given) == 3 else (*given, None)
        return (quantsparse.block_scores(q, k, length, 0.7, block),)

    return function, [t for t in (q, k, kv_len) if t is not None]


def select(scores, always, budget, budgets=None):
    def function(*given):
        given = list(given)
        scores, always = given.pop(0), None if no_mask else given.pop(0)
        return quantsparse.select_blocks(scores, always, budget, *given)

    no_mask = always is None
    return function, [t for t in (scores, always, budgets) if t is not None]


def generated(cases):
    """[(function, args)] -> generated code of each, which calls no library and no reference."""
    texts = []
    for function, args in cases:
        with collect_fallbacks() as fallbacks:
            texts.append(cuda_code(function, *args))
        assert fallbacks == [] and library_calls(texts[-1]) == []
    return texts


def check_scores(cases, folder):
    results = interpret([(t, args) for t, (_, args) in zip(generated(cases), cases, strict=True)], folder)
    for (function, args), [got] in zip(cases, results, strict=True):
        assert got.dtype == torch.float32
        assert_close(got, function(*args)[0])


def check_lists(cases, folder):
    """Bit for bit what the reference selects."""
    results = interpret([(t, args) for t, (_, args) in zip(generated(cases), cases, strict=True)], folder)
    for (function, args), got in zip(cases, results, strict=True):
        for result, wanted in zip(got, function(*args), strict=True):
            assert result.dtype == wanted.dtype == torch.int32 and torch.equal(result, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
def test_scores_of_odd_sizes_and_grouped_heads(dtype, tmp_path):
    cases = []
    for i, tokens in enumerate((1, 65, 129)):
        q, k, _ = random_qkv(2, 4, (1, 2, 4)[i], tokens, tokens + 40, (16, 80, 24)[i], dtype)
        cases.append(score(q, k, None))
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(1, 2, 2, 96, 96, 16, dtype)[:2])
    check_scores([*cases, score(*strided, None)], tmp_path)


def test_keys_past_the_length_are_never_read(tmp_path):
    q, k, _ = random_qkv(3, 2, 2, 70, 100, 16, torch.float32)
    lengths = [100, 40, 0]
    for b, length in enumerate(lengths):
        k[b, :, length:] = NAN
    lengths[0] = 1000  # beyond the keys there are
    check_scores([score(q, k, torch.tensor(lengths, dtype=d)) for d in (torch.int32, torch.int64)], tmp_path)


def test_scores_of_symbolic_sizes(tmp_path):
    def args(tokens):
        return random_qkv(1, 4, 2, tokens, tokens, 16, torch.float32)[:2]

    function, first = score(*args(120), None)
    text = cuda_code(function, *first, dynamic=(120,))
    given = [args(n) for n in (120, 65, 300)]
    for (q, k), [got] in zip(given, interpret([(text, a) for a in given], tmp_path), strict=True):
        assert_close(got, function(q, k)[0])


def test_the_product_of_the_means_is_no_tf32():
    [text] = generated([score(*random_qkv(1, 2, 2, 300, 300, 64, torch.bfloat16)[:2], None)])
    [product] = [source for name, source in kernel_sources(text).items() if "_tem_" in name]
    assert 'input_precision="ieee"' in product and text.count(".run(") <= 5


def test_each_input_is_reduced_by_one_kernel_and_no_copy_is_made():
    [text] = generated([score(*random_qkv(1, 2, 2, 4100, 4100, 128, torch.bfloat16)[:2], None, 128)])
    names = list(kernel_sources(text))
    kinds = [name.split("_")[1] for name in names]
    assert kinds[-2:] == ["tem", "per"] and set(kinds[:-2]) <= {"per", "red"} and len(kinds) <= 4, names
    assert "4100" not in "".join(line for line in text.splitlines() if "= empty_strided_cuda" in line)


def special_scores():
    """Rows with ties, both zeros, infinities, NaN."""
    rows = [
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
        [0.0, -0.0, 0.0, -1.0, -0.0, 1.0, 0.0],
        [-INF, -INF, 0.25, -INF, INF, INF, -INF],
        [NAN, 0.5, -NAN, INF, -INF, 0.5, NAN],
        [-1e-45, 1e-45, 0.0, -1e-45, -1e-38, 1e-38, 3e38],
    ]
    return torch.tensor(rows)[None, None].expand(1, 2, 5, 7).contiguous()


def test_special_scores_and_budgets(tmp_path):
    always = torch.zeros(5, 7, dtype=torch.bool)
    always[:, 6], always[2, 0], always[3, 0] = True, True, True
    cases = [select(special_scores(), None, budget) for budget in (0, 1, 3, 4, 6, 7)]
    check_lists([*cases, *(select(special_scores(), always, budget) for budget in (2, 7))], tmp_path)


def test_heads_of_unlike_budgets(tmp_path):
    always = torch.eye(5, 7, dtype=torch.bool)
    budgets = torch.tensor([7, 1, 4], dtype=torch.int32)
    scores = torch.rand(2, 3, 5, 7).mul(4).round()
    strided = torch.stack([budgets, budgets + 100], 1)[:, 0]
    cases = [select(scores, always, 4, budgets), select(scores, None, 4, strided)]
    check_lists([*cases, select(special_scores(), None, 3, torch.tensor([0, 6], dtype=torch.int32))], tmp_path)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_every_width(dtype, tmp_path):
    cases = []
    for blocks in (1, 2, 31, 128, 930, 3000) if dtype == torch.float32 else (2, 128, 930):
        rows = 2 if blocks > 100 else 5
        scores = torch.rand(1, 2, rows, blocks).mul(blocks // 2 + 1).round().div(blocks).to(dtype)  # many ties
        always = torch.eye(rows, blocks, dtype=torch.bool)
        budget = max(1, blocks // 4)
        cases += [select(scores, None, budget), select(scores, always, budget)]
    strided = torch.rand(1, 5, 40, 2).to(dtype).permute(0, 3, 1, 2)
    check_lists([*cases, select(strided, None, 9)], tmp_path)


def test_scores_and_lists_follow_each_other(tmp_path):
    """As a refresh chooses its mask: pooled scores, the diagonal kept, nothing left to a library."""

    def function(q, k):
        scores = quantsparse.block_scores(q, k, None, 0.2, BLOCK)
        always = torch.eye(scores.shape[2], scores.shape[3], dtype=torch.bool, device=q.device)
        return quantsparse.select_blocks(scores, always, 2)

    check_lists([(function, list(random_qkv(1, 2, 2, 200, 200, 16, torch.float32)[:2]))], tmp_path)


def test_a_row_that_fits_no_kernel_is_reported():
    with torch.device("meta"):
        function, args = select(torch.empty(1, 1, 2, 40000), None, 10)
    with collect_fallbacks() as fallbacks:
        text = cuda_code(function, *args)
    [(op, reason)] = fallbacks
    assert op == "select_blocks" and "40000 key blocks are above 32768" in reason
    assert library_calls(text) == ["torch.ops.quantsparse.select_blocks.default"]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_templates_compile_and_fit(capability, tmp_path):
    with torch.device("meta"):
        q = torch.empty(1, 24, 9300, 128, dtype=torch.bfloat16)
        cases = [score(q, q, None, 128)]
        cases += [
            select(torch.empty(1, 24, 64, n), torch.empty(64, n, dtype=torch.bool), n // 4) for n in (7, 930, 8192)
        ]
        scores, by_head = torch.empty(1, 24, 64, 930), torch.empty(24, dtype=torch.int32)
        cases.append(select(scores, torch.empty(64, 930, dtype=torch.bool), 232, by_head))
    for function, args in cases:
        sources = kernel_sources(cuda_code(function, *args, capability=capability))
        [source] = [s for name, s in sources.items() if "_tem_" in name]
        compiled = compile_offline(source, tmp_path, capability)
        assert compiled.shared_memory <= SHARED_MEMORY[capability] and compiled.spilled_bytes == 0
