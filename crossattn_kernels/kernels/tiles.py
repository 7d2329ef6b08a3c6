"""Memory: where a tile lies, and how it is loaded, stored and multiplied.

Indices are int32; offsets are int64, because a row times its stride may pass 2^31.  Inside a row they stay int32.
"""

import triton
import triton.language as tl

from crossattn_kernels.kernels.views import INTERPRETED


@triton.jit
def program(tiles, heads):
    """(tile, b, h) of this program on the one-dimensional grid, which has room for 2^31 of them."""
    pid = tl.program_id(0)
    return pid % tiles, pid // tiles // heads, pid // tiles % heads


@triton.jit
def packed_program(splits, Hq, M, C: tl.constexpr):
    """(split, b, hk, h, rows) of this program: BLOCK_M queries of one query head or, with PACKED, of all those of hk.

    Then h is a block, one head a row, and each query is there once for each of them.
    """
    index = tl.arange(0, C.BLOCK_M)
    if C.PACKED:
        tile, rest, hk = program(tl.cdiv(M * C.GROUP, C.BLOCK_M), Hq // C.GROUP)
        index += tile * C.BLOCK_M
        h, rows = hk * C.GROUP + index % C.GROUP, index // C.GROUP
    else:
        tile, rest, h = program(tl.cdiv(M, C.BLOCK_M), Hq)
        hk, rows = h // C.GROUP, tile * C.BLOCK_M + index
    return rest % splits, rest // splits, hk, h, rows


@triton.jit
def share(lo, hi, split, splits, BLOCK: tl.constexpr):
    """The part of one split of [lo, hi), whole blocks from the block of lo on; maybe empty."""
    lo = lo // BLOCK * BLOCK
    step = tl.cdiv(tl.cdiv(hi - lo, BLOCK), splits) * BLOCK
    first = tl.minimum(lo + split * step, tl.cdiv(hi, BLOCK) * BLOCK)
    return first, tl.maximum(first, tl.minimum(first + step, hi))


@triton.jit
def past(i, first, last):
    """The i-th of the indices that are not in [first, last)."""
    return i + tl.where(i < first, 0, last - first)


@triton.jit
def anew(index, n):
    """The same indices, of n > 0 rows, which look like others: addresses made of these are not kept through a loop."""
    return index + tl.minimum(n, 0)


@triton.jit
def at(x, index):
    """Pointer to x[index]; entries are scalars or blocks that broadcast against each other."""
    p = x.ptr
    for axis in tl.static_range(len(x.strides)):
        p += tl.cast(index[axis], tl.int64) * x.strides[axis] * x.unit
    if len(index) > len(x.strides):
        p += index[len(x.strides)]
    return p


@triton.jit
def column(h):
    """A head down a tile of rows: one a row where rows of several heads are packed, else the one of them all."""
    return h if len(h.shape) == 0 else h[:, None]


@triton.jit
def inside(rows, cols, n, WIDTH: tl.constexpr):
    """Which entries of a tile exist: columns all do unless the head size was padded."""
    return rows[:, None] < n if cols.shape[0] == WIDTH else (rows[:, None] < n) & (cols[None, :] < WIDTH)


@triton.jit
def descriptor(x, b, h, n, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tensor descriptor of x[b, h], to be loaded by tiles (ROWS, COLS) of which no thread computes addresses."""
    return tl.make_tensor_descriptor(at(x, (b, h, 0, 0)), [n, WIDTH], [x.strides[2] * x.unit, 1], [ROWS, COLS])


@triton.jit
def key_tile(x, b, h, first, n, WIDTH: tl.constexpr, COLS: tl.constexpr, WHOLE: tl.constexpr,
             STEP: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """x[b, h, first : first + STEP] as `load_rows` gives it: (STEP, COLS); with TMA, x is the descriptor."""
    if C.TMA:
        return x.load([first, 0])
    else:
        return load_rows(x, b, h, first + tl.arange(0, STEP), tl.arange(0, COLS), n, WIDTH, WHOLE)


@triton.jit
def load_rows(x, b, h, rows, cols, n, WIDTH: tl.constexpr, WHOLE: tl.constexpr = False):
    """x[b, h, rows, cols], 0 outside: (rows, cols).

    All rows of a WHOLE tile exist, and its columns past WIDTH repeat the first ones: zeros of another tile multiply
    them, or what becomes of them is not stored.
    """
    if WHOLE:
        cols = cols if cols.shape[0] == WIDTH else cols % WIDTH
        return tl.load(at(x, (b, column(h), rows[:, None], cols[None, :])))
    where = at(x, (b, column(h), rows[:, None], cols[None, :]))
    return tl.load(where, mask=inside(rows, cols, n, WIDTH), other=0.0)


@triton.jit
def load_lasting(x, b, h, rows, cols, n, WIDTH: tl.constexpr):
    """`load_rows` of a tile that lives through a loop.

    If the compiler shares its mask with loads inside the loop, a predicate lives as long, and with a live predicate for
    columns ptxas overlaps no exponential with a product.  Bounds that it cannot see through keep the mask local.
    """
    if cols.shape[0] == WIDTH:
        return load_rows(x, b, h, rows, cols, n, WIDTH)
    else:
        zero = tl.minimum(n, 0)
        width = tl.multiple_of(WIDTH + zero, WIDTH & -WIDTH)
        end = n + zero if cols.shape[0] <= 128 else n  # larger tiles are short of registers
        where = at(x, (b, column(h), rows[:, None], cols[None, :]))
        return tl.load(where, mask=(rows[:, None] < end) & (cols[None, :] < width), other=0.0)


@triton.jit
def store_rows(x, b, h, rows, cols, n, WIDTH: tl.constexpr, value):
    value = value.to(x.ptr.dtype.element_ty)
    tl.store(at(x, (b, column(h), rows[:, None], cols[None, :])), value, mask=inside(rows, cols, n, WIDTH))


@triton.jit
def load_vec(x, b, h, rows, n, other):
    """x[b, h, rows], `other` outside: (rows,)."""
    return tl.load(at(x, (b, h, rows)), mask=rows < n, other=other)


@triton.jit
def store_vec(x, b, h, rows, n, value):
    tl.store(at(x, (b, h, rows)), value, mask=rows < n)


@triton.jit
def finite(x):
    """x with 0 for what is not finite: a product with a probability of 0 must be 0."""
    wide_x = x.to(tl.float32)
    return tl.where(wide_x - wide_x == 0.0, x, 0.0).to(x.dtype)


@triton.jit
def all_finite(x):
    """Whether no entry is NaN or infinite: a scalar."""
    return tl.min((x - x == 0.0).to(tl.int32)) > 0


@triton.jit
def dot(a, b, acc, TF32: tl.constexpr):
    """a b + acc in fp32."""
    if INTERPRETED:
        # the interpreter would multiply the bit patterns of bf16, and NumPy sums fp32 in an order that depends on the
        # shape of the tile, where a GPU takes one product after the other
        exact = tl.dot(a.to(tl.float64), b.to(tl.float64), input_precision="ieee", out_dtype=tl.float64).to(tl.float32)
        return exact if acc is None else acc + exact
    return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee", out_dtype=tl.float32)


@triton.jit
def dot_in_pairs(a, b, TF32: tl.constexpr, HALVINGS: tl.constexpr = 2):
    """a b in fp32, to be subtracted from a number close to it: fp32 products are added in four sums, then in pairs.

    A GPU adds the products of an entry one after the other.  The halves are subtracted here, because Triton would make
    one product of a sum of two.
    """
    if HALVINGS == 0 or INTERPRETED or TF32 or a.dtype != tl.float32 or a.shape[1] < 32:
        return dot(a, b, None, TF32)
    else:
        a0, a1 = halves(a)
        b0, b1 = halves(b.T)
        return dot_in_pairs(a0, b0.T, TF32, HALVINGS - 1) - dot_in_pairs(-a1, b1.T, TF32, HALVINGS - 1)


@triton.jit
def halves(x):
    """Left and right columns of (R, C), each (R, C / 2)."""
    return tl.split(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)))
