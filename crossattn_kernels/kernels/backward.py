"""Backward in two passes: dq by query tiles, dk and dv by key tiles; p is recomputed from lse, nothing is added atomically."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels.kernels.bias_grad import bias_grad
from crossattn_kernels.kernels.bounds import overlaps, query_range, tile_ranges
from crossattn_kernels.kernels.scores import head_scale, key_range, logit_grad, scores, through_softcap, touches
from crossattn_kernels.kernels.softmax import row_state, softmax_grad
from crossattn_kernels.kernels.tiles import dot, finite, load_rows, load_vec, program, store_rows, store_vec
from crossattn_kernels.kernels.views import View, constants, dropout_view, logits_view, view
from crossattn_kernels.problem import Inputs, Options, Problem
from crossattn_kernels.tiled import Gradients
from crossattn_kernels.tuning import Config, choose, power_of_two


@triton.jit
def delta_kernel(o, do, dlse, delta, Hq, M, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr):
    """delta = rowsum(o * do) - dlse for BLOCK_M queries; with a gate on whole rows y and dy give the same.

    fp32 tensors are summed in fp64: dp - delta cancels, and this kernel waits for memory anyway.
    """
    tile, b, h = program(tl.cdiv(M, BLOCK_M), Hq)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dv = tl.arange(0, BLOCK_DV)
    wide: tl.constexpr = tl.float64 if o.ptr.dtype.element_ty == tl.float32 else tl.float32
    o_tile, do_tile = load_rows(o, b, h, rows, dv, M, DV).to(wide), load_rows(do, b, h, rows, dv, M, DV).to(wide)
    total = tl.sum(o_tile * do_tile, 1).to(tl.float32)
    if dlse is not None:
        total -= load_vec(dlse, b, h, rows, M, 0.0)
    store_vec(delta, b, h, rows, M, total)


@triton.jit
def dq_kernel(q, k, v, do, dq, lse, delta, row_gate, gate_sum, scale_sum, logits, drop, batches, Hq, M, N,
              GROUP: tl.constexpr, HIDES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    """dq = scale * ds k for BLOCK_M queries of one (b, h), summed over the `batches` that share them.

    On the way: gate_sum = rowsum(p * dy vᵀ) = rowsum(dy * o), and scale_sum = rowsum(q * ds k) = rowsum(ds * q kᵀ).
    """
    tile, shared, h = program(tl.cdiv(M, BLOCK_M), Hq)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_tile = load_rows(q, shared, h, rows, d, M, D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale = head_scale(logits, shared, h)
    for entry in tl.range(0, batches):
        b = shared + entry
        do_tile = load_rows(do, b, h, rows, dv, M, DV)
        lse2, delta_rows, t = row_state(lse, delta, row_gate, b, h, rows, M)
        gated = tl.zeros([BLOCK_M], tl.float32)
        lo, hi = key_range(logits.mask, b, h, rows, M, N)
        for first in tl.range(lo // BLOCK_N * BLOCK_N, hi, BLOCK_N):
            keys = first + tl.arange(0, BLOCK_N)
            if touches(logits.mask, b, h, rows[:, None], keys[None, :], M, N):
                k_tile = load_rows(k, b, h // GROUP, keys, d, N, D)
                v_tile = load_rows(v, b, h // GROUP, keys, dv, N, DV)
                qk = dot(q_tile, k_tile.T, None, PRECISION)
                dov = dot(do_tile, v_tile.T, None, PRECISION)
                s = scores(qk, logits, scale, b, h, rows[:, None], keys[None, :], M, N)
                p, ds = softmax_grad(
                    s, dov * t[:, None], lse2[:, None], delta_rows[:, None], drop, b, h, rows[:, None], keys[None, :], 1, ALONE
                )
                if gate_sum is not None:
                    gated += tl.sum(tl.where(p == 0.0, 0.0, p * dov), 1)
                ds = through_softcap(logit_grad(ds, logits, b, h, rows[:, None], M), qk, logits, scale)
                k_tile = finite(k_tile) if HIDES else k_tile
                acc = dot(ds.to(k_tile.dtype), k_tile, acc, PRECISION)
        if gate_sum is not None:
            store_vec(gate_sum, b, h, rows, M, gated)
    if scale_sum is not None:
        store_vec(scale_sum, shared, h, rows, M, tl.sum(acc * q_tile.to(tl.float32), 1))
    store_rows(dq, shared, h, rows, d, M, D, acc * scale)


@triton.jit
def dkv_kernel(q, k, v, do, dk, dv, lse, delta, row_gate, logits, drop, ranges, batches, Hq, M, N,
               GROUP: tl.constexpr, HIDES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    """dv = pᵀ do and dk = scale * dsᵀ q for BLOCK_N keys of one (b, key head), summed over the GROUP query heads and the
    `batches` that share them.  sᵀ = k qᵀ is computed as such: no product takes a transposed accumulator."""
    tile, shared, hk = program(tl.cdiv(N, BLOCK_N), Hq // GROUP)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_tile = load_rows(k, shared, hk, keys, d, N, D)
    v_tile = load_rows(v, shared, hk, keys, e, N, DV)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i in tl.range(0, batches * GROUP):
        b, h = shared + i // GROUP, hk * GROUP + i % GROUP
        scale = head_scale(logits, b, h)
        lo, hi = query_range(ranges, b, h, keys, M, BLOCK_M)
        for first in tl.range(lo, hi, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            seen = overlaps(ranges, b, h, first // BLOCK_M, keys, True)
            if seen & touches(logits.mask, b, h, rows[None, :], keys[:, None], M, N):
                q_tile = load_rows(q, b, h, rows, d, M, D)
                do_tile = load_rows(do, b, h, rows, e, M, DV)
                lse2, delta_rows, t = row_state(lse, delta, row_gate, b, h, rows, M)
                kq = dot(k_tile, q_tile.T, None, PRECISION)  # (BLOCK_N, BLOCK_M)
                vdo = dot(v_tile, do_tile.T, None, PRECISION) * t[None, :]
                s = scores(kq, logits, scale, b, h, rows[None, :], keys[:, None], M, N)
                p, ds = softmax_grad(
                    s, vdo, lse2[None, :], delta_rows[None, :], drop, b, h, rows[None, :], keys[:, None], 0, ALONE
                )
                ds = through_softcap(logit_grad(ds, logits, b, h, rows[None, :], M), kq, logits, scale) * scale
                dv_acc = dot((p * t[None, :]).to(do_tile.dtype), do_tile, dv_acc, PRECISION)
                dk_acc = dot(ds.to(q_tile.dtype), q_tile, dk_acc, PRECISION)
    store_rows(dk, shared, hk, keys, d, N, D, dk_acc)
    store_rows(dv, shared, hk, keys, e, N, DV, dv_acc)


def backward(
    dy: Tensor,
    dlse: Tensor | None,
    x: Inputs,
    options: Options,
    o: Tensor,
    lse: Tensor,
    free: Tensor | None,
    wanted: Gradients,
) -> Gradients:
    """Gradients of the wanted inputs; o is the gated output, or the ungated one when the gate varies along Dv."""
    do, dgate = dy, None
    if x.gate is not None and x.gate_varies:
        t = torch.tanh(x.gate.float())
        do = (t * dy).to(dy.dtype)
        dgate = ((1 - t * t) * (dy.float() * o).double().sum_to_size(t.shape)).to(x.gate.dtype) if wanted.gate else None
    saved = Saved(x, options, do if do.stride(3) == 1 else do.contiguous(), o, dlse, lse, free)
    dq, row_dgate, dscale = saved.dq(wanted) if wanted.q or wanted.scale or wanted.gate else (None, None, None)
    dk, dv = saved.dkv() if wanted.k or wanted.v else (None, None)
    dbias = bias_grad(saved) if wanted.bias else None
    return Gradients(dq, dk, dv, dbias, dgate if dgate is not None else row_dgate, dscale)


class Saved:
    """What the kernels of one backward share."""

    def __init__(
        self, x: Inputs, options: Options, do: Tensor, o: Tensor, dlse: Tensor | None, lse: Tensor, free: Tensor | None
    ):
        B, Hq, M, N = x.sizes
        self.x, self.options, self.free = x, options, free
        self.problem = Problem.of(x)
        self.q, self.k, self.v = (
            view(x.q, B, *x.q.shape[1:]),
            view(x.k, B, *x.k.shape[1:]),
            view(x.v, B, *x.v.shape[1:]),
        )
        self.do, self.lse = view(do), view(lse)
        self.row_gate = None if x.gate is None or x.gate_varies else view(x.gate[..., 0], B, Hq, M)
        self.logits, self.drop = logits_view(x, options, free), dropout_view(x, options)
        self.o, self.dlse = view(o), dlse

    def constants(self, config: Config) -> dict[str, Any]:
        return dict(ALONE=self.alone(config), **constants(self.problem, config))

    def alone(self, config: Config) -> bool:
        """One tile holds all keys of the softmax."""
        return self.problem.N <= config.BLOCK_N and not self.options.chunk

    def delta(self, config: Config) -> View:
        """rowsum(o * do) - dlse, or -dlse where a kernel with this tile finds the rest itself."""
        if self.alone(config):
            return view(self.lse.ptr.new_zeros(()) if self.dlse is None else -self.dlse, *self.lse.ptr.shape)
        return self.full_delta

    @cached_property
    def full_delta(self) -> View:
        B, Hq, M, _ = self.x.sizes
        delta = torch.empty_like(self.lse.ptr)
        BLOCK_M, BLOCK_DV = 64, max(16, power_of_two(self.problem.Dv))
        if delta.numel():
            delta_kernel[(triton.cdiv(M, BLOCK_M) * B * Hq,)](
                self.o, self.do, view(self.dlse), view(delta), Hq, M,
                DV=self.problem.Dv, BLOCK_DV=BLOCK_DV, BLOCK_M=BLOCK_M, enable_fp_fusion=True,
            )  # fmt: skip
        return view(delta)

    def dq(self, wanted: Gradients) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(dq, dgate, dscale); dgate only of a gate on whole rows."""
        x, (B, Hq, M, N) = self.x, self.x.sizes
        config = choose(self.problem, "dq")
        dq = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)
        sums = torch.empty(B, Hq, M, dtype=torch.float32, device=x.q.device)
        gate_sum = torch.empty_like(sums) if wanted.gate and self.row_gate else None
        scale_sum = sums[: x.q.shape[0]] if wanted.scale else None
        if sums.numel():
            dq_kernel[(triton.cdiv(M, config.BLOCK_M) * x.q.shape[0] * Hq,)](
                self.q, self.k, self.v, self.do, view(dq), self.lse, self.delta(config), self.row_gate, view(gate_sum),
                view(scale_sum), self.logits, self.drop, B // x.q.shape[0], Hq, M, N, **self.constants(config),
            )  # fmt: skip
        else:
            dq.zero_()
        dgate = dscale = None
        if gate_sum is not None:
            t = torch.tanh(x.gate.float())  # type: ignore[union-attr]
            dgate = ((1 - t * t) * gate_sum[..., None].double().sum_to_size(t.shape)).to(x.gate.dtype)  # type: ignore[union-attr]
        if scale_sum is not None:
            dscale = scale_sum.sum(2, dtype=torch.float64).sum_to_size(x.scale.shape).to(x.scale.dtype)  # type: ignore[union-attr]
        return dq, dgate, dscale

    def dkv(self) -> tuple[Tensor, Tensor]:
        x, (B, Hq, M, N) = self.x, self.x.sizes
        config = choose(self.problem, "dkv")
        dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x.k, x.v))
        entries, Hk = x.k.shape[:2]
        if B * Hk * N:
            dkv_kernel[(triton.cdiv(N, config.BLOCK_N) * entries * Hk,)](
                self.q, self.k, self.v, self.do, view(dk), view(dv), self.lse, self.delta(config), self.row_gate, self.logits,
                self.drop, tile_ranges(x, self.options, self.free, config.BLOCK_M), B // entries, Hq, M, N,
                **self.constants(config),
            )  # fmt: skip
        else:
            dk.zero_(), dv.zero_()
        return dk, dv
