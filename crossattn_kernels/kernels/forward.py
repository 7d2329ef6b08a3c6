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
from crossattn_kernels.kernels.views import dropout_view, launch_options, logits_view, row_gate_view, view
from crossattn_kernels.problem import Inputs, Options, Problem
from crossattn_kernels.tuning import choose


@triton.jit
def forward_kernel(q, k, v, y, o, lse, high, inverse, row_gate, gate, logits, drop, Hq, M, N, C: tl.constexpr):
    """y = tanh(gate) * softmax(s) v and lse for BLOCK_M queries of one (b, h)."""
    tile, b, h = program(tl.cdiv(M, C.BLOCK_M), Hq)
    rows = tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    d, dv = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_DV)
    scale = head_scale(logits, b, h)
    q_tile = load_rows(q, b, h, rows, d, M, C.D)  # (BLOCK_M, BLOCK_D)
    state = softmax_init(C.BLOCK_M, C.BLOCK_DV)
    lo, hi = key_range(logits.mask, b, h, rows, M, N)
    for first in tl.range(lo // C.BLOCK_N * C.BLOCK_N, hi, C.BLOCK_N):
        keys = first + tl.arange(0, C.BLOCK_N)
        if touches(logits.mask, b, h, rows[:, None], keys[None, :], M, N):
            k_tile = load_rows(k, b, h // C.GROUP, keys, d, N, C.D)  # (BLOCK_N, BLOCK_D)
            v_tile = load_rows(v, b, h // C.GROUP, keys, dv, N, C.DV)  # (BLOCK_N, BLOCK_DV)
            qk = dot(q_tile, k_tile.T, None, C.TF32)  # (BLOCK_M, BLOCK_N)
            s = scores(qk, logits, scale, b, h, rows[:, None], keys[None, :], M, N)
            if C.HIDES:
                s, v_tile = quarantine(s, v_tile)
            state = softmax_update(state, s, v_tile, drop, b, h, rows, keys, C.TF32)
    out, lse_rows, high_rows, inverse_rows = softmax_finish(state)
    store_vec(lse, b, h, rows, M, lse_rows)
    store_vec(high, b, h, rows, M, high_rows)
    store_vec(inverse, b, h, rows, M, inverse_rows)
    if row_gate is not None:
        out *= tanh(load_vec(row_gate, b, h, rows, M, 0.0).to(tl.float32))[:, None]
    if gate is not None:
        store_rows(o, b, h, rows, dv, M, C.DV, out)
        out *= tanh(load_rows(gate, b, h, rows, dv, M, C.DV).to(tl.float32))
    store_rows(y, b, h, rows, dv, M, C.DV, out)


def forward(x: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, o, lse, state, free), as `ops.forward_op` documents; state is (high, inverse)."""
    B, Hq, M, N = x.sizes
    problem = Problem.of(x)
    config = choose(problem, "forward")
    y = x.q.new_empty(B, M, Hq, problem.Dv).transpose(1, 2)
    o = torch.empty_like(y) if x.gate_varies else x.q.new_empty(0)
    lse = x.q.new_empty(B, Hq, M, dtype=torch.float32)
    state = x.q.new_empty(B, 2, Hq, M, dtype=torch.float32)
    free = free_rows(x, options, config)
    if lse.numel():
        row_gate, gate = (None, view(x.gate, *y.shape)) if x.gate_varies else (row_gate_view(x), None)
        forward_kernel[(triton.cdiv(M, config.BLOCK_M) * B * Hq,)](
            view(x.q, B, *x.q.shape[1:]), view(x.k, B, *x.k.shape[1:]), view(x.v, B, *x.v.shape[1:]),
            view(y), view(o) if x.gate_varies else None, view(lse), view(state[:, 0]), view(state[:, 1]),
            row_gate, gate, logits_view(x, options, free), dropout_view(x, options), Hq, M, N,
            **launch_options(problem, options, config),
        )  # fmt: skip
    return y, o, lse, state, x.q.new_empty(0, dtype=torch.bool) if free is None else free.view(torch.bool)
