"""The arithmetic of the CUDA kernels: Triton functions that the templates call. Imported by generated code only.

Operands are tiles of row-major matrices, read through a TMA descriptor (TMA) or a pointer; both read zeros outside
`rows` x `cols`. Log-sum-exps leave in natural units, inside they are base 2.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Stands for -inf as a running maximum, so that differences of empty rows are 0 and not NaN.
NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def operand(pointer, rows, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """A matrix from which load_tile reads tiles of ROWS x COLS."""
    if TMA:
        return tl.make_tensor_descriptor(pointer, shape=[rows, cols], strides=[stride, 1], block_shape=[ROWS, COLS])
    else:
        return pointer


@triton.jit
def load_tile(x, row, col, rows, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """The tile of ROWS x COLS whose corner is (row, col)."""
    if TMA:
        return x.load([tl.cast(row, tl.int32), tl.cast(col, tl.int32)])
    else:
        r = row + tl.arange(0, ROWS)
        c = col + tl.arange(0, COLS)
        inside = (r < rows)[:, None] & (c < cols)[None, :]
        return tl.load(x + r[:, None].to(tl.int64) * stride + c[None, :], mask=inside, other=0.0)


# ---- matrix product of codes ----


@triton.jit
def tile_of(index, row_tiles, col_tiles, GROUP: tl.constexpr):
    """Position of the index-th tile, in groups of GROUP row tiles that share their columns in the cache."""
    first = index // (GROUP * col_tiles) * GROUP
    height = min(row_tiles - first, GROUP)
    return first + index % height, index % (GROUP * col_tiles) // height


@triton.jit
def code_product(
    a,
    b,
    row,
    col,
    M,
    N,
    K,
    a_stride,
    b_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INT8: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of a (M, K) times b (N, K) transposed: int32 for int8 codes, exact; float32 for float8."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INT8 else tl.float32)
    for step in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
        x = load_tile(a, row, step * BLOCK_K, M, K, a_stride, BLOCK_M, BLOCK_K, TMA)
        y = load_tile(b, col, step * BLOCK_K, N, K, b_stride, BLOCK_N, BLOCK_K, TMA)
        acc = tl.dot(x, y.T, acc, out_dtype=tl.int32 if INT8 else tl.float32)
    return acc


@triton.jit
def scale_tile(acc, XS, WS, BIAS, row, col, M, N, ROWS: tl.constexpr, COLS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """acc * xs * ws + bias in float32, as the reference does it."""
    r = row + tl.arange(0, ROWS)
    c = col + tl.arange(0, COLS)
    y = acc.to(tl.float32) * tl.load(XS + r, mask=r < M, other=0.0)[:, None]
    y = y * tl.load(WS + c, mask=c < N, other=0.0)[None, :]
    if HAS_BIAS:
        y = y + tl.load(BIAS + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    return y


# ---- attention over lists of key blocks ----


@triton.jit
def query_factor(QS, row, tokens, SCALE: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """What the scores of each query row are multiplied by, [ROWS, 1]: the softmax scale in base 2 and q's own scale.

    SCALES: 0 none, 1 a scale per block, 2 a scale per token.
    """
    rows = row + tl.arange(0, ROWS)
    factor = tl.full([ROWS], SCALE * LOG2_E, tl.float32)
    if SCALES == 1:
        factor = factor * tl.load(QS + row // BLOCK)
    if SCALES == 2:
        factor = factor * tl.load(QS + rows, mask=rows < tokens, other=0.0)
    return factor[:, None]


@triton.jit
def attend_blocks(
    q,
    k,
    v,
    KS,
    LIST,
    count,
    factor,
    length,
    depth,
    k_stride,
    v_stride,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    INT8: tl.constexpr,
    K_SCALES: tl.constexpr,
    WEIGHT: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Online softmax of one tile of queries over the first `count` key blocks of LIST.

    q [BLOCK_M, HEAD]; keys from `length` on are masked (EVEN: there are none). WEIGHT is the dtype in which the softmax
    weights meet the values. Returns the unnormalised output [BLOCK_M, HEAD], the row sums and the row maxima (base 2).
    """
    STEPS: tl.constexpr = BLOCK // BLOCK_N
    m = tl.full([BLOCK_M], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD], tl.float32)
    following = tl.load(LIST).to(tl.int32)  # one entry ahead: a load inside the pipeline would cost it a stage
    for i in tl.range(0, count * STEPS, num_stages=STAGES):
        block = following
        following = tl.load(LIST + tl.minimum((i + 1) // STEPS, count - 1)).to(tl.int32)
        key = block * BLOCK + (i % STEPS) * BLOCK_N
        keys = load_tile(k, key, 0, length, depth, k_stride, BLOCK_N, HEAD, TMA)
        if INT8:
            scores = tl.dot(q, keys.T, out_dtype=tl.int32).to(tl.float32) * factor
        else:
            scores = tl.dot(q, keys.T, input_precision="ieee") * factor
        if K_SCALES == 1:
            scores = scores * tl.load(KS + block)
        columns = key + tl.arange(0, BLOCK_N)
        if K_SCALES == 2:
            scores = scores * tl.load(KS + columns, mask=columns < length, other=0.0)[None, :]
        if not EVEN:
            scores = tl.where((columns < length)[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        weights = tl.exp2(scores - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        total = total * shrink + tl.sum(weights, 1)
        values = load_tile(v, key, 0, length, depth, v_stride, BLOCK_N, HEAD, TMA)
        acc = tl.dot(weights.to(WEIGHT), values.to(WEIGHT), acc * shrink[:, None], input_precision="ieee")
        m = m_new
    return acc, total, m


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
