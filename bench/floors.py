"""The least time that a call can take, from what it must compute and move and from rates measured in the same run.

    flops   forward 4 B Hq M N D, backward 10 B Hq M N D      2 and 5 products of 2 M N D each (for Dv = D)
    bytes   forward q, k, v read, y and lse written; backward q, k, v, y, dy, lse read, dq, dk, dv written; once each
    exps    B Hq M N, in both: the backward recomputes p

A mask leaves the visible pairs of M N, and of k and v the keys that some query sees (dk, dv are written whole).
floor = max(flops / rate, bytes / rate, exps / rate): as if all three overlapped completely.
"""

from __future__ import annotations

from typing import NamedTuple

from crossattn_kernels.problem import matmul_flops
from crossattn_kernels.testing import Call, Case

MODES = ("forward", "backward", "forward+backward")


class Cost(NamedTuple):
    """What a call must do; or, per second, what a machine can do."""

    flops: float
    bytes: float
    exps: float


class Floor(NamedTuple):
    """Least seconds, and what sets them: "flops", "bytes" or "exps"."""

    seconds: float
    limit: str


class Visible(NamedTuple):
    """Share of the (query, key) pairs that may be seen, and of the keys that some query sees."""

    pairs: float
    keys: float


ALL = Visible(1.0, 1.0)


def visible(call: Call) -> Visible:
    """Of the drawn mask.  Quadratic: one dense mask per entry that differs."""
    if call.mask is None:
        return ALL
    M, N = call.tensors["q"].shape[2], call.tensors["k"].shape[2]
    dense = call.mask.as_dense(*call.mask.lead(), M, N)
    return Visible(dense.double().mean().item(), dense.any(2).double().mean().item())


def cost(c: Case, mode: str, seen: Visible = ALL) -> Cost:
    """Of one pass, "forward" or "backward"."""
    Dv = c.Dv or c.D
    queries = c.B * c.Hq * c.M * (c.D + Dv) * c.dtype.itemsize  # q and y, or dq and dy
    keys = c.B * c.Hk * c.N * (c.D + Dv) * c.dtype.itemsize  # k and v, or dk and dv
    lse = 4 * c.B * c.Hq * c.M
    return Cost(
        flops=seen.pairs * matmul_flops(c.B, c.Hq, c.M, c.N, c.D, Dv, mode),
        bytes=lse + (queries + seen.keys * keys if mode == "forward" else 2 * queries + (seen.keys + 1) * keys),
        exps=seen.pairs * c.B * c.Hq * c.M * c.N,
    )


def passes(mode: str) -> tuple[str, ...]:
    return ("forward", "backward") if mode == "forward+backward" else (mode,)


def total(c: Case, mode: str, seen: Visible = ALL) -> Cost:
    """Of all passes of a mode."""
    return Cost(*map(sum, zip(*(cost(c, one, seen) for one in passes(mode)))))


def floor(c: Case, mode: str, rates: Cost, seen: Visible = ALL) -> Floor:
    """The passes of a mode follow each other: their floors add up, and the longer one names the limit."""
    each = []
    for one in passes(mode):
        seconds = {n: amount / rate for n, amount, rate in zip(Cost._fields, cost(c, one, seen), rates)}
        limit = max(seconds, key=lambda n: seconds[n])
        each.append(Floor(seconds[limit], limit))
    return Floor(sum(f.seconds for f in each), max(each).limit)
