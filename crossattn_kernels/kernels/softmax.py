"""Arithmetic: the running softmax of a tile of rows, its gradient, dropout and tanh; exponentials are 2^(s * BASE)."""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from crossattn_kernels.kernels.tiles import at, column, finite, load_vec

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-(2.0 - 2.0**-23) * 2.0**127)


class Softmax(NamedTuple):
    """Running maximum m, sum l and unnormalised output acc."""

    m: tl.tensor  # (BLOCK_M,)
    l: tl.tensor  # (BLOCK_M,)
    acc: tl.tensor  # (BLOCK_M, BLOCK_DV)


@triton.jit
def softmax_init(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return Softmax(m, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_DV], tl.float32))


@triton.jit
def softmax_step(m, l, s, factor, BASE: tl.constexpr):
    """(m, l, p, alpha) with one tile of logits s * factor folded in; alpha scales what came before.

    s: (BLOCK_M, BLOCK_N); factor: above 0, one for all or one a row.
    """
    high = tl.maximum(m, tl.max(s, 1) * factor)
    pivot = tl.maximum(high, LOWEST)  # as good as `safe`, in one instruction
    alpha = tl.exp2((m - pivot) * BASE)
    p = tl.exp2((s * column(factor) - pivot[:, None]) * BASE)  # one instruction multiplies and subtracts
    return high, l * alpha + tl.sum(p, 1), p, alpha


@triton.jit
def softmax_merge(a, b, BASE: tl.constexpr):
    """The state of two disjoint sets of keys; two empty ones make an empty one."""
    m = tl.maximum(a.m, b.m)
    of_a, of_b = tl.exp2((a.m - safe(m)) * BASE), tl.exp2((b.m - safe(m)) * BASE)
    return Softmax(m, a.l * of_a + b.l * of_b, a.acc * of_a[:, None] + b.acc * of_b[:, None])


@triton.jit
def softmax_finish(state, BASE: tl.constexpr):
    """(o, lse, high, inverse): p = 2^((s - high) * BASE) * inverse.  A row that saw nothing gives o = 0, lse = -inf."""
    l = tl.where(state.l == 0.0, 1.0, state.l)
    lse = (state.m + tl.log2(l)) * LN2 if BASE == 1.0 else state.m + tl.log2(l) * LN2
    return state.acc / l[:, None], lse, state.m, 1.0 / l


@triton.jit
def safe(m):
    """A pivot to subtract: that of a row that saw nothing is 0, because inf - inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def quarantine(s, v):
    """(s, v) such that a value that is not finite reaches the queries that see it, as NaN, and no other."""
    poison = tl.sum(v.to(tl.float32) * 0.0, 1)
    return tl.where(s == float("-inf"), s, s + poison[None, :]), finite(v)


class Row(NamedTuple):
    """What the backward knows of a tile of queries; blocks that broadcast against the tile's logits."""

    pivot: tl.tensor  # p = 2^((s - pivot) * BASE) * inverse; finite
    inverse: tl.tensor
    delta: tl.tensor
    gate: tl.tensor  # tanh of the gate, 1 without one
    several: tl.tensor  # 0 where a tile holds all keys and the query sees one of them


@triton.jit
def load_row(known, b, h, rows, M, C: tl.constexpr):
    """Row of (BLOCK_M,) blocks; 0 for queries past the end, of which q and do are 0, too, and so ds."""
    delta = tl.zeros(rows.shape, tl.float32)
    pivot, inverse, gate, several = delta, delta + 1.0, delta + 1.0, delta + 1.0
    if known.pivot is not None:
        pivot = load_vec(known.pivot, b, h, rows, M, 0.0)
        delta = load_vec(known.delta, b, h, rows, M, 0.0)
    elif known.dlse is not None:
        delta -= load_vec(known.dlse, b, h, rows, M, 0.0)
    if known.near is not None:
        pivot = load_vec(known.near, b, h, rows, M, 0.0) * (LOG2E if C.BY_LSE else 1.0)
        pivot = tl.maximum(pivot, LOWEST, propagate_nan=tl.PropagateNan.ALL) if C.HIDES else pivot
    if known.share is not None:
        several = tl.where(load_vec(known.share, b, h, rows, M, 0.0) == 1.0, 0.0, 1.0)
    if known.inverse is not None:
        inverse = load_vec(known.inverse, b, h, rows, M, 0.0)
    if known.gate is not None:
        gate = load_vec(known.gate, b, h, rows, M, 0.0)
    if known.head_gate is not None:
        gate *= tl.load(at(known.head_gate, (b, h)))
    return Row(pivot, inverse, delta, gate, several)


@triton.jit
def down(row):
    """Queries down the tile: (BLOCK_M, 1)."""
    return Row(row.pivot[:, None], row.inverse[:, None], row.delta[:, None], row.gate[:, None], row.several[:, None])


@triton.jit
def across(row):
    """Queries across the tile: (1, BLOCK_M)."""
    return Row(row.pivot[None, :], row.inverse[None, :], row.delta[None, :], row.gate[None, :], row.several[None, :])


@triton.jit
def softmax_grad(s, dyv, row, drop, b, h, rows, keys,
                 KEYS: tl.constexpr, EXACT: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """(p, pv, ds, gated) of a tile from its logits and dy vᵀ; pv is p as it multiplied v, after dropout.

    KEYS is the axis of the keys; gated is rowsum(pv * dy vᵀ) along it.  Of a tile that holds ALONE all keys this is
    rowsum(o * dy), so that it gives delta, which equals dp where a row sees one key; row.delta is then -dlse.
    EXACT: hidden entries are 0 even if dy vᵀ, or what a row knows, is not finite.
    """
    hidden = s == float("-inf") if EXACT else None
    dp = unless(hidden, kept(dyv, drop, b, h, rows, keys))
    p = unless(hidden, tl.exp2((s - row.pivot) * C.BASE) * row.inverse)
    gated, delta = tl.sum(p * dp, KEYS), row.delta
    dp *= row.gate
    if C.ALONE:
        delta += row.several * row.gate * tl.expand_dims(gated, KEYS)
        dp *= row.several
    return p, kept(p, drop, b, h, rows, keys), unless(hidden, p * (dp - delta)), gated


@triton.jit
def unless(hidden, x):
    return x if hidden is None else tl.where(hidden, 0.0, x)


@triton.jit
def indices(first, drop, BLOCK: tl.constexpr):
    """first..first + BLOCK - 1 for `kept`, which draws less if the compiler sees that first is a multiple of BLOCK.

    Indices that a pipelined loop has loaded by come out of the loop's step before, where it sees nothing.
    """
    return (first if drop is None else first & -BLOCK) + tl.arange(0, BLOCK)


@triton.jit
def kept(x, drop, b, h, rows, keys):
    """x times 1 / (1 - p) where the probability is kept, 0 where it is dropped: the kernels' `dropout.keep`."""
    if drop is not None:
        keys += drop.first_key
        zero = (rows + keys) * 0
        counter = zero + (keys & ~8), zero + (rows & ~8), zero + h.to(tl.int32), zero + b.to(tl.int32)
        w0, w1, w2, w3 = tl.philox(tl.load(drop.seed), *counter)  # what the compiler finds to be equal it draws once
        later = (rows & 8) != 0
        draw = tl.where((keys & 8) != 0, tl.where(later, w3, w2), tl.where(later, w1, w0))
        x = tl.where((draw >> 8).to(tl.int32) >= drop.threshold, x * drop.factor, 0.0)
    return x


@triton.jit
def tanh(x):
    """tanh to fp32 rounding: a polynomial near 0 (Cephes tanhf), where 1 - 2 / (e^2x + 1) would cancel."""
    z = x * x
    poly = -5.70498872745e-3 * z + 2.06390887954e-2
    poly = poly * z - 5.37397155531e-2
    poly = poly * z + 1.33314422036e-1
    poly = poly * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * z * poly, tl.where(x < 0.0, -far, far))


@triton.jit
def weighed(a, b, AXIS: tl.constexpr, EXACT: tl.constexpr):
    """Sum of a * b along an axis; EXACT: an entry of 0 in a counts as 0 even if b is not finite."""
    return tl.sum(tl.where(a == 0.0, 0.0, a * b) if EXACT else a * b, AXIS)
