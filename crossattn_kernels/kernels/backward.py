"""Backward: delta, and what the kernels of dq, dk and dv share: what they are given, their launches, their sums.

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

from crossattn_kernels.kernels.bounds import key_bounds, tile_ranges
from crossattn_kernels.kernels.dkv import dkv_kernel
from crossattn_kernels.kernels.dq import dq_kernel
from crossattn_kernels.kernels.launch import Launcher, holds_all_keys
from crossattn_kernels.kernels.partials import by_sequence, fold
from crossattn_kernels.kernels.softmax import LOG2E, LOWEST
from crossattn_kernels.kernels.tiles import load_rows, load_vec, program, store_vec
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
        self.bounds = key_bounds(self.launch, self.x)

    @cached_property
    def gate(self) -> Tensor:
        assert self.x.gate is not None
        return torch.tanh(self.x.gate.float())

    @cached_property
    def inverse(self) -> Tensor:
        """1 / sum of the exponentials of a row."""
        return self.state[:, 1]

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
        problem = self.launch.problem
        inverse = None if problem.by_lse else self.inverse
        if not holds_all_keys(config, problem):
            return self.dlse, *self.pivot_and_delta, inverse, None, None
        near = self.lse if problem.by_lse else self.state[:, 0]
        share = self.inverse if problem.N == 1 or problem.masked or problem.biased else None
        return self.dlse, None, None, inverse, near, share

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
