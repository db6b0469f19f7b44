"""The CUDA lowering of quantsparse::refresh_attention, without a GPU."""

import pytest
import torch

from qs_compiler.lowering import attention_tiles, collect_fallbacks, refresh_attention
from qs_compiler.ops.refresh_attention import CORRECTIONS
from qs_compiler.passes.choose_blocks import _by_mass, _stored_mass, _unless_first
from tests.fake_h100 import DEVICE_SHARED_MEMORY, cuda_code
from tests.kernel_text import compile_offline, kernel_sources
from tests.lowering.compiled import library_calls
from tests.lowering.interpret import interpret
from tests.ops.attention_cases import BLOCK, block_lists, random_qkv
from tests.tolerances import FP8_WEIGHTS_ERROR, RELATIVE_ERROR, assert_close

quantsparse = torch.ops.quantsparse
bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NO_SCALES = (None, None, None)


def refresh(
    q, k, v, lists, correction, *, scales=NO_SCALES, kv_len=None, lse_prev=None, dtype=None, block=BLOCK, outputs=5
):
    """A function of tensors only that returns the first outputs, and its arguments."""
    tensors = (q, k, v, *scales, *lists, kv_len, lse_prev)

    def function(*given):
        rest = iter(given)
        args = [None if t is None else next(rest) for t in tensors]
        return quantsparse.refresh_attention(*args, correction, 0.2, block, dtype or q.dtype)[:outputs]

    return function, [t for t in tensors if t is not None]


def complete_lists(batch, heads, tokens, keys, block=BLOCK, **options):
    return block_lists(batch, heads, -(-tokens // block), -(-keys // block), complete=True, **options)


def check(cases, folder, tolerance=None):
    """Interpret the generated code of [(function, args)] and compare with the references.

    tolerance: one for all cases, or a list.
    """
    texts = []
    for function, args in cases:
        with collect_fallbacks() as fallbacks:
            texts.append(cuda_code(function, *args))
        assert fallbacks == [] and library_calls(texts[-1]) == []
    results = interpret([(text, args) for text, (_, args) in zip(texts, cases, strict=True)], folder)
    tolerances = tolerance if isinstance(tolerance, list) else [tolerance] * len(cases)
    for (function, args), got, limit in zip(cases, results, tolerances, strict=True):
        compare(got, function(*args), limit)
    return texts


def compare(got, wanted, tolerance=None):
    """o, lse, correction and its lse, block mass if there is one. A correction is measured against the output."""
    for result, expected in zip(got, wanted, strict=True):
        assert result.dtype == expected.dtype and result.shape == expected.shape
    limit = tolerance or RELATIVE_ERROR[got[0].dtype]
    assert_close(got[0], wanted[0], limit)
    # What the correction differs by must not matter beside the output that it is added to.
    assert (got[2].double() - wanted[2].double()).norm() <= 2 * limit * wanted[0].double().norm()
    for result, expected in zip([got[1], *got[3:]], [wanted[1], *wanted[3:]], strict=True):
        assert_close(result, expected, max(1e-5, tolerance or 0))


@pytest.mark.parametrize("dtype", FLOATS)
def test_odd_sizes_head_widths_and_grouped_heads(dtype, tmp_path):
    cases = []
    for i, tokens in enumerate((1, 65, 127)):
        depth, keys = (16, 80, 24)[i], tokens + 17
        qkv = random_qkv(2, 4, (1, 2, 4)[i], tokens, keys, depth, dtype)
        cases.append(refresh(*qkv, complete_lists(2, 4, tokens, keys), CORRECTIONS[i % 2]))
    # The kernel rounds the softmax weights to 16 bits before they meet the values.
    check(cases, tmp_path, 2 * RELATIVE_ERROR[dtype])


def test_whole_blocks_only_and_lists_that_keep_nothing_or_all(tmp_path):
    qkv = random_qkv(1, 2, 1, 64, 96, 16, torch.float32)
    counts, indices = complete_lists(1, 2, 64, 96)
    counts[0, 0], indices[0, 0] = torch.tensor([0, 3], dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    check([refresh(*qkv, (counts, indices), correction) for correction in CORRECTIONS], tmp_path)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("code", (torch.int8, fp8))
def test_tiles_of_one_query_block_share_its_mass(code, correction, tmp_path):
    """Blocks of 128 in tiles of 64 queries; the last block has rows in one tile only."""
    q, k, v = random_qkv(1, 2, 1, 129 + 128, 150, 32, torch.float32)
    codes = [x.mul(40).clamp(-120, 120).to(code) for x in (q, k)]
    packed, v_scale = quantsparse.pack_values(v)
    scales = torch.rand(1, 2, 257) * 0.02 + 1e-3, torch.rand(1, 1, 150) * 0.02 + 1e-3, v_scale
    lists = complete_lists(1, 2, 257, 150, 128)
    case = refresh(*codes, packed, lists, correction, scales=scales, dtype=bf16, block=128)
    [text] = check([case], tmp_path, FP8_WEIGHTS_ERROR)
    assert "BLOCK_M : tl.constexpr = 64" in text and "BLOCK : tl.constexpr = 128" in text


def test_lists_broadcast_and_int16(tmp_path):
    qkv = random_qkv(2, 4, 2, 100, 80, 16, torch.float32)
    cases = [
        refresh(*qkv, complete_lists(batch, heads, 100, 80, dtype=dtype), correction)
        for batch, heads, dtype, correction in (
            (1, 1, torch.int32, "residual"),
            (1, 4, torch.int16, "complement"),
            (2, 1, torch.int32, "complement"),
        )
    ]
    check(cases, tmp_path)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_lengths_and_rows_without_keys(correction, tmp_path):
    """NaN lies wherever nothing may be read: past kv_len, in the video whose length is 0."""
    q, k, v = random_qkv(3, 2, 2, 70, 129, 16, torch.float32)
    kv_len = torch.tensor([129, 40, 0], dtype=torch.int32)
    for b, length in enumerate(kv_len):
        k[b, :, length:], v[b, :, length:] = float("nan"), float("nan")
    check([refresh(q, k, v, complete_lists(3, 2, 70, 129), correction, kv_len=kv_len)], tmp_path)


@pytest.mark.parametrize("code", (torch.int8, fp8))
def test_codes_with_scales_per_token_and_per_block(code, tmp_path):
    q, k, v = (x.mul(40).clamp(-120, 120).to(code) for x in random_qkv(1, 2, 1, 70, 96, 32, torch.float32))
    per_token = torch.rand(1, 2, 70) * 0.02, torch.rand(1, 1, 96) * 0.02, torch.rand(1, 1, 32)
    per_block = per_token[0][..., :3].contiguous(), per_token[1][..., :3].contiguous(), per_token[2]
    lists = complete_lists(1, 2, 70, 96)
    values = random_qkv(1, 2, 1, 70, 96, 32, bf16)[2]
    cases = [
        refresh(q, k, v, lists, "residual", scales=per_token, dtype=bf16),
        refresh(q, k, v, lists, "complement", scales=per_block, dtype=bf16),
        refresh(q, k, values, lists, "residual", scales=(*per_block[:2], None), dtype=bf16),
    ]
    check(cases, tmp_path, 2 * RELATIVE_ERROR[bf16])


def test_a_graph_without_block_mass_does_not_compute_it():
    for outputs in (4, 5):
        lists = complete_lists(1, 2, 96, 96)
        function, args = refresh(*random_qkv(1, 2, 2, 96, 96, 16, bf16), lists, "residual", outputs=outputs)
        [source] = kernel_sources(cuda_code(function, *args)).values()
        assert ("store_block_mass" in source) == (outputs == 5)


@pytest.fixture
def two_launches(monkeypatch):
    monkeypatch.setattr(refresh_attention, "LAUNCHES", 2)


@pytest.mark.parametrize(("dtype", "launches"), ((torch.int8, 2), (fp8, 2), (bf16, 1)))
def test_the_form_that_measured_faster_is_the_default(dtype, launches):
    function, args = large_case(128, dtype, "residual", 4)
    text = cuda_code(function, *args)
    assert sum("_tem_" in name for name in kernel_sources(text)) == launches


def test_two_launches_give_what_one_gives(two_launches, tmp_path):
    """Grouped heads of odd sizes with poisoned padding; whole blocks, lists that keep nothing or all; 8 bits."""
    q, k, v = random_qkv(2, 4, 2, 35, 65, 24, torch.float32)
    kv_len = torch.tensor([40, 0], dtype=torch.int32)
    for b, length in enumerate(kv_len):
        k[b, :, length:], v[b, :, length:] = float("nan"), float("nan")
    whole = random_qkv(1, 2, 1, 64, 96, 16, torch.float32)
    counts, indices = complete_lists(1, 2, 64, 96)
    counts[0, 0], indices[0, 0] = torch.tensor([0, 3], dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    cases = [
        refresh(q, k, v, complete_lists(1, 4, 35, 65, dtype=torch.int16), "residual", kv_len=kv_len, outputs=4),
        refresh(*whole, (counts, indices), "complement", outputs=4),
    ]
    q, k, v = random_qkv(1, 2, 1, 140, 150, 32, torch.float32)
    packed, v_scale = quantsparse.pack_values(v)
    scales = torch.rand(1, 2, 140) * 0.02 + 1e-3, torch.rand(1, 1, 2) * 0.02 + 1e-3, v_scale
    lists = complete_lists(1, 2, 140, 150, 128)
    for code in (torch.int8, fp8):
        codes = [x.mul(40).clamp(-120, 120).to(code) for x in (q, k)]
        cases.append(refresh(*codes, packed, lists, "residual", scales=scales, dtype=bf16, block=128, outputs=4))
    texts = check(cases, tmp_path, [None, None, FP8_WEIGHTS_ERROR, FP8_WEIGHTS_ERROR])
    assert all(list(kernel_sources(text)) == ["triton_tem_fused_0", "triton_tem_fused_1"] for text in texts)


def test_two_launches_estimate_block_mass_by_previous_log_sum_exps(two_launches, tmp_path):
    """Rows without an earlier step among them: all of a block, all of a head as in the first refresh of a video."""
    q, k, v = random_qkv(1, 2, 2, 40, 80, 16, torch.float32)
    lists, kv_len = complete_lists(1, 2, 40, 80), torch.tensor([70], dtype=torch.int32)
    function, args = refresh(q, k, v, lists, "residual", kv_len=kv_len)
    _, lse, _, _, exact = function(*args)
    moved = lse + torch.randn(lse.shape, generator=torch.Generator().manual_seed(1))
    moved[0, 0, :2], moved[0, 0, 32:] = torch.tensor([float("nan"), float("-inf")]), float("-inf")
    moved[0, 1] = float("-inf")
    earlier = zip((lse, moved, lse - 1e30, lse + 300), (*CORRECTIONS, *CORRECTIONS), strict=True)
    cases = [refresh(q, k, v, lists, correction, kv_len=kv_len, lse_prev=prev) for prev, correction in earlier]
    texts = [cuda_code(function, *args) for function, args in cases]
    results = interpret([(text, args) for text, (_, args) in zip(texts, cases, strict=True)], tmp_path)
    for (function, args), got in zip(cases[:2], results, strict=False):
        compare(got, function(*args))
    assert_close(results[0][4], exact)  # by the log-sum-exps of the step itself
    assert (results[1][4] - exact).abs().max() > 1e-2
    sums = results[1][4].sum(-1)
    assert_close(sums, torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))
    assert all(torch.isfinite(got[4]).all() for got in results)
    assert (results[3][4] == 0).all(), "nothing is left of rows that lost 300"


@pytest.mark.parametrize("dtype", (torch.float32, bf16))
def test_a_refresh_ranks_by_mass_and_leaves_the_next_one(dtype, tmp_path):
    """What the pass writes for `mask="mass"`: the first refresh of a video and another, no kernel of exact mass."""

    def function(q, k, v, first, lse_prev, mass):
        scores = _by_mass(first, quantsparse.block_scores(q, k, None, 0.2, BLOCK), mass)
        kept = quantsparse.select_blocks(scores, None, 2)
        before = _unless_first(first, lse_prev)
        o, lse, _, _, mass = quantsparse.refresh_attention(
            q, k, v, None, None, None, *kept, None, before, "residual", 0.2, BLOCK, q.dtype
        )
        return o, lse, _stored_mass(mass), kept[1].clone()

    q, k, v = random_qkv(1, 2, 2, 128, 128, 16, dtype)
    lse_prev, mass = torch.randn(1, 2, 128) + 4, torch.rand(1, 2, 4, 4).bfloat16()
    mass[0, 0, 1], mass[0, 1, 2, 3] = 0, float("nan")
    both = [(q, k, v, torch.tensor(first), lse_prev, mass) for first in (True, False)]
    text = cuda_code(function, *both[0])
    assert "store_block_mass" not in text and library_calls(text) == []
    first, later = interpret([(text, args) for args in both], tmp_path)
    for args, got in zip(both, (first, later), strict=True):
        wanted = function(*args)
        assert torch.equal(got[3], wanted[3])
        for result, expected in zip(got[:3], wanted, strict=False):
            assert_close(result, expected, 2 * RELATIVE_ERROR[result.dtype])
    assert (first[2] == 0).all() and (later[2].float().sum(-1) > 0.9).all()
    assert not torch.equal(first[3], later[3])


@pytest.mark.parametrize("code", (torch.int8, fp8))
def test_two_launches_leave_three_programs_to_a_multiprocessor(code, two_launches, tmp_path):
    """65,536 registers hold 3 programs of 128 threads at up to 168 each; without spills, mass and residual included."""
    function, args = large_case(128, code, "residual", 5, lse_prev=True)
    sources = kernel_sources(cuda_code(function, *args))
    templates = [text for name, text in sources.items() if "_tem_" in name]
    assert len(templates) == 2 and "store_block_mass" not in "".join(templates)
    for source in templates:
        compiled = compile_offline(source, tmp_path, (9, 0))
        assert compiled.registers <= 168 and compiled.spilled_bytes == 0
        assert 3 * (compiled.shared_memory + 1024) <= 228 * 1024


def refresh_step(q, k, v, counts, indices, added):
    o, lse, correction, _, _ = quantsparse.refresh_attention(
        q, k, v, None, None, None, counts, indices, None, None, "residual", 0.2, BLOCK, q.dtype
    )
    return (o + added).transpose(1, 2).flatten(2), lse, correction


def test_what_follows_the_output_joins_the_kernel(tmp_path):
    """Strided heads in, rows of all heads out with something added: one kernel."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(1, 2, 2, 65, 96, 16, bf16))
    args = q, k, v, *complete_lists(1, 2, 65, 96), torch.randn(1, 2, 65, 16).to(bf16)
    text = cuda_code(refresh_step, *args)
    assert len(kernel_sources(text)) == 1
    [got] = interpret([(text, args)], tmp_path)
    for result, wanted in zip(got, refresh_step(*args), strict=True):
        assert_close(result, wanted, 2 * RELATIVE_ERROR[bf16])


def test_tokens_may_be_symbolic(tmp_path):
    def function(q, k, v, counts, indices):
        return quantsparse.refresh_attention(
            q, k, v, None, None, None, counts, indices, None, None, "complement", 0.2, BLOCK, q.dtype
        )

    def args(tokens):
        return *random_qkv(1, 2, 2, tokens, 96, 16, torch.float32), *complete_lists(1, 2, tokens, 96)

    text = cuda_code(function, *args(120), dynamic=(120, 4))
    results = interpret([(text, args(120)), (text, args(65))], tmp_path)
    for given, got in zip((args(120), args(65)), results, strict=True):
        compare(got, function(*given))


def large_case(depth, dtype, correction, outputs, lse_prev=False):
    """Shapes of real use, on the meta device. int8 and float8 stand for q and k; v is then packed float8."""
    with torch.device("meta"):
        q = k = torch.empty(1, 4, 4096, depth, dtype=dtype)
        v, scales = q, NO_SCALES
        if dtype.itemsize == 1:
            v = torch.empty(1, 4, depth, 4096, dtype=torch.uint8)
            scales = torch.empty(1, 4, 4096), torch.empty(1, 4, 32), torch.empty(1, 4, depth)
        lists = torch.empty(1, 4, 32, dtype=torch.int32), torch.empty(1, 4, 32, 32, dtype=torch.int32)
        options = {"dtype": bf16 if dtype.itemsize == 1 else dtype, "block": 128, "outputs": outputs}
        options["lse_prev"] = torch.empty(1, 4, 4096) if lse_prev else None
        return refresh(q, k, v, lists, correction, scales=scales, **options)


@pytest.mark.parametrize(
    ("dtype", "depth", "outputs"),
    ((bf16, 64, 4), (bf16, 128, 5), (bf16, 256, 4), (torch.int8, 128, 5), (fp8, 128, 5), (torch.float32, 64, 4)),
)
@pytest.mark.parametrize("capability", DEVICE_SHARED_MEMORY)
def test_every_tile_compiles_and_fits(dtype, depth, outputs, capability, tmp_path):
    if dtype.itemsize == 1 and capability < (8, 9):
        dtype = bf16  # no float8 there
    function, args = large_case(depth, dtype, "residual", outputs)
    with collect_fallbacks() as fallbacks:
        sources = kernel_sources(cuda_code(function, *args, capability=capability))
    assert fallbacks == []
    # The mass of a block that several tiles share is summed up in a kernel of its own.
    source, *_ = [text for name, text in sources.items() if "_tem_" in name]
    compiled = compile_offline(source, tmp_path, capability)
    assert compiled.shared_memory <= DEVICE_SHARED_MEMORY[capability]
    if dtype != torch.float32:
        assert {(9, 0): "wgmma", (10, 0): "tcgen05.mma"}.get(capability, "mma.sync") in compiled.ptx


def test_emitted_as_cpp_it_uses_no_descriptors(monkeypatch):
    """Some versions allocate the descriptors' memory for a single program there."""
    function, args = large_case(128, bf16, "complement", 4)
    assert "TMA : tl.constexpr = True" in cuda_code(function, *args)
    monkeypatch.setattr(attention_tiles, "cpp_wrapper_active", lambda: True)
    assert "TMA : tl.constexpr = False" in cuda_code(function, *args)


@pytest.mark.parametrize(
    ("block", "depth", "reason"),
    ((24, 32, "block_size 24 is not a multiple of 16"), (32, 320, "head width 320 is above 256")),
)
def test_what_the_template_cannot_do_is_reported(block, depth, reason):
    with torch.device("meta"):
        q = torch.empty(1, 2, 96, depth, dtype=bf16)
        n = 96 // block
        lists = torch.empty(1, 2, n, dtype=torch.int32), torch.empty(1, 2, n, n, dtype=torch.int32)
    function, args = refresh(q, q, q, lists, "residual", block=block)
    with collect_fallbacks() as fallbacks:
        text = cuda_code(function, *args)
    assert len(fallbacks) == 1 and fallbacks[0][0] == "refresh_attention" and reason in fallbacks[0][1]
    assert library_calls(text) == ["torch.ops.quantsparse.refresh_attention.default"]
