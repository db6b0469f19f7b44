"""The CUDA lowering of quantsparse::sparse_attention, without a GPU."""

import pytest
import torch

from qs_compiler.lowering import collect_fallbacks
from qs_compiler.options import ATTENTIONS
from tests.fake_h100 import DEVICE_SHARED_MEMORY, SHARED_MEMORY, cuda_code
from tests.kernel_text import check_specialized_warps, compile_offline, kernel_sources
from tests.lowering.compiled import library_calls
from tests.lowering.interpret import interpret
from tests.ops.attention_cases import BLOCK, block_lists, random_qkv
from tests.tolerances import FP8_WEIGHTS_ERROR, RELATIVE_ERROR, assert_close

quantsparse = torch.ops.quantsparse
bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def attend(q, k, v, lists, *, scales=(None, None, None), kv_len=None, state=(None, None), dtype=None, block=BLOCK):
    """A function of tensors only, and its arguments."""
    tensors = (q, k, v, *scales, *lists, kv_len, *state)

    def function(*given):
        rest = iter(given)
        args = [None if t is None else next(rest) for t in tensors]
        return quantsparse.sparse_attention(*args, 0.2, block, dtype or q.dtype)

    return function, [t for t in tensors if t is not None]


def check(cases, folder, tolerance=None):
    """Interpret the generated code of [(function, args)] and compare with the references."""
    texts = []
    for function, args in cases:
        with collect_fallbacks() as fallbacks:
            texts.append(cuda_code(function, *args))
        assert fallbacks == [] and list(kernel_sources(texts[-1])) == ["triton_tem_fused_0"]
    results = interpret([(text, args) for text, (_, args) in zip(texts, cases, strict=True)], folder)
    for (function, args), (o, lse) in zip(cases, results, strict=True):
        wanted_o, wanted_lse = function(*args)
        assert o.dtype == wanted_o.dtype
        assert_close(o, wanted_o, tolerance)
        assert_close(lse, wanted_lse, max(1e-5, tolerance or 0))
    return texts


@pytest.mark.parametrize("dtype", FLOATS)
def test_odd_sizes_head_widths_and_grouped_heads(dtype, tmp_path):
    cases = []
    for i, tokens in enumerate((1, 65, 127)):
        depth, keys = (16, 80, 24)[i], tokens + 17
        lists = block_lists(2, 4, -(-tokens // BLOCK), -(-keys // BLOCK))
        cases.append(attend(*random_qkv(2, 4, (1, 2, 4)[i], tokens, keys, depth, dtype), lists))
    # The kernel rounds the softmax weights to 16 bits before they meet the values.
    check(cases, tmp_path, 2 * RELATIVE_ERROR[dtype])


def test_lists_broadcast_and_int16(tmp_path):
    qkv = random_qkv(2, 4, 2, 100, 80, 16, torch.float32)
    cases = [
        attend(*qkv, block_lists(batch, heads, 4, 3, dtype=dtype))
        for batch, heads, dtype in ((1, 1, torch.int32), (1, 4, torch.int16), (2, 1, torch.int32))
    ]
    counts, indices = block_lists(1, 4, 4, 3, counts=2, dtype=torch.int16)
    cases.append(attend(*qkv, (counts, indices[..., :2].contiguous())))  # as it is cached: the kept blocks alone
    check(cases, tmp_path)


def test_lengths_states_and_rows_without_keys(tmp_path):
    """NaN lies wherever nothing may be read: past kv_len, in states of empty parts, in rows without keys."""
    q, k, v = random_qkv(3, 2, 2, 70, 129, 16, torch.float32)
    counts, indices = block_lists(3, 2, 3, 5)
    counts[0, 0, 0] = 0
    kv_len = torch.tensor([129, 40, 0], dtype=torch.int32)
    for b, length in enumerate(kv_len):
        k[b, :, length:], v[b, :, length:] = float("nan"), float("nan")
    state_o, state_lse = torch.randn(3, 2, 70, 16), torch.randn(3, 2, 70)
    state_lse[:, 0, :40] = float("-inf")
    state_o[:, 0, :40] = float("nan")
    plain, resumed = (
        attend(q, k, v, (counts, indices), kv_len=kv_len, state=state)
        for state in ((None, None), (state_o.to(bf16), state_lse))
    )
    check([plain, resumed], tmp_path)


@pytest.mark.parametrize("code", (torch.int8, fp8))
def test_codes_with_scales_per_token_and_per_block(code, tmp_path):
    q, k, v = (x.mul(40).clamp(-120, 120).to(code) for x in random_qkv(1, 2, 1, 70, 96, 32, torch.float32))
    per_token = torch.rand(1, 2, 70) * 0.02, torch.rand(1, 1, 96) * 0.02, torch.rand(1, 1, 32)
    per_block = per_token[0][..., :3].contiguous(), per_token[1][..., :3].contiguous(), per_token[2]
    lists = block_lists(1, 2, 3, 3, least=1)
    values = random_qkv(1, 2, 1, 70, 96, 32, bf16)[2]
    packed, packed_scale = quantsparse.pack_values(values)
    cases = [
        attend(q, k, v, lists, scales=per_token, dtype=bf16),
        attend(q, k, v, lists, scales=per_block, dtype=bf16),
        attend(q, k, values, lists, scales=(*per_block[:2], None), dtype=bf16),
    ]
    check(cases, tmp_path, 2 * RELATIVE_ERROR[bf16])
    poisoned, kv_len = k.float(), torch.tensor([50])
    poisoned[:, :, 50:] = float("nan") if code == fp8 else 127
    short, short_scale = quantsparse.pack_values(values, kv_len)
    eight_bit = [
        attend(q, k, packed, lists, scales=(*per_block[:2], packed_scale), dtype=bf16),
        attend(q, poisoned.to(code), short, lists, scales=(*per_block[:2], short_scale), kv_len=kv_len, dtype=bf16),
    ]
    check(eight_bit, tmp_path, FP8_WEIGHTS_ERROR)


def quantised(kind, q, k, v):
    """Operands of attention as the pass makes them, of as many key heads as query heads."""
    formats = ATTENTIONS[kind]
    k, k_scale, smooth = quantsparse.quantize_keys(k, None, BLOCK, formats.qk)
    q, q_scale = quantsparse.quantize_rows(q.float() * smooth.unsqueeze(2), None, None, formats.qk)
    v, v_scale = (v, None) if formats.v is None else quantsparse.pack_values(v)
    return (q, k, v), (q_scale, k_scale, v_scale)


@pytest.mark.parametrize(("kind", "tolerance"), (("int8", 4 * RELATIVE_ERROR[bf16]), ("fp8", FP8_WEIGHTS_ERROR)))
def test_heads_of_a_fused_projection_quantised_in_the_graph(kind, tolerance, tmp_path):
    """What makes the codes and their scales follows the projection's strides unless the kernel holds their layouts."""

    def function(fused, counts, indices):
        (q, k, v), scales = quantised(kind, *fused.permute(2, 0, 3, 1, 4))
        return quantsparse.sparse_attention(q, k, v, *scales, counts, indices, None, None, None, 0.2, BLOCK, bf16)

    fused = (torch.randn(1, 70, 3, 4, 32) * torch.rand(70, 1, 4, 1).mul(3).exp()).to(bf16)
    args = fused, *block_lists(1, 4, 3, 3, least=1)
    text = cuda_code(function, *args)
    [(o, lse)] = interpret([(text, args)], tmp_path)
    wanted_o, wanted_lse = function(*args)
    assert_close(o, wanted_o, tolerance)
    assert_close(lse, wanted_lse, RELATIVE_ERROR[bf16])


@pytest.mark.parametrize(("code", "step"), ((torch.int8, 2.0), (torch.int8, 1e4), (torch.int8, 1e30), (fp8, 2.0)))
def test_huge_scores_give_one_key_and_no_infinity(code, step, tmp_path):
    """A unit of the integer sum is worth more than any weight: the largest sum has all, however its float rounds.

    float8 scores are floats, like 16-bit ones: of some millions here.
    """
    q, k = (torch.randint(-127, 128, (1, 2, n, 32), dtype=torch.int8).to(code) for n in (70, 32))
    v = torch.randn(1, 2, 32, 32).mul(1e30).to(bf16)
    one = torch.ones(1, dtype=torch.int32)
    lists = one.expand(1, 2, 3).contiguous(), (0 * one).expand(1, 2, 3, 1).contiguous()
    scales = torch.full((1, 2, 70), step), torch.ones(1, 2, 1), None
    function, args = attend(q, k, v, lists, scales=scales, dtype=bf16)
    [(o, lse)] = interpret([(cuda_code(function, *args), args)], tmp_path)
    assert torch.isfinite(o).all() and not lse.isnan().any()
    first, second = (q.float() @ k.float().mT).topk(2).values.unbind(-1)
    clear = first - second > 1000
    assert clear.float().mean() > 0.5
    assert_close(o[clear], function(*args)[0][clear], RELATIVE_ERROR[bf16])


def sparse_step(q, k, v, counts, indices, residual):
    o, _ = quantsparse.sparse_attention(
        q, k, v, None, None, None, counts, indices, None, None, None, 0.2, BLOCK, q.dtype
    )
    o = quantsparse.add_residual(o, residual, None, None, None, None)
    return (o.transpose(1, 2).flatten(2),)


def mixture_step(q, k, v, counts, indices, residual, mixture_weight):
    o, _ = quantsparse.sparse_attention(
        q, k, v, None, None, None, counts, indices, None, None, None, 0.2, BLOCK, q.dtype
    )
    o = (o.float() * (1 - mixture_weight.float()).unsqueeze(-1)).to(o.dtype)
    o = quantsparse.add_residual(o, residual, None, None, None, None)
    return (o.transpose(1, 2).flatten(2),)


@pytest.mark.parametrize("step", [sparse_step, mixture_step])
def test_residual_and_transpose_join_the_kernel(step, tmp_path):
    """Strided heads in, corrected rows of all heads out: one kernel."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(1, 2, 2, 65, 96, 16, bf16))
    args = q, k, v, *block_lists(1, 2, 3, 3), torch.randn(1, 2, 65, 16).to(bf16)
    args = (*args, torch.rand(1, 2, 65)) if step is mixture_step else args
    text = cuda_code(step, *args)
    assert len(kernel_sources(text)) == 1
    [got] = interpret([(text, args)], tmp_path)[0]
    assert_close(got, step(*args)[0], 2 * RELATIVE_ERROR[bf16])


def test_tokens_may_be_symbolic(tmp_path):
    def function(q, k, v, counts, indices):
        return quantsparse.sparse_attention(
            q, k, v, None, None, None, counts, indices, None, None, None, 0.2, BLOCK, q.dtype
        )

    def args(tokens):
        return *random_qkv(1, 2, 2, tokens, 96, 16, torch.float32), *block_lists(1, 2, -(-tokens // BLOCK), 3)

    text = cuda_code(function, *args(120), dynamic=(120, 4))
    for given, got in zip(
        (args(120), args(65)), interpret([(text, args(120)), (text, args(65))], tmp_path), strict=True
    ):
        for result, wanted in zip(got, function(*given), strict=True):
            assert_close(result, wanted)


def large_case(depth, dtype, v_dtype, state=(None, None)):
    """Shapes of real use, on the meta device. v_dtype uint8 stands for packed float8 values."""
    with torch.device("meta"):
        q = k = torch.empty(1, 4, 4096, depth, dtype=dtype)
        packed, coded = v_dtype == torch.uint8, dtype.itemsize == 1
        v = torch.empty(1, 4, *((depth, 4096) if packed else (4096, depth)), dtype=v_dtype)
        scales = (torch.empty(1, 4, 4096), torch.empty(1, 4, 32)) if coded else (None, None)
        scales = *scales, torch.empty(1, 4, depth) if packed else None
        lists = torch.empty(1, 4, 32, dtype=torch.int32), torch.empty(1, 4, 32, 32, dtype=torch.int32)
        return attend(q, k, v, lists, scales=scales, state=state, dtype=bf16 if coded else dtype, block=128)


B200 = (10, 0)
FORMS = (bf16, bf16), (torch.int8, bf16), (torch.int8, torch.uint8), (fp8, torch.uint8), (torch.float32, torch.float32)
TARGETS = [(*form, target) for form in FORMS for target in SHARED_MEMORY if form[1] != torch.uint8 or target > (8, 0)]
CASES = [(depth, *case) for case in TARGETS for depth in ((64, 128, 256) if case[0] == bf16 else (128,))]
CASES += [(depth, code, torch.uint8, B200) for code in (torch.int8, fp8) for depth in (64, 128)]


@pytest.mark.parametrize(("depth", "dtype", "v_dtype", "capability"), CASES)
def test_every_tile_compiles_and_fits(depth, dtype, v_dtype, capability, tmp_path):
    function, args = large_case(depth, dtype, v_dtype)
    [source] = kernel_sources(cuda_code(function, *args, capability=capability)).values()
    compiled = compile_offline(source, tmp_path, capability)
    assert compiled.shared_memory <= DEVICE_SHARED_MEMORY[capability]
    if dtype != torch.float32:
        assert {(9, 0): "wgmma", B200: "tcgen05.mma"}.get(capability, "mma.sync") in compiled.ptx
    # Triton has no int8 for the tensor cores of compute capability 10: those of before multiply q and k.
    assert capability != B200 or ("mma.sync" in compiled.ptx) == (dtype == torch.int8)
    if v_dtype == torch.uint8:
        assert compiled.spilled_bytes == 0


@pytest.mark.parametrize(
    ("dtype", "depth", "resumes", "tile"),
    (
        (bf16, 128, False, (128, 128, 2, 4)),  # specialised
        (bf16, 64, False, (128, 64, 2, 4)),
        (bf16, 128, True, (128, 64, 3, 8)),
        (torch.int8, 128, False, (64, 128, 2, 4)),
        (torch.int8, 64, False, (64, 128, 3, 4)),
        (fp8, 128, False, (64, 128, 2, 4)),  # int8's
        (fp8, 64, False, (64, 128, 3, 4)),
    ),
)
def test_tiles_are_those_that_were_measured(dtype, depth, resumes, tile):
    with torch.device("meta"):
        state = torch.empty(1, 4, 4096, depth, dtype=bf16), torch.empty(1, 4, 4096)
    v_dtype = torch.uint8 if dtype.itemsize == 1 else dtype
    function, args = large_case(depth, dtype, v_dtype, state if resumes else (None, None))
    text = cuda_code(function, *args)
    m, n, stages, warps = tile
    assert f"BLOCK_M : tl.constexpr = {m}" in text and f"BLOCK_N : tl.constexpr = {n}" in text
    assert f"num_stages={stages}," in text and f"num_warps={warps}," in text
    assert ("SPECIALIZED : tl.constexpr = True" in text) == (tile == (128, 128, 2, 4))


@pytest.mark.parametrize("tokens", (4096, 4112))
@pytest.mark.parametrize("index", (torch.int16, torch.int32))
def test_specialized_warps(tokens, index, tmp_path):
    with torch.device("meta"):
        q, blocks = torch.empty(1, 4, tokens, 128, dtype=bf16), -(-tokens // 128)
        lists = torch.empty(1, 4, blocks, dtype=torch.int32), torch.empty(1, 4, blocks, blocks, dtype=index)
    function, args = attend(q, q, q, lists, block=128)
    [source] = kernel_sources(cuda_code(function, *args)).values()
    compiled = compile_offline(source, tmp_path, (9, 0))
    assert compiled.spilled_bytes == 0 and compiled.shared_memory <= DEVICE_SHARED_MEMORY[9, 0]
    check_specialized_warps(compiled, operands=(1 + 2 * 2) * 128 * 128 * 2, stages=2)  # q, stages of k and of v


@pytest.mark.parametrize("dtype", (bf16, torch.float16))
def test_numbers_of_specialized_tiles(dtype, tmp_path):
    """Whole blocks, a last one of 1 and of 127 keys, rows without a block; depths that fill the head and do not."""
    cases = []
    for i, keys in enumerate((256, 257, 383)):
        lists = block_lists(1, 2, 3, -(-keys // 128), seed=i)
        cases.append(attend(*random_qkv(1, 2, 1, 257, keys, (128, 80, 128)[i], dtype), lists, block=128))
    texts = check(cases, tmp_path, 2 * RELATIVE_ERROR[dtype])
    assert all("SPECIALIZED : tl.constexpr = True" in text for text in texts)


def test_lengths_are_masked_in_a_loop_of_their_own():
    """Several blocks may lie beyond a valid length, and the specialised loop masks the last one alone."""
    lists = block_lists(1, 2, 3, 3)
    function, args = attend(*random_qkv(1, 2, 1, 257, 257, 128, bf16), lists, kv_len=torch.tensor([200]), block=128)
    assert "SPECIALIZED : tl.constexpr = False" in cuda_code(function, *args)


@pytest.mark.parametrize(
    ("block", "depth", "capability", "reason"),
    (
        (24, 32, (9, 0), "block_size 24 is not a multiple of 16"),
        (32, 320, (9, 0), "head width 320 is above 256"),
    ),
)
def test_what_the_template_cannot_do_is_reported(block, depth, capability, reason):
    with torch.device("meta"):
        q = torch.empty(1, 2, 96, depth, dtype=bf16)
        n = 96 // block
        lists = torch.empty(1, 2, n, dtype=torch.int32), torch.empty(1, 2, n, n, dtype=torch.int32)
    function, args = attend(q, q, q, lists, block=block)
    with collect_fallbacks() as fallbacks:
        text = cuda_code(function, *args, capability=capability)
    assert len(fallbacks) == 1 and fallbacks[0][0] == "sparse_attention" and reason in fallbacks[0][1]
    assert library_calls(text) == ["torch.ops.quantsparse.sparse_attention.default"]


@pytest.mark.parametrize("kind", ("int8-fp8", "fp8"))
def test_float8_operands_need_compute_capability_8_9(kind):
    def function(q, k, v, counts, indices):
        codes, scales = quantised(kind, q, k, v)
        return quantsparse.sparse_attention(*codes, *scales, counts, indices, None, None, None, 0.2, BLOCK, bf16)

    args = *random_qkv(1, 2, 2, 96, 96, 64, bf16), *block_lists(1, 2, 3, 3)
    with collect_fallbacks() as fallbacks:
        cuda_code(function, *args, capability=(8, 9))
    assert fallbacks == []
    with collect_fallbacks() as fallbacks:
        cuda_code(function, *args, capability=(8, 0))
    prologue = ["quantize_keys", "quantize_rows"] if kind == "fp8" else []
    assert [op for op, _ in fallbacks] == [*prologue, "pack_values", "sparse_attention"]
    assert all("float8_e4m3fn needs compute capability 8.9, this device has 8.0" in why for _, why in fallbacks)
