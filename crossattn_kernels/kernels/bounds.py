"""What is known of a mask before any key is loaded: rows that see nothing, and the key range of every query tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels.kernels.launch import Launcher
from crossattn_kernels.kernels.scores import key_range, visible
from crossattn_kernels.kernels.tiles import at, program, store_vec
from crossattn_kernels.kernels.views import View, logits_view, view
from crossattn_kernels.problem import Inputs, Options


@triton.jit
def free_kernel(free, mask, H, M, N, C: tl.constexpr):
    """free = 1 where no key is visible, for one tile of queries."""
    tile, b, h = program(tl.cdiv(M, C.BLOCK_M), H)
    rows = tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    lo, hi = key_range(mask, b, h, rows, M, N)
    seen = tl.zeros([C.BLOCK_M], tl.int32)
    for first in tl.range(lo, hi, C.BLOCK_N):
        keys = first + tl.arange(0, C.BLOCK_N)
        tile_seen = visible(mask, b, h, rows[:, None], keys[None, :], M, N)
        seen = tl.maximum(seen, tl.max(tile_seen.to(tl.int32), 1))
    store_vec(free, b, h, rows, M, (1 - seen).to(tl.uint8))


class Ranges(NamedTuple):
    """Keys [lo, hi) that each tile of queries may see."""

    lo: View  # (B, Hq, tiles)
    hi: View  # (B, Hq, tiles)


@triton.jit
def tile_ranges_kernel(ranges, mask, H, M, N, C: tl.constexpr):
    """The range of one tile of queries."""
    tile, b, h = program(tl.cdiv(M, C.BLOCK_M), H)
    lo, hi = key_range(mask, b, h, tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M), M, N)
    tl.store(at(ranges.lo, (b, h, tile)), lo)
    tl.store(at(ranges.hi, (b, h, tile)), hi)


@triton.jit
def query_range(ranges, b, h, keys, M, BLOCK_M: tl.constexpr):
    """First query and one past the last of the tiles that may see one of these keys: scalars."""
    if ranges is None:
        return 0, M
    else:
        tiles = tl.cdiv(M, BLOCK_M)
        first, last = tiles + 0, tiles * 0
        for start in tl.range(0, tiles, 128):
            tile = start + tl.arange(0, 128)
            hit = overlaps(ranges, b, h, tile, keys, tile < tiles)
            first = tl.minimum(first, tl.min(tl.where(hit, tile, tiles)))
            last = tl.maximum(last, tl.max(tl.where(hit, tile + 1, 0)))
        return first * BLOCK_M, tl.minimum(last * BLOCK_M, M)


@triton.jit
def overlaps(ranges, b, h, tile, keys, exists):
    """Whether a tile of queries may see one of these keys, by its range."""
    if ranges is None:
        return True
    else:
        lo = tl.load(at(ranges.lo, (b, h, tile)), mask=exists, other=0)
        hi = tl.load(at(ranges.hi, (b, h, tile)), mask=exists, other=0)
        return (lo <= tl.max(keys)) & (hi > tl.min(keys))


def free_rows(launch: Launcher, x: Inputs, options: Options) -> Tensor | None:
    """uint8 (1|B, 1|Hq, M), 1 for rows that the mask leaves empty and `empty_rows` fills; None when it fills none."""
    if options.empty_rows == "zero" or options.mask(x).is_trivial():
        return None
    _, _, M, N = x.sizes
    free = x.q.new_empty(*options.mask(x).lead(), M, dtype=torch.uint8)
    B, H = free.shape[:2]

    def arguments(free: Tensor, *inputs: Tensor) -> tuple:
        mask = logits_view(Inputs(*inputs), options, None).mask
        return triton.cdiv(M, launch.plan.rows.BLOCK_M) * B * H, view(free), mask, H, M, N

    if free.numel():
        launch(free_kernel, arguments, free, *x)
    return free


def tile_ranges(
    launch: Launcher, x: Inputs, options: Options, free: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """First and one past the last key of every tile of queries of dkv_kernel, if a field of the mask is a range."""
    if x.start is None and x.end is None:
        return None, None
    B, Hq, M, N = x.sizes
    b, h = options.mask(x).lead()
    tiles = triton.cdiv(M, launch.plan.dkv.BLOCK_M)
    lo, hi = torch.empty(2, b, h, tiles, dtype=torch.int32, device=x.q.device)

    def arguments(lo: Tensor, hi: Tensor, free: Tensor | None, *inputs: Tensor) -> tuple:
        return tiles * b * h, Ranges(view(lo), view(hi)), logits_view(Inputs(*inputs), options, free).mask, h, M, N

    launch(tile_ranges_kernel, arguments, lo, hi, free, *x)
    return lo, hi


def ranges_view(lo: Tensor | None, hi: Tensor | None, B: int, Hq: int) -> Ranges | None:
    return None if lo is None or hi is None else Ranges(view(lo, B, Hq, lo.shape[2]), view(hi, B, Hq, hi.shape[2]))
