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
    logit_grad,
    scale_sums,
    scores,
    store_scale_sums,
    through_softcap,
)
from crossattn_kernels.kernels.softmax import across, indices, load_row, softmax_grad
from crossattn_kernels.kernels.tiles import (
    dot,
    dot_in_pairs,
    finite,
    load_lasting,
    load_rows,
    packed_program,
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
    scale = head_scale(logits, b, heads)
    q_tile = load_lasting(q, b, h, rows, d, M, C.D)  # (BLOCK_M, BLOCK_D)
    do_tile = load_lasting(do, b, h, rows, e, M, C.DV)  # (BLOCK_M, BLOCK_DV)
    row = across(load_row(known, b, h, rows, M, C))
    dq_acc = tl.zeros([C.BLOCK_D, C.BLOCK_M], tl.float32)
    gate_sum = tl.zeros([C.BLOCK_M], tl.float32)
    scale_sum = gate_sum, gate_sum, gate_sum
    lo, hi = share(0, N, split, splits, C.BLOCK_N)
    for first in tl.range(lo, hi, C.BLOCK_N):
        keys = first + tl.arange(0, C.BLOCK_N)
        k_tile = load_rows(k, b, hk, keys, d, N, C.D)  # (BLOCK_N, BLOCK_D)
        v_tile = load_rows(v, b, hk, keys, e, N, C.DV)  # (BLOCK_N, BLOCK_DV)
        kq = dot(k_tile, q_tile.T, None, C.TF32)  # (BLOCK_N, BLOCK_M)
        vdy = dot_in_pairs(v_tile, do_tile.T, C.TF32)
        s = scores(kq, logits, scale, b, heads, rows[None, :], keys[:, None], M, N, C)
        drawn = indices(first, drop, C.BLOCK_N)[:, None]
        p, pv, ds, gated = softmax_grad(s, vdy, row, drop, b, heads, rows[None, :], drawn, 0, C.HIDES, C)
        if sums.gate is not None:
            gate_sum += gated
        if sums.scale is not None:
            scale_sum = scale_sums(scale_sum, p, ds, kq, logits, scale, b, heads, rows[None, :], M, 0, C.HIDES)
        ds = through_softcap(logit_grad(ds, logits, b, heads, rows[None, :], M), kq, logits, scale)
        ds = (ds * scale).to(k_tile.dtype)
        store_rows(dv, b, hk, keys, e, N, C.DV, dot((pv * row.gate).to(do_tile.dtype), do_tile, None, C.TF32))
        store_rows(dk, b, hk, keys, d, N, C.D, dot(ds, q_tile, None, C.TF32))
        k_tile = finite(k_tile) if C.HIDES else k_tile
        dq_acc = dot(k_tile.T, ds, dq_acc, C.TF32)
    at_split = split * B + b
    store_rows(sums.dq, at_split, h, rows, d, M, C.D, dq_acc.T)
    if sums.gate is not None:
        store_vec(sums.gate, at_split, h, rows, M, gate_sum)
    if sums.scale is not None:
        store_scale_sums(sums.scale, at_split, h, rows, M, scale_sum)


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
