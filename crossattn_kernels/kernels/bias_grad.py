"""Gradient of an additive bias of any broadcast: ds summed over the dimensions along which the bias does not vary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels.kernels.scores import head_scale, key_range, logit_grad, scores, touches
from crossattn_kernels.kernels.softmax import row_state, softmax_grad
from crossattn_kernels.kernels.tiles import at, dot, load_rows, program, wide
from crossattn_kernels.kernels.views import view
from crossattn_kernels.tuning import choose

if TYPE_CHECKING:
    from crossattn_kernels.kernels.backward import Saved


@triton.jit
def bias_grad_kernel(q, k, v, do, dbias, lse, delta, row_gate, logits, drop, batches, heads, Hb, Hq, M, N,
                     SUM_M: tl.constexpr, SUM_N: tl.constexpr,
                     GROUP: tl.constexpr, HIDES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                     BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    """One tile of dbias: ds summed over `batches` and `heads`, over all queries with SUM_M and all keys with SUM_N."""
    m_tiles = 1 if SUM_M else tl.cdiv(M, BLOCK_M)
    n_tiles = 1 if SUM_N else tl.cdiv(N, BLOCK_N)
    tile, b_out, h_out = program(m_tiles * n_tiles, Hb)
    m_first, n_first = tile // n_tiles * BLOCK_M, tile % n_tiles * BLOCK_N
    m_last, n_last = (
        (M if SUM_M else tl.minimum(m_first + BLOCK_M, M)),
        (N if SUM_N else tl.minimum(n_first + BLOCK_N, N)),
    )
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.range(0, batches * heads):
        b, h = b_out + i // heads, h_out + i % heads
        scale = head_scale(logits, b, h)
        for m in tl.range(m_first, m_last, BLOCK_M):
            rows = m + tl.arange(0, BLOCK_M)
            q_tile, do_tile = load_rows(q, b, h, rows, d, M, D), load_rows(do, b, h, rows, e, M, DV)
            lse2, delta_rows, t = row_state(lse, delta, row_gate, b, h, rows, M)
            lo, hi = key_range(logits.mask, b, h, rows, M, N)
            lo, hi = tl.maximum(lo // BLOCK_N * BLOCK_N, n_first), tl.minimum(hi, n_last)
            for n in tl.range(lo, hi, BLOCK_N):
                keys = n + tl.arange(0, BLOCK_N)
                if touches(logits.mask, b, h, rows[:, None], keys[None, :], M, N):
                    k_tile = load_rows(k, b, h // GROUP, keys, d, N, D)
                    v_tile = load_rows(v, b, h // GROUP, keys, e, N, DV)
                    s = scores(
                        dot(q_tile, k_tile.T, None, PRECISION), logits, scale, b, h, rows[:, None], keys[None, :], M, N
                    )
                    dov = dot(do_tile, v_tile.T, None, PRECISION) * t[:, None]
                    _, ds = softmax_grad(
                        s, dov, lse2[:, None], delta_rows[:, None], drop, b, h, rows[:, None], keys[None, :], 1, ALONE
                    )
                    acc += logit_grad(ds, logits, b, h, rows[:, None], M)
    rows, keys = wide(m_first + tl.arange(0, BLOCK_M)), wide(n_first + tl.arange(0, BLOCK_N))
    out = at(dbias, (b_out, h_out, rows[:, None] * (1 - SUM_M), keys[None, :] * (1 - SUM_N)))
    if SUM_M:
        acc = tl.sum(acc, 0, keep_dims=True) + tl.zeros_like(acc)
    if SUM_N:
        acc = tl.sum(acc, 1, keep_dims=True) + tl.zeros_like(acc)
    mine = (rows[:, None] < (1 if SUM_M else M)) & (keys[None, :] < (1 if SUM_N else N))
    tl.store(out, acc, mask=mine)


def bias_grad(saved: Saved) -> Tensor:
    """A bias that varies over queries and keys is written as it is, summed over batch and heads inside the kernel; any
    other has an fp32 partial a (b, h), which is O(M + N), summed afterwards."""
    x, bias = saved.x, saved.x.bias
    assert bias is not None
    B, Hq, M, N = x.sizes
    Bb, Hb, Mb, Nb = bias.shape
    dense = (Mb, Nb) == (M, N)
    batches, heads = (B // max(1, Bb), Hq // max(1, Hb)) if dense else (1, 1)
    lead = (Bb, Hb) if dense else (B, Hq)
    dbias = torch.empty(*lead, Mb, Nb, dtype=bias.dtype if dense else torch.float32, device=x.q.device)
    if not B * Hq * M * N:
        return torch.zeros_like(bias)
    config = choose(saved.problem, "bias_grad")
    tiles = (triton.cdiv(M, config.BLOCK_M) if Mb == M else 1) * (triton.cdiv(N, config.BLOCK_N) if Nb == N else 1)
    bias_grad_kernel[(tiles * lead[0] * lead[1],)](
        saved.q, saved.k, saved.v, saved.do, view(dbias), saved.lse, saved.delta(config), saved.row_gate, saved.logits, saved.drop,
        batches, heads, lead[1], Hq, M, N, SUM_M=Mb != M, SUM_N=Nb != N, **saved.constants(config),
    )  # fmt: skip
    return dbias.sum_to_size(bias.shape).to(bias.dtype)
