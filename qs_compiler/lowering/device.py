"""The arithmetic of the CUDA kernels: Triton functions that the templates call. Imported by generated code only.

Operands are tiles of row-major matrices, read through a TMA descriptor (TMA) or a pointer; both read zeros outside
`rows` x `cols`. attention_device.py has what attention needs beside this.
"""

import triton
import triton.language as tl

# 1.5 * 2^23: a float32 near it steps by one.
OFFSET = tl.constexpr(12582912.0)


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


# ---- specialised warps ----


@triton.jit
def retire_barriers(x, STAGES: tl.constexpr):
    """Invalidate the barriers that a kernel with specialised warps initialises and never uses; returns the int32 `x`.

    Triton 3.6 leaves STAGES of them at the start of the shared memory, under the buffer that the loads of the loop
    fill. Memory of a barrier that is used again without mbarrier.inval may still be written as a barrier: seen when a
    kernel made another barrier later, and when two processes shared a device. Called before anything is loaded, with a
    value that the loads depend on, so that the warps that load run it; their thread 0 has initialised the barriers.
    """
    for i in tl.static_range(STAGES):
        x = tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread, barrier;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            mov.u32 barrier, global_smem;
            add.u32 barrier, barrier, $2;
            @first mbarrier.inval.shared::cta.b64 [barrier];
            fence.proxy.async.shared::cta;
            mov.u32 $0, $1;
            }""",
            "=r,r,r", [x, 8 * i], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return x


@triton.jit
def own_coordinate(tile, ROWS: tl.constexpr):
    """tile * ROWS, int32, as the row at which a descriptor of divided rows is read, and for nothing else.

    To that value Triton 3.6 adds the second group's ROWS / 2 rows wherever it is used, and tl.arange has them already:
    one that numbers rows has to be another value, which this does not become by going through int64.
    """
    return (tile.to(tl.int64) * ROWS).to(tl.int32)


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


# ---- rotated rows ----


@triton.jit
def rotated_tile(
    X, SMOOTH, rotation, row, col, M, K, stride, ROWS: tl.constexpr, R: tl.constexpr, HAS_SMOOTH: tl.constexpr
):
    """(x * smooth) rotation for ROWS x R channels from (row, col), float32; rotation is rounded, round_to_tf32."""
    x = load_tile(X, row, col, M, K, stride, ROWS, R, False).to(tl.float32)
    if HAS_SMOOTH:
        x = x * tl.load(SMOOTH + col + tl.arange(0, R))[None, :]
    return tl.dot(round_to_tf32(x), rotation, input_precision="tf32")


@triton.jit
def round_to_tf32(x):
    """To nearest, 11 bits. The tensor cores cut the rest off, which would shrink every product."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def round_to_integer(x):
    """To nearest even, for |x| < 2^22: the sum has no fraction bits left."""
    return (x + OFFSET) - OFFSET
