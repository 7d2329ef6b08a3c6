"""Backward: dq by tiles of queries, dk and dv by tiles of keys, or all three by keys where one tile holds them all.

p is made again; partial sums of several programs are fp32 and added in order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels.kernels.bounds import among_pairs, key_bounds, pair, query_range, tile_ranges, whole_queries
from crossattn_kernels.kernels.launch import Launcher
from crossattn_kernels.kernels.partials import by_sequence, fold
from crossattn_kernels.kernels.scores import (
    head_scale,
    key_range,
    logit_grad,
    own_scale,
    scale_sums,
    scores,
    store_scale_sums,
    through_softcap,
    touches,
    whole_range,
)
from crossattn_kernels.kernels.softmax import LOG2E, LOWEST, across, down, indices, load_row, softmax_grad, weighed
from crossattn_kernels.kernels.tiles import (
    all_finite,
    anew,
    dot,
    dot_in_pairs,
    finite,
    load_lasting,
    load_rows,
    load_vec,
    program,
    share,
    store_rows,
    store_vec,
)
from crossattn_kernels.kernels.views import (
    QuerySums,
    Rows,
    TileRanges,
    as_bytes,
    constant,
    dropout_view,
    inputs_view,
    logits_view,
    rows_view,
    tanh_views,
    view,
)
from crossattn_kernels.problem import Gradients, Inputs, Options
from crossattn_kernels.tuning import Config, dk_dv_apart


@triton.jit
def delta_kernel(o, do, lse, high, dlse, pivot, delta, Hq, M, C: tl.constexpr):
    """delta = rowsum(o * do) - dlse for BLOCK_M queries; with a gate on whole rows y and dy give the same.

    fp32 tensors are summed in fp64: dp - delta cancels, and this kernel waits for memory anyway.  The pivot is lse in
    base 2 or, if it is given, the maximum of the logits; of a row that saw nothing it is finite, as inf - inf is NaN.
    """
    tile, b, h = program(tl.cdiv(M, C.BLOCK_M), Hq)
    rows, dv = tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M), tl.arange(0, C.BLOCK_DV)
    exact: tl.constexpr = tl.float64 if o.ptr.dtype.element_ty == tl.float32 else tl.float32
    o_tile, do_tile = load_rows(o, b, h, rows, dv, M, C.DV).to(exact), load_rows(do, b, h, rows, dv, M, C.DV).to(exact)
    total = tl.sum(o_tile * do_tile, 1).to(tl.float32)
    if dlse is not None:
        total -= load_vec(dlse, b, h, rows, M, 0.0)
    store_vec(delta, b, h, rows, M, total)
    known = load_vec(lse, b, h, rows, M, 0.0) * LOG2E if high is None else load_vec(high, b, h, rows, M, 0.0)
    store_vec(pivot, b, h, rows, M, tl.maximum(known, LOWEST, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def dq_kernel(q, k, v, do, sums, known, logits, drop, batches, splits, Hq, M, N, C: tl.constexpr):
    """The sums over keys for BLOCK_M queries of one (b, h); for dq also over the `batches` that share q.

    With several splits a program takes its share of the keys, and stores partial sums.
    """
    tile, rest, h = program(tl.cdiv(M, C.BLOCK_M), Hq)
    split, shared = rest % splits, rest // splits
    entries = tl.num_programs(0) // (tl.cdiv(M, C.BLOCK_M) * Hq * splits)
    rows = tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    d = tl.arange(0, C.BLOCK_D)
    q_tile = load_lasting(q, shared, h, rows, d, M, C.D)  # (BLOCK_M, BLOCK_D)
    scale = head_scale(logits, shared, h)
    operands = k, v, do, sums, known, drop, M, N
    place = shared, entries, batches, split, splits, h
    # beside random numbers two runs do not fit everywhere
    TRIES: tl.constexpr = C.SIFTS & ((drop is None) | ((C.BLOCK_D <= 128) & (logits.softcap is None)))
    acc = dq_entries(q_tile, operands, logits, scale, place, rows, C.BLOCK_N, not TRIES, C)
    if TRIES:
        if not all_finite(acc):  # perhaps because of what is hidden
            narrow: tl.constexpr = C.BLOCK_M < 64 or C.BLOCK_N < 32 or C.BLOCK_D > 128
            FEW: tl.constexpr = C.BLOCK_N if C.ALONE else (16 if narrow else 32)
            acc = dq_entries(q_tile, operands, logits, scale, place, anew(rows, M), FEW, True, C)
    store_rows(sums.dq, split * entries + shared, h, anew(rows, M), d, M, C.D, acc * scale)


@triton.jit
def dq_entries(q_tile, operands, logits, scale, place, rows, STEP: tl.constexpr, AGAIN: tl.constexpr, C: tl.constexpr):
    """dq without its scale, over all entries that share q; the sums for gate and scale of each are stored.

    Where that is not exact without, hidden values are looked at only AGAIN, in the run that one of them has caused.
    """
    k, v, do, sums, known, drop, M, N = operands
    shared, entries, batches, split, splits, h = place
    acc = tl.zeros([C.BLOCK_M, C.BLOCK_D], tl.float32)
    # at D = 256 a second loop does not fit the registers, and the end of the keys is but one selection an entry
    ONE_LOOP: tl.constexpr = (C.EDGE_STAGES > 0) & (C.BLOCK_D > 128) & (not C.HIDES)
    for entry in tl.range(0, batches):
        b = shared + entry
        do_tile = load_lasting(do, b, h, rows, tl.arange(0, C.BLOCK_DV), M, C.DV)  # (BLOCK_M, BLOCK_DV)
        tiles = q_tile, do_tile, down(load_row(known, b, h, rows, M, C))
        none = tl.zeros([C.BLOCK_M], tl.float32)
        found = acc, none, (none, none, none)
        lo, hi = key_range(logits.mask, b, h, rows, M, N)
        lo = lo // C.BLOCK_N * C.BLOCK_N
        if splits > 1:  # 1 is known when the kernel is compiled, and then so is lo where nothing is masked
            lo, hi = share(lo, hi, split, splits, C.BLOCK_N)
        first, last = whole_range(logits, b, h, rows, lo, hi, M, N, C)
        if ONE_LOOP:
            first, last = lo, lo
        elif not C.SIFTS:
            for key in tl.range(first, last, C.BLOCK_N):
                found = dq_tile(found, tiles, operands, logits, scale, b, h, rows, key, STEP, True, False, C)
        if C.EDGE_STAGES > 0:
            # the others, on both sides; a pipeline for the last one alone would make ptxas serialise all products
            STAGES: tl.constexpr = 1 if STEP < C.BLOCK_N or not (C.HIDES or ONE_LOOP) else None
            for i in tl.range(lo, hi - (last - first), STEP, num_stages=STAGES):
                key = i + tl.where(i < first, 0, last - first)
                cols = (key + tl.arange(0, STEP))[None, :]
                if touches(logits.mask, b, h, rows[:, None], cols, M, N, C.SKIPS, C):
                    found = dq_tile(found, tiles, operands, logits, scale, b, h, rows, key, STEP, False, AGAIN, C)
        acc = found[0]
        at_split = split * entries * batches + b
        if sums.gate is not None:
            store_vec(sums.gate, at_split, h, rows, M, found[1])
        if sums.scale is not None:
            store_scale_sums(sums.scale, at_split, h, rows, M, found[2])
    return acc


@triton.jit
def dq_tile(found, tiles, operands, logits, scale, b, h, rows, key,
            STEP: tl.constexpr, WHOLE: tl.constexpr, AGAIN: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """(dq without its scale, sum for the gate, sums for the scale) with one tile of keys folded in."""
    acc, gated, scaled = found
    q_tile, do_tile, row = tiles
    k, v, do, sums, known, drop, M, N = operands
    EXACT: tl.constexpr = C.HIDES and AGAIN and not WHOLE
    hk, rows, keys = h // C.GROUP, rows[:, None], key + tl.arange(0, STEP)
    k_tile = load_rows(k, b, hk, keys, tl.arange(0, C.BLOCK_D), N, C.D, WHOLE)  # (STEP, BLOCK_D)
    v_tile = load_rows(v, b, hk, keys, tl.arange(0, C.BLOCK_DV), N, C.DV, WHOLE)  # (STEP, BLOCK_DV)
    qk = dot(q_tile, k_tile.T, None, C.TF32)  # (BLOCK_M, STEP)
    dyv = dot_in_pairs(do_tile, v_tile.T, C.TF32)
    s = scores(qk, logits, scale, b, h, rows, keys[None, :], M, N, C, WHOLE, False, EXACT)
    drawn = indices(key, drop, STEP)[None, :]
    p, pv, ds = softmax_grad(s, dyv, row, drop, b, h, rows, drawn, 1, EXACT, C)
    if sums.gate is not None:
        gated += weighed(pv, dyv, 1)
    if sums.scale is not None:
        scaled = scale_sums(scaled, p, ds, qk, logits, scale, b, h, rows, M, 1)
    ds = through_softcap(logit_grad(ds, logits, b, h, rows, M), qk, logits, scale)
    k_tile = finite(k_tile) if EXACT else k_tile
    return dot(ds.to(k_tile.dtype), k_tile, acc, C.TF32), gated, scaled


@triton.jit
def dkv_kernel(q, k, v, do, dk, dv, sums, known, ranges, logits, drop, batches, splits, Hq, M, N, C: tl.constexpr):
    """dv = pᵀ do and dk = scale * dsᵀ q for BLOCK_N keys of one (b, key head).

    If these are all keys, what is summed over them can be had as well.  dk and dv are summed over the GROUP query heads
    and the `batches` that share the keys; with several splits a program takes its share of the queries and stores
    partial sums.  sᵀ = k qᵀ is computed as such: no product takes a transposed accumulator.  dk or dv may be absent.
    """
    tile, rest, hk = program(tl.cdiv(N, C.BLOCK_N), Hq // C.GROUP)
    split, shared = rest % splits, rest // splits
    keys = tile * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    d, e = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_DV)
    tiles = load_lasting(k, shared, hk, keys, d, N, C.D), load_lasting(v, shared, hk, keys, e, N, C.DV)
    pairs = batches * C.GROUP  # (b, h) that read these keys
    readers = shared, hk, pairs
    lo, hi = query_range(ranges, shared, hk, pairs, keys, M, C)
    lo, hi = share(lo, hi, split, splits, C.BLOCK_M)
    operands = q, do, sums, known, drop, M, N
    found = dkv_init(dk, dv, C)
    # a key past the end has rows of its own, which are not stored: it is hidden from sums over the keys only
    SUMS: tl.constexpr = C.ALONE | (sums.dq is not None)
    EDGES: tl.constexpr = (C.EDGE_STAGES > 0) & (C.HIDES | SUMS)
    first, last = lo, hi  # queries that see all of these keys
    if EDGES:
        first, last = lo, lo
        if not (SUMS | C.SIFTS):
            first, last = whole_queries(ranges, shared, hk, pairs, tl.minimum(keys, N - 1), lo, hi, C)
        # of what is hidden and not finite something would reach dk, if not dv; of tiles also dq.  More does not fit
        FITS: tl.constexpr = C.HIDES & (C.BLOCK_D <= 64) & (dk is not None) & (sums.dq is not None)
        TRIES: tl.constexpr = FITS | (C.SIFTS & (not SUMS))
        clean = sound(tiles) if TRIES & (sums.dq is not None) else tl.full([], 1, tl.int1)
        span, gap = (lo, hi), (first, last)
        found = dkv_tiles(
            found, tiles, operands, logits, ranges, readers, keys, span, gap, C.BLOCK_M, False, not TRIES, C
        )
        if TRIES:
            if not (clean & sound(found)):
                FEW: tl.constexpr = 16 if C.BLOCK_N < 64 or C.BLOCK_M < 64 else 32
                again = anew(keys, N)
                tiles = load_lasting(k, shared, hk, again, d, N, C.D), load_lasting(v, shared, hk, again, e, N, C.DV)
                found = dkv_init(dk, dv, C)
                found = dkv_tiles(
                    found, tiles, operands, logits, ranges, readers, again, span, gap, FEW, False, True, C
                )
    if not (EDGES & (SUMS | C.SIFTS)):
        span, gap = (first, last), (first, first)
        found = dkv_tiles(found, tiles, operands, logits, ranges, readers, keys, span, gap, C.BLOCK_M, True, False, C)
    entries = tl.num_programs(0) // (tl.cdiv(N, C.BLOCK_N) * (Hq // C.GROUP) * splits)
    keys = anew(keys, N)
    if dk is not None:
        store_rows(dk, split * entries + shared, hk, keys, d, N, C.D, found[0] * logits.scale)
    if dv is not None:
        store_rows(dv, split * entries + shared, hk, keys, e, N, C.DV, found[1])


@triton.jit
def dkv_init(dk, dv, C: tl.constexpr):
    """(dk, dv), of one column where there is no sum."""
    return (
        tl.zeros([C.BLOCK_N, C.BLOCK_D if dk is not None else 1], tl.float32),
        tl.zeros([C.BLOCK_N, C.BLOCK_DV if dv is not None else 1], tl.float32),
    )


@triton.jit
def sound(pair):
    """Whether two tiles are finite: a scalar."""
    return all_finite(pair[0]) & all_finite(pair[1])


@triton.jit
def dkv_tiles(found, tiles, operands, logits, ranges, readers, keys, span, gap,
              STEP: tl.constexpr, WHOLE: tl.constexpr, AGAIN: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """(dk, dv) with the queries of all readers folded in that lie in `span` and not in `gap`, both [first, last).

    Where that is not exact without, hidden values are looked at only AGAIN, in the run that one of them has caused.
    """
    q, do, sums, known, drop, M, N = operands
    shared, hk, pairs = readers
    # one loop over all readers and their queries, in which ptxas would serialise products that make dq too
    outer, inner = (pairs, 1) if C.ALONE | (sums.dq is not None) else (1, pairs)
    turns = tl.cdiv(span[1] - span[0] - (gap[1] - gap[0]), STEP) * inner
    STAGES: tl.constexpr = 1 if STEP < C.BLOCK_M else None
    for j in tl.range(0, outer):
        for i in tl.range(0, turns, num_stages=STAGES):
            b, h = pair(j + i % inner, shared, hk, C)
            query = span[0] + i // inner * STEP
            query += tl.where(query < gap[0], 0, gap[1] - gap[0])
            rows = (query + tl.arange(0, STEP))[None, :]
            if WHOLE or among_pairs(ranges, b, h, query, keys, C):
                if WHOLE or touches(logits.mask, b, h, rows, keys[:, None], M, N, sums.dq is None, C):
                    found = dkv_tile(found, tiles, operands, logits, b, h, query, keys, STEP, WHOLE, AGAIN, C)
    return found


@triton.jit
def dkv_tile(found, tiles, operands, logits, b, h, query, keys,
             STEP: tl.constexpr, WHOLE: tl.constexpr, AGAIN: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """(dk, dv) with one tile of queries folded in, whose sums over the keys are stored."""
    dk_acc, dv_acc = found
    k_tile, v_tile = tiles
    q, do, sums, known, drop, M, N = operands
    EXACT: tl.constexpr = C.HIDES and AGAIN
    rows, keys = query + tl.arange(0, STEP), keys[:, None]
    d, scale = tl.arange(0, C.BLOCK_D), head_scale(logits, b, h)
    q_tile = load_rows(q, b, h, rows, d, M, C.D)  # (STEP, BLOCK_D)
    do_tile = load_rows(do, b, h, rows, tl.arange(0, C.BLOCK_DV), M, C.DV)  # (STEP, BLOCK_DV)
    kq = dot(k_tile, q_tile.T, None, C.TF32)  # (BLOCK_N, STEP)
    vdy = dot_in_pairs(v_tile, do_tile.T, C.TF32)
    row = across(load_row(known, b, h, rows, M, C))  # not before the products, where it would take their registers
    s = scores(kq, logits, scale, b, h, rows[None, :], keys, M, N, C, WHOLE, False, EXACT)
    drawn = indices(query, drop, STEP)[None, :]
    p, pv, ds = softmax_grad(s, vdy, row, drop, b, h, drawn, keys, 0, EXACT, C)
    if sums.scale is not None:
        no = tl.zeros([STEP], tl.float32)
        scaled = scale_sums((no, no, no), p, ds, kq, logits, scale, b, h, rows[None, :], M, 0)
        store_scale_sums(sums.scale, b, h, rows, M, scaled)
    ds = through_softcap(logit_grad(ds, logits, b, h, rows[None, :], M), kq, logits, scale)
    ds *= own_scale(logits, b, h)  # and those of all heads are multiplied as sums
    if sums.dq is not None:
        if sums.gate is not None:
            store_vec(sums.gate, b, h, rows, M, weighed(pv, vdy, 0))
        finite_k = finite(k_tile) if EXACT else k_tile
        dq = dot(finite_k.T, ds.to(k_tile.dtype), None, C.TF32)  # (BLOCK_D, STEP)
        store_rows(sums.dq, b, h, rows, d, M, C.D, (dq * logits.scale).T)
    if dv_acc.shape[1] > 1:
        dv_acc = dot((pv * row.gate).to(do_tile.dtype), do_tile, dv_acc, C.TF32)
    if dk_acc.shape[1] > 1:
        dk_acc = dot(ds.to(q_tile.dtype), q_tile, dk_acc, C.TF32)
    return dk_acc, dv_acc


class Backward:
    """One backward, of a problem that is not empty: what its kernels share, and their launches."""

    def __init__(
        self,
        dy: Tensor,
        dlse: Tensor | None,
        x: Inputs,
        options: Options,
        o: Tensor,
        lse: Tensor,
        state: Tensor,
        filled: Tensor | None,
        wanted: Gradients,
    ) -> None:
        self.x, self.options, self.wanted = as_bytes(x), options, wanted
        self.filled = None if filled is None else filled.view(torch.uint8)
        self.dy, self.dlse, self.o, self.lse, self.state = dy, dlse, o, lse, state
        # a gate on whole rows is applied inside the kernels, one that varies along Dv here
        self.do = dy if not x.gate_varies else (self.gate * dy).to(dy.dtype)
        self.do = self.do if self.do.stride(3) == 1 else self.do.contiguous()
        self.launch = Launcher.of(self.x, options, (self.do, dlse, o, lse, state, self.filled, *map(bool, wanted)))
        streams = self.launch.plan.backward_schedule == "short queries"  # all keys, whatever is hidden
        self.bounds = None if streams else key_bounds(self.launch, self.x)

    @cached_property
    def gate(self) -> Tensor:
        assert self.x.gate is not None
        return torch.tanh(self.x.gate.float())

    @cached_property
    def pivot_and_delta(self) -> tuple[Tensor, Tensor]:
        (B, Hq, M), high = self.lse.shape, None if self.launch.problem.by_lse else self.state[:, 0]
        pivot, delta = torch.empty_like(self.lse), torch.empty_like(self.lse)

        def arguments(o: Tensor, do: Tensor, lse: Tensor, *rows: Tensor | None) -> tuple:
            tiles = triton.cdiv(M, self.launch.plan.rows.BLOCK_M)
            return tiles * B * Hq, rows_view(o), rows_view(do), view(lse), *map(view, rows), Hq, M

        self.launch(delta_kernel, arguments, self.o, self.do, self.lse, high, self.dlse, pivot, delta)
        return pivot, delta

    def run_kernel(
        self, kernel: Any, config: Config, arguments: Callable[..., tuple], *tensors: Tensor | None, label: str = ""
    ) -> None:
        """Launch a kernel that makes p and ds: `arguments` gets its own tensors as they are and what all of these
        kernels take as (q, k, v, do), known, logits and dropout."""
        known = self.known(config)
        first, last = len(known), len(known) + len(self.x)  # of the inputs
        gate = None if self.x.gate is None or self.x.gate_varies else self.gate

        def all_arguments(do: Any, gate: Any, filled: Any, bounds: Any, *rest: Any) -> tuple:
            x, gates = Inputs(*rest[first:last]), tanh_views(gate, *self.lse.shape)
            logits, drop = logits_view(x, self.options, filled, bounds), dropout_view(x, self.options)
            rows = Rows(*gates, *map(view, rest[:first]))
            return arguments((*inputs_view(x), rows_view(do)), rows, (logits, drop), *rest[last:])

        shared = self.do, gate, self.filled, self.bounds
        self.launch(kernel, all_arguments, *shared, *known, *self.x, *tensors, label=label)

    def known(self, config: Config) -> tuple[Tensor | None, ...]:
        """What a kernel with these tiles learns of every query: the fields of Rows from dlse on."""
        by_lse, problem = self.launch.problem.by_lse, self.launch.problem
        inverse = self.state[:, 1]
        if problem.N > config.BLOCK_N or problem.chunk:
            return self.dlse, *self.pivot_and_delta, None if by_lse else inverse, None, None
        near = self.lse if by_lse else self.state[:, 0]
        lone = problem.N == 1 or problem.masked or problem.biased
        return self.dlse, None, None, None if by_lse else inverse, near, inverse if lone else None

    def by_queries(self) -> dict[str, Tensor | None]:
        (B, Hq, M, N), config, entries = self.x.sizes, self.launch.plan.dq, self.x.q.shape[0]

        def arguments(common: tuple, known: Rows, logits: tuple, *sums: Any) -> tuple:
            programs = triton.cdiv(M, config.BLOCK_M) * config.splits * entries * Hq
            return programs, *common, sums_view(*sums), known, *logits, B // entries, config.splits, Hq, M, N

        sums = self.query_sums(entries, config.splits)
        self.run_kernel(dq_kernel, config, arguments, *sums[:3])
        return self.summed(sums)

    def by_keys(self, sums: QuerySums | None = None) -> Gradients:
        """dk and dv and, where a tile holds all keys, `sums`."""
        x, (B, Hq, M, N), config = self.x, self.x.sizes, self.launch.plan.dkv
        entries, Hk = x.k.shape[:2]

        def arguments(common: tuple, known: Rows, logits: tuple, dk: Any, dv: Any, ranges: Any, *sums: Any) -> tuple:
            spread = None if ranges is None else ranges_view(ranges, x)
            return (
                triton.cdiv(N, config.BLOCK_N) * config.splits * entries * Hk,
                *common, rows_view(dk), rows_view(dv), sums_view(*sums), known, spread, *logits,
                B // entries, config.splits, Hq, M, N,
            )  # fmt: skip

        ranges = None if sums else tile_ranges(self.launch, x, self.options, self.filled, self.bounds)
        dk = by_sequence(x.k, config.splits) if self.wanted.k else None
        dv = by_sequence(x.v, config.splits) if self.wanted.v else None
        whole = self.launch.plan.backward_schedule == "short keys" or not dk_dv_apart(self.launch.problem)
        for label, outputs in {"": (dk, dv)}.items() if whole else {"k": (dk, None), "v": (None, dv)}.items():
            if outputs != (None, None):
                self.run_kernel(
                    dkv_kernel, config, arguments, *outputs, ranges, *(sums or QuerySums())[:3], label=label
                )
        return Gradients(k=self.folded(dk, x.k, "k"), v=self.folded(dv, x.v, "v"))

    def query_sums(self, entries: int, splits: int = 1) -> QuerySums:
        """Room for the sums over keys, with several splits for those of each; that of dq is over `entries` of q."""
        (B, Hq, M), gate = self.lse.shape, self.wanted.gate and not self.x.gate_varies
        return QuerySums(
            by_sequence(self.x.q, splits * entries // self.x.q.shape[0]),
            self.lse.new_empty(splits * B, Hq, M) if gate else None,
            self.lse.new_empty(splits * B, 3, Hq, M) if self.wanted.scale else None,
        )

    def summed(self, sums: QuerySums) -> dict[str, Tensor | None]:
        """dq, dgate and dscale; sums over rows are fp32, the sum of them is not, as terms of either sign cancel."""
        x = self.x
        found: dict[str, Tensor | None] = dict(q=self.folded(sums.dq, x.q, "q"))
        if sums.gate is not None:
            found["gate"] = self.through_tanh(sums.gate.unflatten(0, (-1, x.sizes[0]))[..., None])
        if sums.scale is not None and x.scale is not None:
            parts = sums.scale.unflatten(0, (-1, x.sizes[0]))
            dsx, ds, px = parts.sum(0, dtype=torch.float64).unbind(1)  # (B, Hq, M)
            error = (0 if self.dlse is None else self.dlse) - ds
            error = torch.where(px == 0, 0, error * px)  # a row that sees nothing, whatever its dlse
            found["scale"] = (dsx + error).sum(-1).sum_to_size(x.scale.shape)
        return found

    def folded(self, parts: Tensor | None, like: Tensor, name: str) -> Tensor | None:
        """The gradient called `name`, of this tensor, from its partial sums, if there are any."""
        if parts is None or parts.shape[0] == like.shape[0]:
            return parts
        return fold(self.launch, parts, by_sequence(like), name)

    def through_tanh(self, dt: Tensor) -> Tensor:
        """Gradient of the raw gate from parts (parts, B, Hq, M, Dv or 1) of that of its tanh: summed, in fp64."""
        shared = [axis + 1 for axis, n in enumerate(self.gate.shape) if n == 1]
        total = dt.sum([0, *shared], keepdim=True, dtype=torch.float64)[0]
        return torch.ops.aten.tanh_backward(total, self.gate.double())

    def dgate_by_channel(self) -> Tensor:
        return self.through_tanh((self.dy.float() * self.o)[None])


def ranges_view(ranges: Tensor, x: Inputs) -> TileRanges:
    """Of (4, 1|B, 1|Hq, tiles)."""
    B, Hq, _, _ = x.sizes
    (entries, Hk), (b, h) = x.k.shape[:2], ranges.shape[1:3]
    varying = (b > 1 and entries < B) or (h > 1 and Hk < Hq)
    return TileRanges(view(ranges, 4, B, Hq, ranges.shape[3]), constant(int(varying)))


def sums_view(dq: Tensor | None, gate: Tensor | None, scale: Tensor | None) -> QuerySums:
    return QuerySums(rows_view(dq), view(gate), view(scale))
