"""Gradient of an additive bias of any broadcast: ds summed over the dimensions along which the bias does not vary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels.kernels.backward import Backward
from crossattn_kernels.kernels.partials import fold
from crossattn_kernels.kernels.scores import head_scale, key_range, logit_grad, reaches, scores, touches
from crossattn_kernels.kernels.softmax import down, load_row, softmax_grad
from crossattn_kernels.kernels.tiles import at, dot, dot_in_pairs, load_rows, program, share
from crossattn_kernels.kernels.views import Rows, constant, view


@triton.jit
def bias_grad_kernel(q, k, v, do, dbias, known, logits, drop, batches, heads, splits, Hb, Hq, M, N,
                     SUM_M: tl.constexpr, SUM_N: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """One tile of dbias: ds summed over `batches` and `heads`, or over all queries with SUM_M, all keys with SUM_N.

    With several splits a program takes its share of the terms, and stores a partial sum.
    """
    m_tiles, n_tiles = tl.cdiv(M, C.BLOCK_M), tl.cdiv(N, C.BLOCK_N)
    m_steps, n_steps = m_tiles if SUM_M else 1, n_tiles if SUM_N else 1
    m_tiles, n_tiles = 1 if SUM_M else m_tiles, 1 if SUM_N else n_tiles
    ONE_ROW: tl.constexpr = SUM_N & (not SUM_M)  # of tiles, whose keys are a range
    tile, rest, h_out = program(m_tiles * n_tiles, Hb)
    split, b_out = rest % splits, rest // splits
    m_first, n_first = tile // n_tiles * C.BLOCK_M, tile % n_tiles * C.BLOCK_N
    if ONE_ROW:
        lo, hi = key_range(logits.mask, b_out, h_out, m_first + tl.arange(0, C.BLOCK_M), M, N)
        n_first = lo // C.BLOCK_N * C.BLOCK_N
        n_steps = tl.cdiv(hi - n_first, C.BLOCK_N)
    acc = tl.zeros([C.BLOCK_M, C.BLOCK_N], tl.float32)
    # in one loop over (b, h) or, where they are summed, over tiles, so that loads are pipelined
    begin, end = 0, batches * heads * m_steps * n_steps
    if splits > 1:  # known when the kernel is compiled, as in dq
        begin, end = share(begin, end, split, splits, 1)
    for i in tl.range(begin, end):
        b, h, step = b_out, h_out, i
        if not (SUM_M | SUM_N):
            b, h, step = b_out + i // heads, h_out + i % heads, 0
        rows = m_first + step // n_steps * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
        keys = n_first + step % n_steps * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
        if reaches(logits.mask, b, h, rows, keys, M, N, ONE_ROW):
            if touches(logits.mask, b, h, rows[:, None], keys[None, :], M, N, C.SKIPS, C):
                acc += tile_grad(q, k, v, do, known, logits, drop, b, h, rows, keys, M, N, C)
    # a dimension that is summed has one entry: every row (column) of acc becomes the sum, the first is stored
    rows = (0 if SUM_M else m_first) + tl.arange(0, C.BLOCK_M)[:, None]
    keys = (0 if SUM_N else n_first) + tl.arange(0, C.BLOCK_N)[None, :]
    if SUM_M:
        acc = tl.sum(acc, 0, keep_dims=True) + tl.zeros_like(acc)
    if SUM_N:
        acc = tl.sum(acc, 1, keep_dims=True) + tl.zeros_like(acc)
    exists = (rows < (1 if SUM_M else M)) & (keys < (1 if SUM_N else N))
    at_split = split * (tl.num_programs(0) // (m_tiles * n_tiles * Hb * splits)) + b_out
    tl.store(at(dbias, (at_split, h_out, rows, keys)), acc, mask=exists)


@triton.jit
def tile_grad(q, k, v, do, known, logits, drop, b, h, rows, keys, M, N, C: tl.constexpr):
    """ds of one tile: (BLOCK_M, BLOCK_N)."""
    d, e = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_DV)
    q_tile = load_rows(q, b, h, rows, d, M, C.D)  # (BLOCK_M, BLOCK_D)
    k_tile = load_rows(k, b, h // C.GROUP, keys, d, N, C.D)  # (BLOCK_N, BLOCK_D)
    do_tile = load_rows(do, b, h, rows, e, M, C.DV)  # (BLOCK_M, BLOCK_DV)
    v_tile = load_rows(v, b, h // C.GROUP, keys, e, N, C.DV)  # (BLOCK_N, BLOCK_DV)
    qk = dot(q_tile, k_tile.T, None, C.TF32)  # (BLOCK_M, BLOCK_N)
    dyv = dot_in_pairs(do_tile, v_tile.T, C.TF32)
    row, scale = down(load_row(known, b, h, rows, M, C)), head_scale(logits, b, h)
    rows, keys = rows[:, None], keys[None, :]
    s = scores(qk, logits, scale, b, h, rows, keys, M, N, C)
    _, _, ds, _ = softmax_grad(s, dyv, row, drop, b, h, rows, keys, 1, C.HIDES, C)
    return logit_grad(ds, logits, b, h, rows, M)


def bias_grad(backward: Backward) -> Tensor:
    """A bias that varies over queries and keys is written as it is, summed over batch and heads inside the kernel; any
    other has an fp32 partial a (b, h), which is O(M + N), summed afterwards."""
    x, bias = backward.x, backward.x.bias
    assert bias is not None
    B, Hq, M, N = x.sizes
    Bb, Hb, Mb, Nb = bias.shape
    dense = (Mb, Nb) == (M, N)
    batches, heads = (B // Bb, Hq // Hb) if dense else (1, 1)
    lead = (Bb, Hb) if dense else (B, Hq)
    config = backward.launch.plan.bias_grad
    dbias = torch.empty(*lead, Mb, Nb, dtype=bias.dtype if dense else torch.float32, device=bias.device)
    several = config.splits > 1
    parts = dbias.new_empty(config.splits * lead[0], *dbias.shape[1:], dtype=torch.float32) if several else dbias

    def arguments(common: tuple, known: Rows, logits: tuple, dbias: Tensor) -> tuple:
        tiles = (triton.cdiv(M, config.BLOCK_M) if Mb == M else 1) * (triton.cdiv(N, config.BLOCK_N) if Nb == N else 1)
        return (
            tiles * config.splits * lead[0] * lead[1],
            *common, view(dbias), known, *logits,
            batches, heads, config.splits, lead[1], Hq, M, N, constant(Mb != M), constant(Nb != N),
        )  # fmt: skip

    backward.run_kernel(bias_grad_kernel, config, arguments, parts)
    return (fold(backward.launch, parts, dbias, "bias") if several else dbias).sum_to_size(bias.shape)
