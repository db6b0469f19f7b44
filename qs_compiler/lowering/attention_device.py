"""The arithmetic of the attention kernels: Triton functions for an online softmax over lists of key blocks.

Imported by generated code only. Log-sum-exps leave in natural units, inside they are base 2.
"""

import triton
import triton.language as tl

from .device import OFFSET, load_tile, operand, own_coordinate, retire_barriers

__all__ = ["load_tile", "operand", "own_coordinate", "retire_barriers"]  # templates find all in one module

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Stands for -inf as a running maximum, so that differences of empty rows are 0 and not NaN.
NOTHING = tl.constexpr(-1.0e30)
BEYOND = tl.constexpr(-3e38)  # what the sum of a masked key's score starts from
TINY = tl.constexpr(1.0e-30)
TWO_ROUNDINGS = tl.constexpr(2.0**-23)  # of a float32, relative
LARGEST_FACTOR = tl.constexpr(16.0)  # base 2; roundings of OFFSET times it leave weights that are normal numbers
OFFSET_BITS = tl.constexpr(0x4B400000)  # of OFFSET: sums of 256 products of int8 stay within 2^22 of it
WEIGHT_SHIFT = tl.constexpr(8.0)  # weights of at most 256, float8 holds 448
LARGEST_GROWTH = tl.constexpr(64.0)  # of a log-sum-exp, base 2, between two steps: no estimate of block mass overflows
MASS_ROWS = tl.constexpr(16)  # queries whose masses are added up before they are stored: those that a warp holds


@triton.jit
def query_factor(QS, row, tokens, SCALE: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """What the scores of each query row are multiplied by, [ROWS]: the softmax scale in base 2 and q's own scale.

    SCALES: 0 none, 1 a scale per block, 2 a scale per token.
    """
    rows = row + tl.arange(0, ROWS)
    factor = tl.full([ROWS], SCALE * LOG2_E, tl.float32)
    if SCALES == 1:
        factor = factor * tl.load(QS + row // BLOCK)
    if SCALES == 2:
        factor = factor * tl.load(QS + rows, mask=rows < tokens, other=0.0)
    return factor


@triton.jit
def empty_state(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """The state of an online softmax that has seen no key: weighted values, row sums, reference exponents (base 2)."""
    return (
        tl.zeros([ROWS, HEAD], tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.full([ROWS], NOTHING, tl.float32),
    )


@triton.jit
def whole_blocks(LIST, count, length, BLOCK: tl.constexpr):
    """How many of the first `count` blocks of LIST come before the trailing ones that reach past `length`."""
    whole = count
    reaches = True
    while (whole > 0) & reaches:
        reaches = tl.load(LIST + tl.maximum(whole - 1, 0)).to(tl.int32) * BLOCK + BLOCK > length
        whole = tl.where(reaches, whole - 1, whole)
    return whole


@triton.jit
def entry(LIST, i, SPECIALIZED: tl.constexpr):
    """Number i of a row of block numbers, int32."""
    block = tl.load(LIST + i).to(tl.int32)
    if SPECIALIZED:
        return tl.maximum(block, 0)  # Triton 3.6 hands no loaded scalar from warps to warps, but what is computed of it
    else:
        return block


@triton.jit
def attend_blocks(
    q,
    k,
    v,
    KS,
    LIST,
    first,
    last,
    factor,
    length,
    depth,
    k_stride,
    v_stride,
    acc,
    total,
    m,
    MASS,
    blocks,
    lse_prev,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    INT8: tl.constexpr,
    K_SCALES: tl.constexpr,
    WEIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    ESTIMATE: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    SPECIALIZED: tl.constexpr = False,
):
    """Go on with an online softmax of one tile of queries, over entries first .. last of LIST, numbers of key blocks.

    q [BLOCK_M, HEAD]; keys from `length` on are masked (MASKED False: there are none). The state is acc
    [BLOCK_M, HEAD], total, m [BLOCK_M], of empty_state at first: weights are exp2(score - m), m at least as large as
    the largest score less WEIGHT_SHIFT. Values meet the weights in the dtype WEIGHT; PACKED values are those of
    ops/pack_values.py, [HEAD, keys] in float8.

    ESTIMATE: store at MASS, float32 [BLOCK_M / MASS_ROWS, blocks], the softmax mass of each visited block, summed over
    MASS_ROWS queries, as if their log-sum-exps (base 2) were lse_prev [BLOCK_M]; a row whose lse_prev is inf has none.
    """
    STEPS: tl.constexpr = BLOCK // BLOCK_N
    # float8 holds weights down to 2^-9 as normal numbers: scaled up, the small ones keep their digits.
    SHIFT: tl.constexpr = WEIGHT_SHIFT if PACKED else 0.0
    # Integer sums start at the bits of OFFSET, so that they end as the floats OFFSET + sum: no conversion is needed,
    # and OFFSET leaves with the maximum. It costs at most one unit of the integer sum.
    ZERO: tl.constexpr = OFFSET if INT8 else 0.0
    LEFT: tl.constexpr = 0.0 if K_SCALES == 2 else ZERO
    groups = tl.arange(0, BLOCK_M // MASS_ROWS)
    mass = tl.zeros([BLOCK_M // MASS_ROWS], tl.float32)
    # The list is read one entry ahead: a load inside the pipeline would cost it a stage.
    following = entry(LIST, tl.minimum(first, tl.maximum(last - 1, 0)), SPECIALIZED)
    if SPECIALIZED and MASKED:
        # Only the last block is short, and its number is with the warps that load. Sums of the others start at -0.
        short = length - entry(LIST, tl.maximum(last - 1, 0), SPECIALIZED) * BLOCK
        beyond = tl.where(tl.arange(0, BLOCK_N) < short, 0.0, BEYOND)
    for i in tl.range(first * STEPS, last * STEPS, num_stages=STAGES, warp_specialize=SPECIALIZED):
        block = following
        following = entry(LIST, tl.minimum((i + 1) // STEPS, last - 1), SPECIALIZED)
        key = block * BLOCK + (i % STEPS) * BLOCK_N
        keys = load_tile(k, key, 0, length, depth, k_stride, BLOCK_N, HEAD, TMA)
        if INT8:
            start = tl.full([BLOCK_M, BLOCK_N], OFFSET_BITS, tl.int32)
            scores = tl.dot(q, keys.T, start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
        else:
            # Sums of HEAD float8 products may lose bits, but less than the codes' own rounding did.
            if SPECIALIZED and MASKED:
                start = tl.broadcast_to((beyond * tl.where(i == last - 1, 1.0, 0.0))[None, :], (BLOCK_M, BLOCK_N))
                scores = tl.dot(q, keys.T, start)
            else:
                scores = tl.dot(q, keys.T, input_precision="ieee")
        columns = key + tl.arange(0, BLOCK_N)
        f = factor
        if K_SCALES == 1:
            f = f * tl.load(KS + block)
        if K_SCALES == 2:
            scores = (scores - ZERO) * tl.load(KS + columns, mask=columns < length, other=0.0)[None, :]
        if MASKED and not SPECIALIZED:
            scores = tl.where((columns < length)[None, :], scores, float("-inf"))
        f = tl.maximum(f, TINY)  # scales of 0 would make NaN of what is masked
        if LEFT > 0:
            f = tl.minimum(f, LARGEST_FACTOR)  # a unit of the integer sum decides the softmax from far less on
        # The factor is positive, so it may come after the maximum.
        m_new = tl.maximum(m, (tl.max(scores, 1) - LEFT) * f - SHIFT)
        reference = f * LEFT + m_new
        if LEFT > 0:
            # Rounded by more than 1, it could lie so far below the largest score that a weight overflows.
            reference += tl.maximum(tl.abs(reference) * TWO_ROUNDINGS - 1.0, 0.0)
        weights = tl.exp2(scores * f[:, None] - reference[:, None])
        shrink = tl.exp2(m - m_new)
        sums = tl.sum(weights, 1)
        total = total * shrink + sums
        m = m_new
        if ESTIMATE:
            sums = sums * tl.exp2(tl.minimum(m_new - lse_prev, LARGEST_GROWTH))
            part = tl.sum(tl.reshape(sums, (BLOCK_M // MASS_ROWS, MASS_ROWS)), 1)
            mass = part if STEPS == 1 else tl.where(i % STEPS == 0, part, mass + part)
            tl.store(MASS + groups * blocks + block, mass)  # the last step of a block has all of it
        if PACKED:
            # The registers that hold columns 8a + 2t + b of 16 are those that a float8 operand holds as 4t + 2a + b.
            packed = tl.reshape(weights.to(tl.float8e4nv), (BLOCK_M, BLOCK_N // 16, 2, 4, 2))
            packed = tl.reshape(tl.permute(packed, (0, 1, 3, 2, 4)), (BLOCK_M, BLOCK_N))
            values = load_tile(v, 0, key, depth, v_stride, v_stride, HEAD, BLOCK_N, TMA)
            # Tensor cores add float8 products to few bits: a fresh sum for each tile keeps the error from growing.
            acc = tl.dot(packed, values.T, acc * shrink[:, None], max_num_imprecise_acc=BLOCK_N)
        else:
            values = load_tile(v, key, 0, length, depth, v_stride, BLOCK_N, HEAD, TMA)
            acc = tl.dot(weights.to(WEIGHT), values.to(WEIGHT), acc * shrink[:, None], input_precision="ieee")
    return acc, total, m


@triton.jit
def previous_exponents(LSE, stride, row, tokens, ROWS: tl.constexpr):
    """Log-sum-exps of an earlier step for attend_blocks, base 2, [ROWS]; inf for a row without a query or key."""
    rows = row + tl.arange(0, ROWS)
    lse = tl.load(LSE + rows * stride, mask=rows < tokens, other=float("-inf"))
    return tl.where(lse > float("-inf"), lse * LOG2_E, float("inf"))


@triton.jit
def store_block_mass(
    q,
    k,
    KS,
    MASS,
    blocks,
    factor,
    length,
    depth,
    k_stride,
    total,
    m,
    share,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    INT8: tl.constexpr,
    K_SCALES: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store the softmax mass of each key block, summed over the queries of a tile with the weights `share`.

    The rest as in attend_blocks, whose final total and m make the softmax. MASS: `blocks` contiguous float32.
    """
    STEPS: tl.constexpr = BLOCK // BLOCK_N
    m = m + tl.log2(tl.where(total > 0, total, 1.0))
    mass = 0.0
    for i in tl.range(0, blocks * STEPS, num_stages=STAGES):
        key = i * BLOCK_N
        keys = load_tile(k, key, 0, length, depth, k_stride, BLOCK_N, HEAD, TMA)
        if INT8:
            scores = tl.dot(q, keys.T, out_dtype=tl.int32).to(tl.float32)
        else:
            scores = tl.dot(q, keys.T, input_precision="ieee")
        columns = key + tl.arange(0, BLOCK_N)
        f = factor
        if K_SCALES == 1:
            f = f * tl.load(KS + i // STEPS)
        if K_SCALES == 2:
            scores = scores * tl.load(KS + columns, mask=columns < length, other=0.0)[None, :]
        weights = tl.exp2(scores * f[:, None] - m[:, None]) * share[:, None]
        part = tl.sum(tl.where((columns < length)[None, :], weights, 0.0))
        mass = part if STEPS == 1 else tl.where(i % STEPS == 0, part, mass + part)
        tl.store(MASS + i // STEPS, mass)  # the last step of a block has all of it


@triton.jit
def normalize(acc, total, m):
    """Output and natural log-sum-exp; (0, -inf) for a row without keys."""
    o = acc / tl.where(total > 0, total, 1.0)[:, None]
    return o, tl.where(total > 0, (m + tl.log2(tl.where(total > 0, total, 1.0))) * LN_2, float("-inf"))


@triton.jit
def merge_states(o1, lse1, o2, lse2):
    """The state over two disjoint sets of keys. An output whose log-sum-exp is -inf is ignored."""
    shift = tl.maximum(tl.maximum(lse1, lse2), NOTHING)
    w1 = tl.exp2((lse1 - shift) * LOG2_E)
    w2 = tl.exp2((lse2 - shift) * LOG2_E)
    total = w1 + w2
    safe = tl.where(total > 0, total, 1.0)
    o = tl.where((w1 > 0)[:, None], o1 * w1[:, None], 0.0) + tl.where((w2 > 0)[:, None], o2 * w2[:, None], 0.0)
    return o / safe[:, None], tl.where(total > 0, shift + tl.log2(safe) * LN_2, float("-inf"))
