"""Backward in two passes: dq by tiles of queries, dk and dv by tiles of keys; p is made again, no atomics."""

from __future__ import annotations

from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels.kernels.bounds import overlaps, query_range, tile_ranges
from crossattn_kernels.kernels.scores import head_scale, key_range, logit_grad, scores, through_softcap, touches
from crossattn_kernels.kernels.softmax import across, down, load_row, softmax_grad
from crossattn_kernels.kernels.tiles import dot, finite, load_rows, load_vec, program, store_rows, store_vec
from crossattn_kernels.kernels.views import Rows, dropout_view, launch_options, logits_view, row_gate_view, view
from crossattn_kernels.problem import Inputs, Options, Problem
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
def dq_kernel(q, k, v, do, dq, gate_sum, scale_sum, known, logits, drop, batches, Hq, M, N, C: tl.constexpr):
    """dq = scale * ds k for BLOCK_M queries of one (b, h), summed over the `batches` that share them.

    On the way: gate_sum = rowsum(p * dy vᵀ) = rowsum(dy * o), and scale_sum = rowsum(q * ds k) = rowsum(ds * q kᵀ).
    """
    tile, shared, h = program(tl.cdiv(M, C.BLOCK_M), Hq)
    rows = tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    d, dv = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_DV)
    q_tile = load_rows(q, shared, h, rows, d, M, C.D)  # (BLOCK_M, BLOCK_D)
    acc = tl.zeros([C.BLOCK_M, C.BLOCK_D], tl.float32)
    scale = head_scale(logits, shared, h)
    for entry in tl.range(0, batches):
        b = shared + entry
        do_tile = load_rows(do, b, h, rows, dv, M, C.DV)  # (BLOCK_M, BLOCK_DV)
        row = down(load_row(known, b, h, rows, M))
        gated = tl.zeros([C.BLOCK_M], tl.float32)
        lo, hi = key_range(logits.mask, b, h, rows, M, N)
        for first in tl.range(lo // C.BLOCK_N * C.BLOCK_N, hi, C.BLOCK_N):
            keys = first + tl.arange(0, C.BLOCK_N)
            if touches(logits.mask, b, h, rows[:, None], keys[None, :], M, N):
                k_tile = load_rows(k, b, h // C.GROUP, keys, d, N, C.D)  # (BLOCK_N, BLOCK_D)
                v_tile = load_rows(v, b, h // C.GROUP, keys, dv, N, C.DV)  # (BLOCK_N, BLOCK_DV)
                qk = dot(q_tile, k_tile.T, None, C.TF32)  # (BLOCK_M, BLOCK_N)
                dyv = dot(do_tile, v_tile.T, None, C.TF32)
                s = scores(qk, logits, scale, b, h, rows[:, None], keys[None, :], M, N)
                p, ds = softmax_grad(s, dyv, row, drop, b, h, rows[:, None], keys[None, :], 1, C.ALONE)
                if gate_sum is not None:
                    gated += tl.sum(tl.where(p == 0.0, 0.0, p * dyv), 1)
                ds = through_softcap(logit_grad(ds, logits, b, h, rows[:, None], M), qk, logits, scale)
                k_tile = finite(k_tile) if C.HIDES else k_tile
                acc = dot(ds.to(k_tile.dtype), k_tile, acc, C.TF32)
        if gate_sum is not None:
            store_vec(gate_sum, b, h, rows, M, gated)
    if scale_sum is not None:
        store_vec(scale_sum, shared, h, rows, M, tl.sum(acc * q_tile.to(tl.float32), 1))
    store_rows(dq, shared, h, rows, d, M, C.D, acc * scale)


@triton.jit
def dkv_kernel(q, k, v, do, dk, dv, known, ranges, logits, drop, batches, Hq, M, N, C: tl.constexpr):
    """dv = pᵀ do and dk = scale * dsᵀ q for BLOCK_N keys of one (b, key head).

    Both are summed over the GROUP query heads and the `batches` that share the keys.  sᵀ = k qᵀ is computed as such: no
    product takes a transposed accumulator.
    """
    tile, shared, hk = program(tl.cdiv(N, C.BLOCK_N), Hq // C.GROUP)
    keys = tile * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    d, e = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_DV)
    k_tile = load_rows(k, shared, hk, keys, d, N, C.D)  # (BLOCK_N, BLOCK_D)
    v_tile = load_rows(v, shared, hk, keys, e, N, C.DV)  # (BLOCK_N, BLOCK_DV)
    dk_acc = tl.zeros([C.BLOCK_N, C.BLOCK_D], tl.float32)
    dv_acc = tl.zeros([C.BLOCK_N, C.BLOCK_DV], tl.float32)
    for i in tl.range(0, batches * C.GROUP):
        b, h = shared + i // C.GROUP, hk * C.GROUP + i % C.GROUP
        scale = head_scale(logits, b, h)
        lo, hi = query_range(ranges, b, h, keys, M, C.BLOCK_M)
        for first in tl.range(lo, hi, C.BLOCK_M):
            rows = first + tl.arange(0, C.BLOCK_M)
            seen = overlaps(ranges, b, h, first // C.BLOCK_M, keys, True)
            if seen & touches(logits.mask, b, h, rows[None, :], keys[:, None], M, N):
                q_tile = load_rows(q, b, h, rows, d, M, C.D)  # (BLOCK_M, BLOCK_D)
                do_tile = load_rows(do, b, h, rows, e, M, C.DV)  # (BLOCK_M, BLOCK_DV)
                row = across(load_row(known, b, h, rows, M))
                kq = dot(k_tile, q_tile.T, None, C.TF32)  # (BLOCK_N, BLOCK_M)
                vdy = dot(v_tile, do_tile.T, None, C.TF32)
                s = scores(kq, logits, scale, b, h, rows[None, :], keys[:, None], M, N)
                p, ds = softmax_grad(s, vdy, row, drop, b, h, rows[None, :], keys[:, None], 0, C.ALONE)
                ds = through_softcap(logit_grad(ds, logits, b, h, rows[None, :], M), kq, logits, scale) * scale
                dv_acc = dot((p * row.gate).to(do_tile.dtype), do_tile, dv_acc, C.TF32)
                dk_acc = dot(ds.to(q_tile.dtype), q_tile, dk_acc, C.TF32)
    store_rows(dk, shared, hk, keys, d, N, C.D, dk_acc)
    store_rows(dv, shared, hk, keys, e, N, C.DV, dv_acc)


def by_sequence(t: Tensor, fill: bool) -> Tensor:
    """A gradient of q, k or v, (B, H, sequence, D), laid out as (B, sequence, H, D); zeros if no kernel fills it."""
    like = t.transpose(1, 2)
    fresh = torch.zeros_like if fill else torch.empty_like
    return fresh(like, memory_format=torch.contiguous_format).transpose(1, 2)


class Backward:
    """One backward: what its kernels share, and their launches."""

    def __init__(
        self,
        dy: Tensor,
        dlse: Tensor | None,
        x: Inputs,
        options: Options,
        o: Tensor,
        lse: Tensor,
        state: Tensor,
        free: Tensor | None,
    ) -> None:
        B = x.sizes[0]
        self.x, self.options, self.problem, self.free = x, options, Problem.of(x), free
        self.dy, self.dlse, self.o, self.lse, self.state = dy, dlse, o, lse, state
        self.q, self.k, self.v = (view(t, B, *t.shape[1:]) for t in (x.q, x.k, x.v))
        # a gate on whole rows is applied inside the kernels, one that varies along Dv here
        self.do = dy if not x.gate_varies else (self.gate * dy).to(dy.dtype)
        self.do = self.do if self.do.stride(3) == 1 else self.do.contiguous()
        self.logits, self.drop = logits_view(x, options, free), dropout_view(x, options)

    @cached_property
    def gate(self) -> Tensor:
        assert self.x.gate is not None
        return torch.tanh(self.x.gate.float())

    @cached_property
    def full_delta(self) -> Tensor:
        B, Hq, M, _ = self.x.sizes
        delta = torch.empty_like(self.lse)
        BLOCK_M, BLOCK_DV = 64, max(16, power_of_two(self.problem.Dv))
        if delta.numel():
            delta_kernel[(triton.cdiv(M, BLOCK_M) * B * Hq,)](
                view(self.o), view(self.do), view(self.dlse), view(delta), Hq, M,
                DV=self.problem.Dv, BLOCK_DV=BLOCK_DV, BLOCK_M=BLOCK_M, enable_fp_fusion=True,
            )  # fmt: skip
        return delta

    def known(self, config: Config) -> Rows:
        high, inverse = (None, None) if self.options.chunk else self.state.unbind(1)
        if self.problem.N > config.BLOCK_N or self.options.chunk:
            delta = self.full_delta
        else:
            delta = self.lse.new_zeros(()) if self.dlse is None else -self.dlse
        return Rows(view(self.lse), view(high), view(inverse), view(delta, *self.lse.shape), row_gate_view(self.x))

    def launch(self, kernel: str) -> tuple[Config, dict]:
        config = choose(self.problem, kernel)
        return config, launch_options(self.problem, self.options, config)

    def dq(self, gate: bool, scale: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(dq, dgate, dscale), the latter two if asked for; dgate only of a gate on whole rows."""
        x, (B, Hq, M, N) = self.x, self.x.sizes
        entries = x.q.shape[0]
        config, launch = self.launch("dq")
        dq = by_sequence(x.q, fill=not B * N)
        gate_sum = torch.zeros_like(self.lse) if gate else None
        scale_sum = torch.zeros_like(self.lse[:entries]) if scale else None
        if B * Hq * M * N:
            dq_kernel[(triton.cdiv(M, config.BLOCK_M) * entries * Hq,)](
                self.q, self.k, self.v, view(self.do), view(dq), view(gate_sum), view(scale_sum), self.known(config),
                self.logits, self.drop, B // entries, Hq, M, N, **launch,
            )  # fmt: skip
        dgate = None if gate_sum is None else self.through_tanh(gate_sum[..., None])
        # sums of rows are fp32; the sum of them is not, as terms of either sign cancel
        dscale = None if scale_sum is None else scale_sum.sum(2, dtype=torch.float64).sum_to_size(x.scale.shape)  # type: ignore[union-attr]
        return dq, dgate, dscale

    def dkv(self) -> tuple[Tensor, Tensor]:
        x, (B, Hq, M, N) = self.x, self.x.sizes
        entries, Hk = x.k.shape[:2]
        config, launch = self.launch("dkv")
        dk, dv = (by_sequence(t, fill=not B * M) for t in (x.k, x.v))
        if B * Hk * N * M:
            dkv_kernel[(triton.cdiv(N, config.BLOCK_N) * entries * Hk,)](
                self.q, self.k, self.v, view(self.do), view(dk), view(dv), self.known(config),
                tile_ranges(x, self.options, self.free, config.BLOCK_M), self.logits, self.drop,
                B // entries, Hq, M, N, **launch,
            )  # fmt: skip
        return dk, dv

    def through_tanh(self, dt: Tensor) -> Tensor:
        """Gradient of the raw gate from that of its tanh, reduced to the gate's shape."""
        return (1 - self.gate * self.gate) * dt.double().sum_to_size(self.gate.shape)

    def dgate_by_channel(self) -> Tensor:
        return self.through_tanh(self.dy.float() * self.o)
