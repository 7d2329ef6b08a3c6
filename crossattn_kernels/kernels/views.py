"""What crosses from the host to a kernel.  A field that is None vanishes at compile time, with the code behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels import dropout
from crossattn_kernels.problem import Inputs, Options

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def constant(n: Any) -> Any:
    """A number that the kernel is compiled for; the interpreter takes it as it is."""
    return n if INTERPRETED.value else tl.constexpr(n)


MODERATE = 64.0  # a softcap whose tanh may be off by 2^-22 in 16 bits: the logit then is by 2^-16

# Triton 3.6 forgets the constants in a tuple that comes after a None, unless a constant comes last
LAST = constant(1)


class View(NamedTuple):
    """A strided tensor; a broadcast dimension has stride 0.

    A last dimension of stride 1 has no entry in `strides`: indices along it need no product and stay int32.
    Strides are in units of `unit` elements: where all are multiples of 16 bytes, the compiler is told so and moves 16
    bytes at a time.
    """

    ptr: Any
    strides: tuple
    unit: Any = constant(1)


class MaskView(NamedTuple):
    """Which keys a query may see."""

    start: View | None = None  # (B, Hq, M)
    end: View | None = None  # (B, Hq, M)
    keys: View | None = None  # (B, N)
    bounds: View | None = None  # (4, B): what `key_bounds_kernel` finds of keys
    visible: View | None = None  # (B, Hq, query groups, key groups)
    filled: View | None = None  # (B, Hq, M): nonzero where a row sees every key after all
    query_group: Any = 1  # constant
    key_group: Any = 1
    UNIFORM: Any = 0  # constant, 1 if all logits of a row that is filled are 0


class Logits(NamedTuple):
    """How the product q kᵀ becomes a logit."""

    scale: float
    head_scale: View | None  # (B, Hq), multiplies scale
    softcap: float | None
    bias: View | None  # (B, Hq, M, N)
    mask: MaskView
    POSITIVE: Any = constant(0)  # constant, 1 if scale is above 0 and no other multiplies it
    FINE: Any = constant(1)  # constant, 0 if an error of 2^-22 in the tanh of the softcap does not show


class Dropout(NamedTuple):
    """Draws below `threshold` of 2^24 are dropped, the rest is multiplied by `factor`."""

    seed: Tensor
    threshold: int
    factor: float
    first_key: Any  # a constant if it is 0, so that the compiler knows bit 3 of a key


def view(t: Tensor | None, *shape: int) -> Any:
    """`t` broadcast to `shape` (as it is without one)."""
    return None if t is None else strided(t, t.expand(shape or t.shape).stride())


def rows_view(t: Tensor | None, *shape: int) -> Any:
    """The same for a tensor whose rows are loaded by tiles."""
    return None if t is None else strided(t, t.expand(shape or t.shape).stride(), unit=16 // t.element_size())


def strided(t: Tensor, steps: Sequence[int], unit: int = 1) -> View:
    """A view with these strides, which are counted by `unit` if all are multiples of it and elements lie together."""
    *outer, last = steps
    if last != 1:
        outer, unit = list(steps), 1
    unit = unit if all(n % unit == 0 for n in outer) else 1
    # what Triton would make a constant of is one
    return View(t, tuple(constant(1) if n == unit else n // unit for n in outer), constant(unit))


def as_bytes(x: Inputs) -> Inputs:
    """The tensors as kernels take them: bits are bytes."""
    if x.keys is x.visible is None:
        return x
    bits = dict(keys=x.keys, visible=x.visible)
    return x._replace(**{name: t.view(torch.uint8) for name, t in bits.items() if t is not None})


def inputs_view(x: Inputs) -> tuple[View, View, View]:
    """q, k and v with a batch of B each."""
    B = x.sizes[0]
    return tuple(rows_view(t, B, *t.shape[1:]) for t in (x.q, x.k, x.v))


def logits_view(x: Inputs, options: Options, filled: Tensor | None, bounds: Tensor | None) -> Logits:
    B, Hq, M, N = x.sizes
    groups = (-(-M // options.query_group), -(-N // options.key_group))
    mask = MaskView(
        view(x.start, B, Hq, M),
        view(x.end, B, Hq, M),
        view(x.keys, B, N),
        view(bounds, 4, B),
        view(x.visible, B, Hq, *groups),
        view(filled, B, Hq, M),
        constant(options.query_group),
        constant(options.key_group),
        constant(int(filled is not None and options.empty_rows == "uniform")),
    )
    scale = 1.0 if x.scale is not None else options.scale
    positive = constant(int(x.scale is None and scale > 0))
    fine = constant(int(x.q.element_size() > 2 or options.softcap > MODERATE))
    return Logits(scale, view(x.scale, B, Hq), options.softcap or None, view(x.bias, B, Hq, M, N), mask, positive, fine)


def row_gate_view(x: Inputs) -> View | None:
    """A gate that is one number a row, as (B, Hq, M)."""
    if x.gate is None or x.gate_varies:
        return None
    return strided(x.gate, x.gate.expand(*x.sizes[:3], 1).stride()[:3])


def tanh_views(t: Tensor | None, B: int, Hq: int, M: int) -> tuple[View | None, View | None]:
    """The tanh of such a gate, (1|B, 1|Hq, 1|M, 1), as (B, Hq, M), or as (B, Hq) if it is one number a head."""
    if t is None:
        return None, None
    steps = t.expand(B, Hq, M, 1).stride()
    return (strided(t, steps[:3]), None) if t.shape[2] > 1 else (None, strided(t, steps[:2]))


def dropout_view(x: Inputs, options: Options) -> Dropout | None:
    if not options.dropout_p:
        return None
    assert x.seed is not None
    first = options.first_key or constant(0)
    return Dropout(x.seed, dropout.threshold(options.dropout_p), 1 / (1 - options.dropout_p), first)


class Rows(NamedTuple):
    """What the backward knows of every query, each (B, Hq, M)."""

    gate: View | None  # tanh of a gate that is one number a row
    head_gate: View | None  # (B, Hq): of one that is one number a head
    dlse: View | None
    pivot: View | None  # p = 2^((s - pivot) * BASE) * inverse; without it a tile holds all keys
    delta: View | None  # rowsum(o * do) - dlse, as there is a pivot
    inverse: View | None  # 1 without it
    near: View | None  # where a tile holds all keys the pivot before it is made finite, and natural if it is lse
    share: View | None  # there, 1 / sum of 2^((s - maximum) * BASE), if it may be 1: of the only key that a row sees
    last: Any = LAST


class TileRanges(NamedTuple):
    """Keys that a tile of queries may see and those that it sees whole, by its ranges: (4, B, Hq, tiles)."""

    found: View
    VARY: Any  # constant, 1 or 0: whether they differ among the (b, h) that share keys


class Result(NamedTuple):
    """What the forward writes, each (B, Hq, M, ...), and the gates it applies on the way."""

    y: View
    o: View | None
    lse: View
    state: View  # (B, 2, Hq, M): maximum of the logits, 1 / sum of 2^((s - maximum) * BASE)
    row_gate: View | None
    gate: View | None  # one that varies along Dv
    last: Any = LAST


class Partial(NamedTuple):
    """Softmax states of the splits, each (splits * B, Hq, M, ...), fp32."""

    m: View
    l: View
    acc: View


class QuerySums(NamedTuple):
    """Sums over the keys, or over those of a split, for every query: (splits * B, Hq, M, ...)."""

    dq: Any = None  # scale * ds k
    gate: Any = None  # rowsum(p * dy vᵀ) = rowsum(dy * o)
    scale: Any = None  # what `scale_sums` adds up: (splits * B, 3, Hq, M)
    last: Any = LAST


class Constants(NamedTuple):
    """What a kernel is compiled for."""

    GROUP: int  # query heads a key head
    BASE: float  # exponentials are 2^(s * BASE): logits are natural beside a bias, as finfo.min * log2(e) is -inf
    HIDES: bool  # some query may not see some key
    SIFTS: bool  # an entry inside the range of its query may be hidden or changed: no tile is known to be seen whole
    FULL: bool  # no tile of keys goes past the end
    ALONE: bool  # one tile holds all keys of the softmax
    BY_LSE: bool  # p of the backward comes from lse, without the sum of the softmax
    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_M: int
    BLOCK_N: int
    TF32: bool  # for fp32 products; otherwise IEEE
    EDGE_STAGES: int  # of the load pipeline of the forward's loop over tiles not seen whole; 0 where there are none
    SKIPS: bool  # a tile of which no query sees any key is left out where only loading its mask tells
    PACKED: bool  # a tile of queries holds all query heads of a key head
    TMA: bool  # tiles of keys are loaded through tensor descriptors
