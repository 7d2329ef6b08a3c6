"""Backward for few queries: they stay on chip, those of all heads of a key head, while keys stream past."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels.kernels.backward import Backward, sums_view
from crossattn_kernels.kernels.partials import by_sequence
from crossattn_kernels.kernels.scores import (
    head_scale,
    key_range,
    logit_grad,
    ranged,
    scale_sums,
    scores,
    store_scale_sums,
    through_softcap,
    whole_range,
)
from crossattn_kernels.kernels.softmax import across, indices, load_row, softmax_grad
from crossattn_kernels.kernels.tiles import (
    dot,
    dot_in_pairs,
    finite,
    load_lasting,
    load_rows,
    packed_program,
    past,
    share,
    store_rows,
    store_vec,
)
from crossattn_kernels.kernels.views import Rows, rows_view
from crossattn_kernels.problem import Gradients


@triton.jit
def short_queries_kernel(q, k, v, do, dk, dv, sums, known, logits, drop, splits, B, Hq, M, N, C: tl.constexpr):
    """dk and dv of one split of the keys of one (b, key head), and the sums over these keys for all its queries."""
    split, b, hk, h, rows = packed_program(splits, Hq, M, C)
    d, e = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_DV)
    heads = h if len(h.shape) == 0 else h[None, :]
    q_tile = load_lasting(q, b, h, rows, d, M, C.D)  # (BLOCK_M, BLOCK_D)
    do_tile = load_lasting(do, b, h, rows, e, M, C.DV)  # (BLOCK_M, BLOCK_DV)
    tiles = q_tile, do_tile, across(load_row(known, b, h, rows, M, C)), head_scale(logits, b, heads)
    operands = k, v, dk, dv, sums, drop, M, N
    none = tl.zeros([C.BLOCK_M], tl.float32)
    found = tl.zeros([C.BLOCK_D, C.BLOCK_M], tl.float32), none, (none, none, none)
    begin, end = share(0, N, split, splits, C.BLOCK_N)
    lo, hi = key_range(logits.mask, b, h, rows, M, N)
    lo, hi = tl.maximum(begin, lo // C.BLOCK_N * C.BLOCK_N), tl.minimum(end, hi)
    first, last = whole_range(logits, b, h, rows, lo, hi, M, N, C)
    # as in dq_kernel
    ONE_LOOP: tl.constexpr = (C.EDGE_STAGES > 0) & (C.BLOCK_D > 128) & (not C.HIDES)
    if ONE_LOOP:
        first, last = lo, lo
    elif not C.SIFTS:
        for key in tl.range(first, last, C.BLOCK_N):
            found = short_tile(found, tiles, operands, logits, b, hk, heads, rows, key, True, C)
    if C.EDGE_STAGES > 0:
        STAGES: tl.constexpr = None if C.HIDES or ONE_LOOP else 1
        for i in tl.range(lo, hi - (last - first), C.BLOCK_N, num_stages=STAGES):
            found = short_tile(found, tiles, operands, logits, b, hk, heads, rows, past(i, first, last), False, C)
    if ranged(logits.mask):  # the rest reaches no query
        hi, zeros = tl.maximum(lo, tl.cdiv(hi, C.BLOCK_N) * C.BLOCK_N), tl.zeros([C.BLOCK_N, 1], tl.float32)
        for i in tl.range(begin, end - (hi - lo), C.BLOCK_N):
            keys = past(i, lo, hi) + tl.arange(0, C.BLOCK_N)
            store_rows(dk, b, hk, keys, d, N, C.D, zeros)
            store_rows(dv, b, hk, keys, e, N, C.DV, zeros)
    at_split = split * B + b
    store_rows(sums.dq, at_split, h, rows, d, M, C.D, found[0].T)
    if sums.gate is not None:
        store_vec(sums.gate, at_split, h, rows, M, found[1])
    if sums.scale is not None:
        store_scale_sums(sums.scale, at_split, h, rows, M, found[2])


@triton.jit
def short_tile(found, tiles, operands, logits, b, hk, heads, rows, key,
               WHOLE: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """(dq, sum for the gate, sums for the scale) with one tile of keys folded in, whose dk and dv are stored."""
    acc, gated_sum, scaled = found
    q_tile, do_tile, row, scale = tiles
    k, v, dk, dv, sums, drop, M, N = operands
    EXACT: tl.constexpr = C.HIDES and not WHOLE
    rows, keys = rows[None, :], key + tl.arange(0, C.BLOCK_N)
    d, e = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_DV)
    k_tile = load_rows(k, b, hk, keys, d, N, C.D, WHOLE)  # (BLOCK_N, BLOCK_D)
    v_tile = load_rows(v, b, hk, keys, e, N, C.DV, WHOLE)  # (BLOCK_N, BLOCK_DV)
    kq = dot(k_tile, q_tile.T, None, C.TF32)  # (BLOCK_N, BLOCK_M)
    vdy = dot_in_pairs(v_tile, do_tile.T, C.TF32)
    s = scores(kq, logits, scale, b, heads, rows, keys[:, None], M, N, C, WHOLE)
    drawn = indices(key, drop, C.BLOCK_N)[:, None]
    p, pv, ds, gated = softmax_grad(s, vdy, row, drop, b, heads, rows, drawn, 0, EXACT, C)
    if sums.gate is not None:
        gated_sum += gated
    if sums.scale is not None:
        scaled = scale_sums(scaled, p, ds, kq, logits, scale, b, heads, rows, M, 0, EXACT)
    ds = through_softcap(logit_grad(ds, logits, b, heads, rows, M), kq, logits, scale)
    ds = (ds * scale).to(k_tile.dtype)
    store_rows(dv, b, hk, keys, e, N, C.DV, dot((pv * row.gate).to(do_tile.dtype), do_tile, None, C.TF32))
    store_rows(dk, b, hk, keys, d, N, C.D, dot(ds, q_tile, None, C.TF32))
    k_tile = finite(k_tile) if EXACT else k_tile
    return dot(k_tile.T, ds, acc, C.TF32), gated_sum, scaled


def short_queries(backward: Backward) -> Gradients:
    """Gradients of q, k, v, scale and of a gate on whole rows."""
    x, (B, Hq, M, N), config = backward.x, backward.x.sizes, backward.launch.plan.short_queries

    def arguments(common: tuple, known: Rows, logits: tuple, dk: Tensor, dv: Tensor, *sums: Any) -> tuple:
        return (
            backward.launch.query_tiles(config) * config.splits,
            *common, rows_view(dk), rows_view(dv), sums_view(*sums), known, *logits, config.splits, B, Hq, M, N,
        )  # fmt: skip

    dk, dv, sums = by_sequence(x.k), by_sequence(x.v), backward.query_sums(B, config.splits)
    backward.run_kernel(short_queries_kernel, config, arguments, dk, dv, *sums[:3])
    return Gradients(k=dk, v=dv)._replace(**backward.summed(sums))
