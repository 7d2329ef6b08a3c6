"""Sums over programs: each stores a partial sum in fp32, and one kernel adds them in their order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels.kernels.launch import Launcher


@triton.jit
def fold_kernel(parts, whole, size, splits, C: tl.constexpr):
    """The sum over splits, in their order, of BLOCK_M elements."""
    i = tl.cast(tl.program_id(0), tl.int64) * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    total = tl.zeros([C.BLOCK_M], tl.float32)
    for split in tl.range(0, splits):
        total += tl.load(parts + tl.cast(split, tl.int64) * size + i, mask=i < size, other=0.0)
    tl.store(whole + i, total.to(whole.dtype.element_ty), mask=i < size)


def by_sequence(t: Tensor, parts: int = 1) -> Tensor:
    """Room for a gradient of q, k or v, laid out as (B, sequence, H, D), or for fp32 partial sums of it."""
    B, H, S, D = t.shape
    dtype = t.dtype if parts == 1 else torch.float32
    return t.new_empty_strided((parts * B, H, S, D), (S * H * D, D, H * D, 1), dtype=dtype)


def fold(launch: Launcher, parts: Tensor, whole: Tensor, name: str) -> Tensor:
    """`whole`, filled with the sum of `parts`, each of which lies in memory as it does; `name` tells launches apart."""
    splits = parts.shape[0] // whole.shape[0]

    def arguments(parts: Tensor, whole: Tensor) -> tuple:
        return triton.cdiv(whole.numel(), launch.plan.fold.BLOCK_M), parts, whole, whole.numel(), splits

    launch(fold_kernel, arguments, parts, whole, label=name)
    return whole
