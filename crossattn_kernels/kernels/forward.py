"""Forward: one program a tile of queries and head; keys are streamed past it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels.kernels.bounds import free_rows
from crossattn_kernels.kernels.scores import head_scale, key_range, scores, touches
from crossattn_kernels.kernels.softmax import quarantine, softmax_finish, softmax_init, softmax_update, tanh
from crossattn_kernels.kernels.tiles import dot, load_rows, load_vec, program, store_rows, store_vec
from crossattn_kernels.kernels.views import constants, dropout_view, logits_view, view
from crossattn_kernels.problem import Inputs, Options, Problem
from crossattn_kernels.tuning import choose


@triton.jit
def forward_kernel(q, k, v, y, o, lse, row_gate, gate, logits, drop, Hq, M, N,
                   GROUP: tl.constexpr, HIDES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """y = tanh(gate) * softmax(s) v and lse for BLOCK_M queries of one (b, h)."""
    tile, b, h = program(tl.cdiv(M, BLOCK_M), Hq)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    scale = head_scale(logits, b, h)
    q_tile = load_rows(q, b, h, rows, d, M, D)  # (BLOCK_M, BLOCK_D)
    state = softmax_init(BLOCK_M, BLOCK_DV)
    lo, hi = key_range(logits.mask, b, h, rows, M, N)
    for first in tl.range(lo // BLOCK_N * BLOCK_N, hi, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        if touches(logits.mask, b, h, rows[:, None], keys[None, :], M, N):
            k_tile = load_rows(k, b, h // GROUP, keys, d, N, D)
            v_tile = load_rows(v, b, h // GROUP, keys, dv, N, DV)
            qk = dot(q_tile, k_tile.T, None, PRECISION)
            s = scores(qk, logits, scale, b, h, rows[:, None], keys[None, :], M, N)
            if HIDES:
                s, v_tile = quarantine(s, v_tile)
            state = softmax_update(state, s, v_tile, drop, b, h, rows, keys, PRECISION)
    out, lse_rows = softmax_finish(state)
    store_vec(lse, b, h, rows, M, lse_rows)
    if row_gate is not None:
        out *= tanh(load_vec(row_gate, b, h, rows, M, 0.0).to(tl.float32))[:, None]
    if gate is not None:
        store_rows(o, b, h, rows, dv, M, DV, out)
        out *= tanh(load_rows(gate, b, h, rows, dv, M, DV).to(tl.float32))
    store_rows(y, b, h, rows, dv, M, DV, out)


def forward(x: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, o, lse, free), as `ops.forward_op` documents."""
    B, Hq, M, N = x.sizes
    problem = Problem.of(x)
    config = choose(problem, "forward")
    y = x.q.new_empty(B, M, Hq, problem.Dv).transpose(1, 2)
    o = torch.empty_like(y) if x.gate_varies else x.q.new_empty(0)
    lse = x.q.new_empty(B, Hq, M, dtype=torch.float32)
    free = free_rows(x, options, config)
    if lse.numel():
        row_gate = None if x.gate is None or x.gate_varies else view(x.gate[..., 0], B, Hq, M)
        forward_kernel[(triton.cdiv(M, config.BLOCK_M) * B * Hq,)](
            view(x.q, B, Hq, M, problem.D), view(x.k, B, *x.k.shape[1:]), view(x.v, B, *x.v.shape[1:]),
            view(y), view(o) if x.gate_varies else None, view(lse), row_gate,
            view(x.gate, *y.shape) if x.gate_varies else None, logits_view(x, options, free), dropout_view(x, options),
            Hq, M, N, **constants(problem, config),
        )  # fmt: skip
    return y, o, lse, x.q.new_empty(0, dtype=torch.bool) if free is None else free.view(torch.bool)
