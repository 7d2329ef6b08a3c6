"""Forward: a program streams keys past a tile of queries; where queries are few, several programs share the keys."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels.kernels.bounds import filled_rows, key_bounds
from crossattn_kernels.kernels.launch import Launcher
from crossattn_kernels.kernels.scores import head_scale, key_range, later, scores, touches, upward, whole_range
from crossattn_kernels.kernels.softmax import (
    Softmax,
    indices,
    kept,
    quarantine,
    softmax_finish,
    softmax_init,
    softmax_merge,
    softmax_step,
    tanh,
)
from crossattn_kernels.kernels.tiles import (
    all_finite,
    anew,
    at,
    column,
    descriptor,
    dot,
    key_tile,
    load_lasting,
    load_rows,
    load_vec,
    packed_program,
    past,
    program,
    share,
    store_rows,
    store_vec,
)
from crossattn_kernels.kernels.views import (
    Partial,
    Result,
    as_bytes,
    dropout_view,
    inputs_view,
    logits_view,
    row_gate_view,
    rows_view,
    view,
)
from crossattn_kernels.problem import Inputs, Options


@triton.jit
def forward_kernel(q, k, v, result, partial, logits, drop, splits, B, Hq, M, N, C: tl.constexpr):
    """y = tanh(gate) * softmax(s) v and lse for BLOCK_M queries of one (b, h), or of all heads of one key head.

    With several splits a program takes its share of the keys, and stores its state for merge_kernel.
    """
    split, b, hk, h, rows = packed_program(splits, Hq, M, C)
    d = tl.arange(0, C.BLOCK_D)
    q_tile = load_lasting(q, b, h, rows, d, M, C.D)  # (BLOCK_M, BLOCK_D)
    q_tile, scale = upward(q_tile, head_scale(logits, b, h), logits)
    if C.TMA:
        k = descriptor(k, b, hk, N, C.D, C.BLOCK_N, C.BLOCK_D)
        v = descriptor(v, b, hk, N, C.DV, C.BLOCK_N, C.BLOCK_DV)
    lo, hi = key_range(logits.mask, b, h, rows, M, N)
    lo, hi = share(lo, hi, split, splits, C.BLOCK_N)
    first, last = whole_range(logits, b, h, rows, lo, hi, M, N, C)
    state = softmax_init(C.BLOCK_M, C.BLOCK_DV)
    if not C.SIFTS:
        if first < last:
            state = whole_tiles(state, q_tile, k, v, logits, drop, scale, b, h, hk, rows, first, last, M, N, C)
    # tiles not seen whole are taken few keys at a time, as looking at what is hidden takes registers; 32 rather
    # than 16 where they fit, as ptxas serialised wide products of 16 in the second run
    narrow: tl.constexpr = (C.SIFTS and C.BLOCK_M < 64) or C.BLOCK_N < 32 or C.BLOCK_D > 128
    FEW: tl.constexpr = C.BLOCK_N if C.TMA else (16 if narrow else 32)
    STEP: tl.constexpr = C.BLOCK_N if C.SIFTS else FEW
    if C.EDGE_STAGES > 0:
        rows = rows if C.SIFTS else anew(rows, M)
        for i in tl.range(lo, hi - (last - first), STEP, num_stages=C.EDGE_STAGES):  # they lie on both sides
            key = i if C.SIFTS else past(i, first, last)
            cols = (key + tl.arange(0, STEP))[None, :]
            if touches(logits.mask, b, column(h), rows[:, None], cols, M, N, C.SKIPS, C):
                state = any_tile(
                    state, q_tile, k, v, logits, drop, scale, b, h, hk, rows, key, M, N, STEP, not C.SIFTS, C
                )
    if C.SIFTS:
        if not all_finite(state.acc):  # perhaps because of what is hidden
            state, rows = softmax_init(C.BLOCK_M, C.BLOCK_DV), anew(rows, M)
            for key in tl.range(lo, hi, FEW, num_stages=1):
                state = any_tile(state, q_tile, k, v, logits, drop, scale, b, h, hk, rows, key, M, N, FEW, True, C)
    if partial is None:
        store_result(result, state, b, h, rows, M, C)
    else:
        at_split = split * B + b
        store_vec(partial.m, at_split, h, rows, M, state.m)
        store_vec(partial.l, at_split, h, rows, M, state.l)
        store_rows(partial.acc, at_split, h, rows, tl.arange(0, C.BLOCK_DV), M, C.DV, state.acc)


@triton.jit
def whole_tiles(state, q_tile, k, v, logits, drop, scale, b, h, hk, rows, first, last, M, N, C: tl.constexpr):
    """Fold in keys first..last - 1, tiles that every query sees all of.

    The product with v lags a tile behind, so that it overlaps the softmax of the next one.
    """
    heads, rows, cols = column(h), rows[:, None], tl.arange(0, C.BLOCK_N)[None, :]
    m, l, acc = state.m, state.l, state.acc
    factor = later(logits, scale)
    qk = dot(q_tile, key_tile(k, b, hk, first, N, C.D, C.BLOCK_D, True, C.BLOCK_N, C).T, None, C.TF32)
    s = scores(qk, logits, column(scale), b, heads, rows, first + cols, M, N, C, True, True)
    m, l, p, alpha = softmax_step(m, l, s, factor, C.BASE)
    p = kept(p, drop, b, heads, rows, first + cols).to(q_tile.dtype)
    for key in tl.range(first + C.BLOCK_N, last, C.BLOCK_N):
        qk = dot(q_tile, key_tile(k, b, hk, key, N, C.D, C.BLOCK_D, True, C.BLOCK_N, C).T, None, C.TF32)
        v_tile = key_tile(v, b, hk, key - C.BLOCK_N, N, C.DV, C.BLOCK_DV, True, C.BLOCK_N, C)
        acc = dot(p, v_tile, acc * alpha[:, None], C.TF32)
        s = scores(qk, logits, column(scale), b, heads, rows, key + cols, M, N, C, True, True)
        m, l, p, alpha = softmax_step(m, l, s, factor, C.BASE)
        p = kept(p, drop, b, heads, rows, key + cols).to(q_tile.dtype)
    v_tile = key_tile(v, b, hk, last - C.BLOCK_N, N, C.DV, C.BLOCK_DV, True, C.BLOCK_N, C)
    return Softmax(m, l, dot(p, v_tile, acc * alpha[:, None], C.TF32))


@triton.jit
def any_tile(state, q_tile, k, v, logits, drop, scale, b, h, hk, rows, key, M, N,
             STEP: tl.constexpr, EXACT: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Fold in STEP keys, whatever is hidden among them.

    EXACT: hidden values are looked at, and reach nothing; without, they do if they are not finite.
    """
    heads, rows, cols = column(h), rows[:, None], (key + tl.arange(0, STEP))[None, :]
    qk = dot(q_tile, key_tile(k, b, hk, key, N, C.D, C.BLOCK_D, False, STEP, C).T, None, C.TF32)
    v_tile = key_tile(v, b, hk, key, N, C.DV, C.BLOCK_DV, False, STEP, C)  # (STEP, BLOCK_DV)
    s = scores(qk, logits, column(scale), b, heads, rows, cols, M, N, C, False, True, EXACT)  # (BLOCK_M, STEP)
    if C.HIDES and EXACT:
        s, v_tile = quarantine(s, v_tile)
    m, l, p, alpha = softmax_step(state.m, state.l, s, later(logits, scale), C.BASE)
    p = kept(p, drop, b, heads, rows, indices(key, drop, STEP)[None, :]).to(v_tile.dtype)
    return Softmax(m, l, dot(p, v_tile, state.acc * alpha[:, None], C.TF32))


@triton.jit
def merge_kernel(partial, result, splits, B, Hq, M, C: tl.constexpr):
    """The result for BLOCK_M queries of one (b, h) from the states of all splits, in their order."""
    tile, b, h = program(tl.cdiv(M, C.BLOCK_M), Hq)
    rows, dv = tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M), tl.arange(0, C.BLOCK_DV)
    state = softmax_init(C.BLOCK_M, C.BLOCK_DV)
    for split in tl.range(0, splits, num_stages=4):  # a load for each alone would wait for memory
        at_split = split * B + b
        m = load_vec(partial.m, at_split, h, rows, M, float("-inf"))
        l = load_vec(partial.l, at_split, h, rows, M, 0.0)
        acc = load_rows(partial.acc, at_split, h, rows, dv, M, C.DV)
        state = softmax_merge(state, Softmax(m, l, acc), C.BASE)
    store_result(result, state, b, h, rows, M, C)


@triton.jit
def store_result(result, state, b, h, rows, M, C: tl.constexpr):
    """Normalise, gate and store; o is the output without a gate that varies along Dv."""
    out, lse, high, inverse = softmax_finish(state, C.BASE)
    dv = tl.arange(0, C.BLOCK_DV)
    store_vec(result.lse, b, h, rows, M, lse)
    tl.store(at(result.state, (b, 0, h, rows)), high, mask=rows < M)
    tl.store(at(result.state, (b, 1, h, rows)), inverse, mask=rows < M)
    if result.row_gate is not None:
        out *= tanh(load_vec(result.row_gate, b, h, rows, M, 0.0).to(tl.float32))[:, None]
    if result.gate is not None:
        store_rows(result.o, b, h, rows, dv, M, C.DV, out)
        out *= tanh(load_rows(result.gate, b, h, rows, dv, M, C.DV).to(tl.float32))
    store_rows(result.y, b, h, rows, dv, M, C.DV, out)


def forward(x: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, o, lse, state, filled), as `ops.forward_op` documents."""
    x = as_bytes(x)
    (B, Hq, M, N), Dv = x.sizes, x.v.shape[3]
    launch = Launcher.of(x, options)
    y = x.q.new_empty_strided((B, Hq, M, Dv), (M * Hq * Dv, Dv, Hq * Dv, 1))
    o = torch.empty_like(y) if x.gate_varies else None
    lse = x.q.new_empty(B, Hq, M, dtype=torch.float32)
    state = lse.new_empty(B, 2, Hq, M)
    bounds = key_bounds(launch, x)
    filled = filled_rows(launch, x, options, bounds)
    splits, m, l, acc = launch.plan.forward.splits, None, None, None
    if splits > 1:
        m, l, acc = (
            lse.new_empty(splits * B, Hq, M),
            lse.new_empty(splits * B, Hq, M),
            lse.new_empty(splits * B, Hq, M, Dv),
        )

    def result(x: Inputs, y: Tensor, o: Tensor | None, lse: Tensor, state: Tensor) -> Result:
        gates = (None, view(x.gate, *y.shape)) if x.gate_varies else (row_gate_view(x), None)
        return Result(rows_view(y), rows_view(o), view(lse), view(state), *gates)

    def partial(m: Tensor | None, l: Tensor | None, acc: Tensor | None) -> Partial | None:
        return None if m is None else Partial(view(m), view(l), rows_view(acc))

    def stream(
        y: Any, o: Any, lse: Any, state: Any, m: Any, l: Any, acc: Any, filled: Any, bounds: Any, *inputs: Any
    ) -> tuple:
        x, parts = Inputs(*inputs), partial(m, l, acc)
        return (
            launch.query_tiles(launch.plan.forward) * splits, *inputs_view(x),
            None if parts else result(x, y, o, lse, state), parts,
            logits_view(x, options, filled, bounds), dropout_view(x, options), splits, B, Hq, M, N,
        )  # fmt: skip

    def merge(y: Any, o: Any, lse: Any, state: Any, m: Any, l: Any, acc: Any, gate: Any) -> tuple:
        tiles = triton.cdiv(M, launch.plan.merge.BLOCK_M) * B * Hq
        return tiles, partial(m, l, acc), result(x._replace(gate=gate), y, o, lse, state), splits, B, Hq, M

    if B * Hq * M:
        launch(forward_kernel, stream, y, o, lse, state, m, l, acc, filled, bounds, *x)
        if splits > 1:
            launch(merge_kernel, merge, y, o, lse, state, m, l, acc, x.gate)
    bits = x.q.new_empty(0, dtype=torch.bool) if filled is None else filled.view(torch.bool)
    return y, x.q.new_empty(0) if o is None else o, lse, state, bits
