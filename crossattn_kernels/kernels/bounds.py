"""What is known of a mask before any key is loaded: ends of padding, rows that see nothing, ranges of query tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels.kernels.launch import Launcher
from crossattn_kernels.kernels.scores import common_range, key_range, visible
from crossattn_kernels.kernels.tiles import at, program, store_vec
from crossattn_kernels.kernels.views import logits_view, view
from crossattn_kernels.problem import Inputs, Options

PADDING = tl.constexpr(4096)  # keys whose bits are looked at together


@triton.jit
def key_bounds_kernel(bounds, keys, N, C: tl.constexpr):
    """Of one batch entry: keys [lo, hi), which hold all that are visible, and the first run [first, last) of those."""
    b = tl.program_id(0)
    lo, hi, hole = N + 0, N * 0, N + 0
    for start in tl.range(0, N, PADDING):
        key = start + tl.arange(0, PADDING)
        seen = tl.load(at(keys, (b, key)), mask=key < N, other=0) != 0
        lo = tl.minimum(lo, tl.min(tl.where(seen, key, N)))
        hi = tl.maximum(hi, tl.max(tl.where(seen, key + 1, 0)))
        hole = tl.minimum(hole, tl.min(tl.where((key > lo) & ~seen, key, N)))
    tl.store(at(bounds, (0, b)), lo)
    tl.store(at(bounds, (1, b)), hi)
    tl.store(at(bounds, (2, b)), lo)
    tl.store(at(bounds, (3, b)), hole)


@triton.jit
def filled_kernel(filled, mask, H, M, N, C: tl.constexpr):
    """filled = 1 where no key is visible, for one tile of queries."""
    tile, b, h = program(tl.cdiv(M, C.BLOCK_M), H)
    rows = tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    lo, hi = key_range(mask, b, h, rows, M, N)
    seen = tl.zeros([C.BLOCK_M], tl.int32)
    for first in tl.range(lo // C.BLOCK_N * C.BLOCK_N, hi, C.BLOCK_N):
        keys = first + tl.arange(0, C.BLOCK_N)
        tile_seen = visible(mask, b, h, rows[:, None], keys[None, :], M, N, C)
        seen = tl.maximum(seen, tl.max(tile_seen.to(tl.int32), 1))
    store_vec(filled, b, h, rows, M, (1 - seen).to(tl.uint8))


@triton.jit
def tile_ranges_kernel(ranges, mask, H, M, N, C: tl.constexpr):
    """For one tile of queries: the keys [lo, hi) that some may see by their range, and [first, last) that all do."""
    tile, b, h = program(tl.cdiv(M, C.BLOCK_M), H)
    rows = tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    lo, hi = key_range(mask, b, h, rows, M, N)
    first, last = common_range(mask, b, h, rows, M, N)
    tl.store(at(ranges, (0, b, h, tile)), lo)
    tl.store(at(ranges, (1, b, h, tile)), hi)
    tl.store(at(ranges, (2, b, h, tile)), first)
    tl.store(at(ranges, (3, b, h, tile)), last)


@triton.jit
def pair(i, shared, hk, C: tl.constexpr):
    """(b, h) of the i-th pair that reads the keys (shared, hk)."""
    return shared + i // C.GROUP, hk * C.GROUP + i % C.GROUP


@triton.jit
def query_range(ranges, shared, hk, pairs, keys, M, C: tl.constexpr):
    """First query and one past the last of the tiles that may see one of these keys, in any of the pairs: scalars."""
    if ranges is None:
        return 0, M
    else:
        tiles = tl.cdiv(M, C.BLOCK_M)
        first, last = tiles + 0, tiles * 0
        for i in tl.range(0, pairs if ranges.VARY else 1):
            b, h = pair(i, shared, hk, C)
            for start in tl.range(0, tiles, 128):
                tile = start + tl.arange(0, 128)
                hit = overlaps(ranges, b, h, tile, keys, tile < tiles)
                first = tl.minimum(first, tl.min(tl.where(hit, tile, tiles)))
                last = tl.maximum(last, tl.max(tl.where(hit, tile + 1, 0)))
        return first * C.BLOCK_M, tl.minimum(last * C.BLOCK_M, M)


@triton.jit
def whole_queries(ranges, shared, hk, pairs, keys, lo, hi, C: tl.constexpr):
    """Part of [lo, hi), whole tiles of queries each of which sees all of these keys in all pairs; maybe empty, at lo.

    lo is a multiple of BLOCK_M.  What is hidden by more than a range is not asked for.
    """
    if ranges is None:
        return lo, hi
    else:
        end = tl.cdiv(hi, C.BLOCK_M)
        first, last = lo // C.BLOCK_M, end
        for i in tl.range(0, pairs if ranges.VARY else 1):
            b, h = pair(i, shared, hk, C)
            begin, stop = end, end  # of the first run of such tiles
            for start in tl.range(lo // C.BLOCK_M, end, 128):
                tile = start + tl.arange(0, 128)
                whole = contains(ranges, b, h, tile, keys, tile < end)
                begin = tl.minimum(begin, tl.min(tl.where(whole, tile, end)))
                stop = tl.minimum(stop, tl.min(tl.where((tile > begin) & ~whole, tile, end)))
            first, last = tl.maximum(first, begin), tl.minimum(last, stop)
        some = first < last
        return tl.where(some, first * C.BLOCK_M, lo), tl.where(some, tl.minimum(last * C.BLOCK_M, hi), lo)


@triton.jit
def among_pairs(ranges, b, h, query, keys, C: tl.constexpr):
    """Whether a tile of queries, which some pair may see by `query_range`, is one of (b, h)."""
    if ranges is None:
        return True
    elif not ranges.VARY:
        return True
    else:
        return overlaps(ranges, b, h, query // C.BLOCK_M, keys, query >= 0)


@triton.jit
def overlaps(ranges, b, h, tile, keys, exists):
    """Whether a tile of queries may see one of these keys, by its range."""
    lo = tl.load(at(ranges.found, (0, b, h, tile)), mask=exists, other=0)
    hi = tl.load(at(ranges.found, (1, b, h, tile)), mask=exists, other=0)
    return (lo <= tl.max(keys)) & (hi > tl.min(keys))


@triton.jit
def contains(ranges, b, h, tile, keys, exists):
    """Whether all queries of a tile see all of these keys, by their ranges."""
    first = tl.load(at(ranges.found, (2, b, h, tile)), mask=exists, other=0)
    last = tl.load(at(ranges.found, (3, b, h, tile)), mask=exists, other=0)
    return (first <= tl.min(keys)) & (last > tl.max(keys))


def key_bounds(launch: Launcher, x: Inputs) -> Tensor | None:
    """int32 (4, 1|B): what key_bounds_kernel finds; None without key padding, or where it is short."""
    if not x.bounded:
        return None
    assert x.keys is not None
    entries = x.keys.shape[0]
    bounds = torch.empty(4, entries, dtype=torch.int32, device=x.q.device)
    if entries:
        launch(key_bounds_kernel, lambda bounds, keys: (entries, view(bounds), view(keys), x.sizes[3]), bounds, x.keys)
    return bounds


def filled_rows(launch: Launcher, x: Inputs, options: Options, bounds: Tensor | None) -> Tensor | None:
    """uint8 (1|B, 1|Hq, M), 1 for rows that the mask leaves empty and `empty_rows` fills; None when it fills none."""
    if options.empty_rows == "zero" or options.mask(x).is_trivial():
        return None
    _, _, M, N = x.sizes
    filled = x.q.new_empty(*options.mask(x).lead(), M, dtype=torch.uint8)
    B, H = filled.shape[:2]

    def arguments(filled: Tensor, bounds: Tensor | None, *inputs: Tensor) -> tuple:
        mask = logits_view(Inputs(*inputs), options, None, bounds).mask
        return triton.cdiv(M, launch.plan.rows.BLOCK_M) * B * H, view(filled), mask, H, M, N

    if filled.numel():
        launch(filled_kernel, arguments, filled, bounds, *x)
    return filled


def tile_ranges(
    launch: Launcher, x: Inputs, options: Options, filled: Tensor | None, bounds: Tensor | None
) -> Tensor | None:
    """What tile_ranges_kernel finds for the tiles of queries of dkv_kernel, if a field of the mask is a range."""
    if x.start is x.end is bounds is None:
        return None
    B, Hq, M, N = x.sizes
    b, h = options.mask(x).lead()
    tiles = triton.cdiv(M, launch.plan.dkv.BLOCK_M)
    ranges = torch.empty(4, b, h, tiles, dtype=torch.int32, device=x.q.device)

    def arguments(ranges: Tensor, filled: Tensor | None, bounds: Tensor | None, *inputs: Tensor) -> tuple:
        return tiles * b * h, view(ranges), logits_view(Inputs(*inputs), options, filled, bounds).mask, h, M, N

    launch(tile_ranges_kernel, arguments, ranges, filled, bounds, *x)
    return ranges
