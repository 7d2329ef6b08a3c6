"""Visibility: the logits of a tile, and which of them a query may see.  The only file that knows masks.

`rows` and `keys` are blocks that broadcast against each other: (BLOCK_M, 1) and (1, BLOCK_N) for s = q kᵀ, or
(1, BLOCK_M) and (BLOCK_N, 1) for its transpose; the same lines serve both.
"""

import triton
import triton.language as tl

from crossattn_kernels.kernels.softmax import LOG2E, LOWEST, tanh, weighed
from crossattn_kernels.kernels.tiles import at, column, load_vec

TINY = tl.constexpr(2.0**-120)


@triton.jit
def head_scale(logits, b, h):
    return logits.scale * own_scale(logits, b, h)


@triton.jit
def own_scale(logits, b, h):
    """That of one head beside `logits.scale`, which is that of all."""
    if logits.head_scale is None:
        return tl.full([], 1.0, tl.float32)
    else:
        return tl.load(at(logits.head_scale, (b, h))).to(tl.float32)


@triton.jit
def upward(q_tile, scale, logits):
    """(q, scale) with a scale above 0, so that the largest product is the largest logit: one of 0 counts as tiny."""
    if logits.POSITIVE:
        return q_tile, scale
    else:
        down = scale < 0.0
        q_tile = tl.where(column(down), -q_tile, q_tile)
        return q_tile, tl.maximum(tl.abs(scale), TINY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def unit(logits, scale):
    """What a product, or its capped one, is multiplied by to be a logit."""
    factor = scale if logits.softcap is None else logits.softcap
    return factor * LOG2E if logits.bias is None else factor


@triton.jit
def later(logits, scale):
    """The factor that the logits of `scores` with LATER lack."""
    return unit(logits, scale) if logits.bias is None else tl.full([], 1.0, tl.float32)


@triton.jit
def scores(qk, logits, scale, b, h, rows, keys, M, N, C: tl.constexpr,
           WHOLE: tl.constexpr = False, LATER: tl.constexpr = False, EXACT: tl.constexpr = True):  # fmt: skip
    """Logits of the product qk, natural beside a bias and else in base 2; hidden entries are -inf.

    WHOLE: every query sees every key of the tile.
    LATER: without a bias the last factor is left to `softmax_step`, which then multiplies and subtracts at once.
    EXACT: a hidden entry is -inf even if its product is NaN.
    """
    s = qk if logits.softcap is None else capped(qk, logits, scale)
    if not (LATER and logits.bias is None):
        s *= unit(logits, scale)
    return s if WHOLE else hide(s, logits, b, h, rows, keys, M, N, EXACT, C)


@triton.jit
def capped(qk, logits, scale):
    """The logit before a bias, over the softcap: between -1 and 1."""
    x = qk * (scale / logits.softcap)
    return tanh(x) if logits.FINE else 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def hide(s, logits, b, h, rows, keys, M, N, EXACT: tl.constexpr, C: tl.constexpr):
    """Logits with their bias; -inf where the query does not see the key."""
    seen = visible(logits.mask, b, h, rows, keys, M, N, C)
    if logits.bias is not None:
        exists = (rows < M) & exist(keys, N, C)
        outside: tl.constexpr = float("-inf") if EXACT else 0.0  # which costs nothing
        bias = tl.load(at(logits.bias, (b, h, rows, keys)), mask=exists, other=outside).to(tl.float32)
        # one of infinity, which makes its row NaN anyway, becomes finite: so Triton copies the bias of keys down a tile
        # while others are computed
        s += tl.minimum(bias, -LOWEST, propagate_nan=tl.PropagateNan.ALL) if keys.shape[1] == 1 else bias
        if EXACT:
            seen = seen & (bias != float("-inf"))
    if logits.mask.UNIFORM:
        filled = row_bit(logits.mask.filled, b, h, rows, M)
        s, seen = tl.where(filled, 0.0, s), seen | (filled & (keys < N))
    if EXACT or not C.HIDES:
        return tl.where(seen, s, float("-inf"))
    elif C.FULL and not masked(logits.mask):
        return s
    else:  # a choice between logits would make Triton compute the softmax twice, as the bits lie and as the logits do
        return s + tl.where(seen, 0.0, float("-inf"))


@triton.jit
def exist(keys, N, C: tl.constexpr):
    """Which keys there are; not asked where no tile goes past the end, but of keys down a tile, see `hide`."""
    if C.FULL and keys.shape[1] > 1:
        return tl.full([1, 1], 1, tl.int1)
    else:
        return keys < N


@triton.jit
def logit_grad(ds, logits, b, h, rows, M):
    """Rows whose logits are 0 whatever q, k and bias are pass no gradient on."""
    if logits.mask.UNIFORM:
        ds = tl.where(row_bit(logits.mask.filled, b, h, rows, M), 0.0, ds)
    return ds


@triton.jit
def through_softcap(ds, qk, logits, scale):
    """Gradient of scale * qk from the gradient of the capped logit; where that is 0, so is this, even if qk is NaN."""
    if logits.softcap is not None:
        t = capped(qk, logits, scale)
        t = tl.where(t < 1.0, t, 1.0)  # 1 instead of NaN, in one instruction
        ds *= 1.0 - t * t
    return ds


@triton.jit
def scale_sums(sums, p, ds, qk, logits, scale, b, h, rows, M, KEYS: tl.constexpr, EXACT: tl.constexpr):
    """Sums over the keys for the gradient of scale: of ds * x, of ds and of p * x, x the slope of the logit.

    ds adds up to dlse, but for the error that a 16-bit o puts into delta: ds * x is off by that error times p * x.
    """
    x = through_softcap(logit_grad(qk, logits, b, h, rows, M), qk, logits, scale)
    return sums[0] + weighed(ds, x, KEYS, EXACT), sums[1] + tl.sum(ds, KEYS), sums[2] + weighed(p, x, KEYS, EXACT)


@triton.jit
def store_scale_sums(x, b, h, rows, M, sums):
    for i in tl.static_range(3):
        tl.store(at(x, (b, i, h, rows)), sums[i], mask=rows < M)


@triton.jit
def visible(mask, b, h, rows, keys, M, N, C: tl.constexpr):
    """Which of these keys each query may see; a row past M sees none that the mask hides from any query."""
    seen = exist(keys, N, C)
    if mask.start is not None:
        seen = seen & (keys >= tl.load(at(mask.start, (b, h, rows)), mask=rows < M, other=N))
    if mask.end is not None:
        seen = seen & (keys < tl.load(at(mask.end, (b, h, rows)), mask=rows < M, other=0))
    if mask.keys is not None:
        seen = seen & (tl.load(at(mask.keys, (b, keys)), mask=keys < N, other=0) != 0)
    if mask.visible is not None:
        exists = (rows < M) & exist(keys, N, C)
        group = at(mask.visible, (b, h, rows // mask.query_group, keys // mask.key_group))
        seen = seen & (tl.load(group, mask=exists, other=0) != 0)
    if mask.filled is not None:
        seen = seen | ((keys < N) & row_bit(mask.filled, b, h, rows, M))
    return seen


@triton.jit
def row_bit(x, b, h, rows, M):
    return tl.load(at(x, (b, h, rows)), mask=rows < M, other=0) != 0


@triton.jit
def touches(mask, b, h, rows, keys, M, N, SKIPS: tl.constexpr, C: tl.constexpr):
    """Whether any query of this tile sees any key of it; True without looking if ranges hide all, or not SKIPS."""
    if (mask.visible is None) | (not SKIPS):
        return True
    else:
        return tl.max(visible(mask, b, h, rows, keys, M, N, C).to(tl.int32)) > 0


@triton.jit
def reaches(mask, b, h, rows, keys, M, N, KNOWN: tl.constexpr):
    """Whether any of these queries may see one of these keys by its range; not asked where that is KNOWN."""
    if KNOWN | (not ranged(mask)):
        return True
    else:
        lo, hi = key_range(mask, b, h, rows, M, N)
        return (lo <= tl.max(keys)) & (hi > tl.min(keys))


@triton.jit
def key_range(mask, b, h, rows, M, N):
    """First and one past the last key that any of these queries may see by its range: scalars (lo, hi)."""
    if not ranged(mask):
        return 0, N
    else:
        start, end = row_range(mask, b, h, rows, M, N)
        return tl.maximum(tl.min(tl.where(rows < M, start, N)), 0), tl.max(tl.where(rows < M, end, 0))


@triton.jit
def common_range(mask, b, h, rows, M, N):
    """First and one past the last key that each of these queries sees by its range: scalars (first, last)."""
    start, end = row_range(mask, b, h, rows, M, N)
    first, last = tl.max(tl.where(rows < M, start, 0)), tl.min(tl.where(rows < M, end, N))
    if mask.bounds is not None:
        first = tl.maximum(first, tl.load(at(mask.bounds, (2, b))))
        last = tl.minimum(last, tl.load(at(mask.bounds, (3, b))))
    return first, last


@triton.jit
def whole_range(logits, b, h, rows, lo, hi, M, N, C: tl.constexpr):
    """Part of [lo, hi), a multiple of BLOCK_N long, all of whose keys each of these queries sees; maybe empty, at lo.

    lo is a multiple of BLOCK_N.
    """
    first, last = lo, hi
    if C.SIFTS:
        last = lo
    elif ranged(logits.mask):
        first, last = common_range(logits.mask, b, h, rows, M, N)
        first, last = tl.maximum(lo, tl.cdiv(first, C.BLOCK_N) * C.BLOCK_N), tl.minimum(hi, last)
    last = last // C.BLOCK_N * C.BLOCK_N
    some = first < last
    return tl.where(some, first, lo), tl.where(some, last, lo)


@triton.jit
def masked(mask):
    """Whether anything but a bias hides keys that exist: a constant."""
    return ranged(mask) | (mask.keys is not None) | (mask.visible is not None)


@triton.jit
def ranged(mask):
    """Whether queries see ranges of keys, in which more may be hidden: a constant."""
    return (mask.start is not None) | (mask.end is not None) | (mask.bounds is not None)


@triton.jit
def row_range(mask, b, h, rows, M, N):
    """[start, end) of every query of a tile, start perhaps below 0; [N, 0) of one that sees nothing.

    Where key padding has bounds it ends there, too.
    """
    start, end = tl.zeros_like(rows), tl.zeros_like(rows) + N
    if mask.start is not None:
        start = load_vec(mask.start, b, h, rows, M, 0)
    if mask.end is not None:
        end = tl.minimum(end, load_vec(mask.end, b, h, rows, M, 0))
    if mask.bounds is not None:
        start = tl.maximum(start, tl.load(at(mask.bounds, (0, b))))
        end = tl.minimum(end, tl.load(at(mask.bounds, (1, b))))
    some = start < end
    start, end = tl.where(some, start, N), tl.where(some, end, 0)
    if mask.filled is not None:
        filled = row_bit(mask.filled, b, h, rows, M)
        start, end = tl.where(filled, 0, start), tl.where(filled, N, end)
    return start, end
