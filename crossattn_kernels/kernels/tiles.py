"""Memory: where a tile lies, and how it is loaded, stored and multiplied.

Indices are int32; offsets are int64, because a row times its stride may pass 2^31.
"""

import triton
import triton.language as tl

from crossattn_kernels.kernels.views import INTERPRETED


@triton.jit
def program(tiles, heads):
    """(tile, b, h) of this program on the one-dimensional grid, which has room for 2^31 of them."""
    pid = tl.program_id(0)
    return pid % tiles, (pid // tiles // heads).to(tl.int64), (pid // tiles % heads).to(tl.int64)


@triton.jit
def at(x, index):
    """Pointer to x[index]; entries are scalars or blocks that broadcast against each other."""
    p = x.ptr
    for axis in tl.static_range(len(x.strides)):
        p += index[axis] * x.strides[axis]
    return p


@triton.jit
def wide(index):
    return index.to(tl.int64)


@triton.jit
def inside(rows, cols, n, WIDTH: tl.constexpr):
    """Which entries of a tile exist; columns are compared only where the head size was padded."""
    ok = rows[:, None] < n
    if cols.shape[0] != WIDTH:
        ok &= cols[None, :] < WIDTH
    return ok


@triton.jit
def load_rows(x, b, h, rows, cols, n, WIDTH: tl.constexpr):
    """x[b, h, rows, cols], 0 outside: (rows, cols)."""
    return tl.load(at(x, (b, h, wide(rows)[:, None], cols[None, :])), mask=inside(rows, cols, n, WIDTH), other=0.0)


@triton.jit
def store_rows(x, b, h, rows, cols, n, WIDTH: tl.constexpr, value):
    value = value.to(x.ptr.dtype.element_ty)
    tl.store(at(x, (b, h, wide(rows)[:, None], cols[None, :])), value, mask=inside(rows, cols, n, WIDTH))


@triton.jit
def load_vec(x, b, h, rows, n, other):
    """x[b, h, rows], `other` outside: (rows,)."""
    return tl.load(at(x, (b, h, wide(rows))), mask=rows < n, other=other)


@triton.jit
def store_vec(x, b, h, rows, n, value):
    tl.store(at(x, (b, h, wide(rows))), value, mask=rows < n)


@triton.jit
def finite(x):
    """x with 0 for what is not finite: a product with a probability of 0 must be 0."""
    wide_x = x.to(tl.float32)
    return tl.where(wide_x - wide_x == 0.0, x, 0.0).to(x.dtype)


@triton.jit
def dot(a, b, acc, TF32: tl.constexpr):
    """a b + acc in fp32."""
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee", out_dtype=tl.float32)
