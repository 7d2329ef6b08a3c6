"""How long the products of a tile take, from its sizes: what tells two tiles apart that both keep to registers.

A model, from published rates of dense 16-bit products of Ampere and Hopper and of shared memory; nothing here was
timed.  Blackwell's tensor memory is not in it: there the order of tiles is that of Ampere's.
"""

from __future__ import annotations

from typing import NamedTuple

from crossattn_kernels.tuning import Config

ENTRIES = 128 * 128  # logits that cycles are counted for
BYTES, BANDWIDTH = 2, 128  # of an element; of shared memory in a cycle of a multiprocessor
WIDE_RATE, NARROW_RATE = 2048, 1024  # multiplications in a cycle: of Hopper's wgmma, and of mma.sync since Ampere
REARRANGED = 2  # as often as their operands come from shared memory, results of narrow products go through it


class Product(NamedTuple):
    """a (rows, depth) times b (depth, cols)."""

    rows: int
    cols: int
    depth: int
    shared: bool  # whether a is read from shared memory; otherwise it is a result in registers
    feeds: bool = False  # whether the result becomes an `a`


def products(kernel: str, config: Config, D: int) -> list[Product]:
    """Those of one tile of logits, as the kernels write them."""
    M, N = config.BLOCK_M, config.BLOCK_N
    if kernel == "forward":
        return [Product(M, N, D, True), Product(M, D, N, True)]
    if kernel == "bias_grad":
        return [Product(M, N, D, True)] * 2
    if kernel == "dq":
        return [Product(M, N, D, True, feeds=True)] * 2 + [Product(M, D, N, False)]
    logits, sums = [Product(N, M, D, True, feeds=True)], [Product(N, D, M, False)]
    if kernel == "dkv":
        return logits * (2 if D <= 128 else 3) + sums * 2  # above, dk and dv are two launches (`tuning.dk_dv_apart`)
    return [*logits * 2, *sums * 2, Product(D, M, N, True)]


def cycles(kernel: str, config: Config, D: int, wide: bool) -> float:
    """Cycles that the products for 128 x 128 logits take a multiprocessor; wide: whether it has wgmma."""
    one = sum(
        _wide(p, config.num_warps) if wide and p.rows >= 64 and config.num_warps >= 4 else _narrow(p, config.num_warps)
        for p in products(kernel, config, D)
    )
    return one * ENTRIES / (config.BLOCK_M * config.BLOCK_N)


def _wide(p: Product, warps: int) -> float:
    """Four warps multiply 64 rows, 16 deep, by columns that they share; both operands come from shared memory, or b.

    With more warps than rows for them, each four take a part of the columns.  All of them need the whole row of a
    result that becomes a left operand, so each makes it.
    """
    groups = warps // 4
    apart = max(1, groups * 64 // p.rows)  # groups that share the columns of 64 rows
    width = max(8, p.cols // apart)
    steps = p.rows / 64 * p.depth / 16 * (p.cols // width) * (apart if p.feeds else 1)
    return steps * wide_product(width, p.shared)


def wide_product(cols: int, shared: bool) -> float:
    """Cycles of one wgmma: 64 rows, in registers or shared memory, by columns in shared memory, 16 deep in 16 bits."""
    return max(64 * 16 * cols / WIDE_RATE, (64 * shared + cols) * 16 * BYTES / BANDWIDTH)


def _narrow(p: Product, warps: int) -> float:
    """Each warp multiplies a part of the rows by a part of the columns, and reads both for itself."""
    splits = [(n, warps // n) for n in (1, 2, 4, 8) if n <= warps and n * 16 <= max(16, p.rows)]
    read = min(warps * (p.shared * p.rows / n + p.cols / m) for n, m in splits)
    return max(p.rows * p.cols / NARROW_RATE, REARRANGED * read * BYTES / BANDWIDTH) * p.depth
