"""Is a contender's result right?  Asked before any clock starts; the policy and its budgets are those of testing.py.

Small calls are checked whole against the reference in fp64.  Large ones are checked on two key heads, of the first and
of the last batch entry, with all their query heads, queries and keys: the reference runs over blocks of queries, whose
dk and dv are summed, so that nothing of size M x N exists.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from crossattn_kernels.masks import Mask
from crossattn_kernels.testing import DRAWS, FEW, Call, Row, compare, run, worst

WHOLE = 5e8  # numbers in scores and rows of a call that is checked whole
BLOCK = 2**26  # scores of one block of queries

Results = dict[str, Tensor]


class Piece(NamedTuple):
    """One batch entry and one key head of a call, with the query heads that share it; or, as None, all of it."""

    entry: int
    head: int
    group: int

    def cut(self, t: Tensor) -> Tensor:
        """(1, heads, S, D) of a tensor (B, Hq or Hk, S, D)."""
        return t[self.entry, None]

    def heads(self, name: str) -> slice:
        wide = 1 if name in ("k", "v", "dk", "dv") else self.group
        return slice(self.head * wide, (self.head + 1) * wide)


class Truth(NamedTuple):
    """Exact results of a call, and eager's in its dtype, on the pieces that are checked."""

    call: Call
    pieces: tuple[Piece, ...]  # none: the whole call
    exact: Results
    eager: Results


def truths(draw: Callable[[int], Call]) -> list[Truth]:
    """Of one call, or of several draws if it has a gate of few elements (see `worst` in testing.py)."""
    first = draw(0)
    few = any(t.numel() < FEW for t in first.tensors.values())
    return [truth(draw(i) if i else first) for i in range(DRAWS if few else 1)]


def truth(call: Call) -> Truth:
    with call.dy.device:  # what the reference makes without saying where
        return _truth(call)


def _truth(call: Call) -> Truth:
    q, k, v = (call.tensors[n] for n in "qkv")
    (B, Hq, M, D), (_, Hk, N, Dv) = q.shape, v.shape
    if B * Hq * (M * N + (M + N) * (D + Dv)) <= WHOLE:
        exact, eager = ({n: t for n, t in run(call, "reference", dtype, False).items() if n != "lse"}
                        for dtype in (torch.float64, None))  # fmt: skip
        return Truth(call, (), exact, eager)
    group = Hq // Hk
    pieces = tuple(dict.fromkeys((Piece(0, 0, group), Piece(B - 1, Hk - 1, group))))
    exact, eager = (_stack([_by_blocks(call, p, dtype) for p in pieces]) for dtype in (torch.float64, None))
    return Truth(call, pieces, exact, eager)


def judge(bind: Callable[[Call], Callable[[], tuple[Tensor, ...]]], known: list[Truth], mode: str) -> list[Row]:
    """Errors and budgets of what `bind(call)` computes, over all draws."""
    return worst([_judge_one(bind(t.call)(), t, mode) for t in known])


def _judge_one(results: tuple[Tensor, ...], known: Truth, mode: str) -> list[Row]:
    gradients = ["d" + n for n in known.call.tensors]
    names = {"forward": ["y"], "backward": gradients, "forward+backward": ["y", *gradients]}[mode]
    got = {n: t.detach() for n, t in zip(names, results)}
    got = {n: t for n, t in got.items() if n in known.exact}  # on pieces a gate's gradient is not known
    if known.pieces:
        got = _stack([{n: p.cut(t)[:, p.heads(n)] for n, t in got.items()} for p in known.pieces])
    return compare(got, *({n: kept[n] for n in got} for kept in (known.exact, known.eager)))


def _by_blocks(call: Call, piece: Piece, dtype: torch.dtype | None) -> Results:
    M, N = call.tensors["q"].shape[2], call.tensors["k"].shape[2]
    size = max(1, BLOCK // (piece.group * N))
    blocks = [run(_rows(call, piece, i, min(i + size, M)), "reference", dtype, False) for i in range(0, M, size)]
    summed = {n: torch.stack([b[n] for b in blocks]).to(dtype or torch.float32).sum(0) for n in ("dk", "dv")}
    summed = {n: t.to(blocks[0][n].dtype) for n, t in summed.items()}
    return {n: torch.cat([b[n] for b in blocks], 2) for n in ("y", "dq")} | summed


def _rows(call: Call, piece: Piece, first: int, last: int) -> Call:
    """The piece as queries first..last-1 see it."""
    tensors = {n: piece.cut(t)[:, piece.heads(n)] for n, t in call.tensors.items() if n in "qkv"}
    tensors["q"] = tensors["q"][:, :, first:last]
    rest = {n: t for n, t in call.tensors.items() if n not in "qkv"}
    assert all(t.ndim == 0 for t in rest.values()), "a piece can share a gate only with all others"
    dy = piece.cut(call.dy)[:, piece.heads("q"), first:last]
    return call._replace(tensors=tensors | rest, mask=_mask_rows(call.mask, piece, first, last), dy=dy)


def _mask_rows(mask: Mask | None, piece: Piece, first: int, last: int) -> Mask | None:
    if mask is None:
        return None
    assert mask.keys is None and mask.visible is None, "named workloads have ranges"

    def rows(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x[piece.entry, None] if x.shape[0] > 1 else x
        x = x[:, piece.heads("q")] if x.shape[1] > 1 else x
        return x[:, :, first:last] if x.shape[2] > 1 else x

    return replace(mask, start=rows(mask.start), end=rows(mask.end))


def _stack(pieces: list[Results]) -> Results:
    return {n: torch.cat([p[n] for p in pieces]) for n in pieces[0]}


def same_bits(work: Callable[[], tuple[Tensor, ...]], times: int = 3) -> bool:
    """True when runs after the first give its bits again."""
    first = work()
    return all(torch.equal(a, b) for a, b in itertools.chain(*(zip(first, work()) for _ in range(times))))
