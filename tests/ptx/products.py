"""Compiled products against NumPy's: the fragments, the swizzles and the asynchrony of tensor cores as Triton has them.

Integers small enough that every sum is exact.  `python -m tests.ptx.products sm_90` prints a line a product.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tests.ptx.driver import executing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
ALLOWED = {"bf16": "ieee", "fp16": "ieee", "tf32": "tf32"}


class Product(NamedTuple):
    """sum over steps of (x y) z, where x y stays in registers."""

    dtype: str
    M: int
    N: int
    K: int
    x_turned: bool = False  # stored as its transpose
    y_turned: bool = False
    z_turned: bool = False
    stages: int = 3
    warps: int = 4


@triton.jit
def tile(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None]
    if TURNED:
        return tl.load(ptr + tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None]).T
    return tl.load(ptr + rows * COLUMNS + columns)


@triton.jit
def product_kernel(
    x, y, z, out, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    X: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr, ALLOWED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = sum_i (x y_i) z_i for x (M, K), y_i (K, N), z_i (N, K)."""
    left = tile(x, M, K, X)
    total = tl.zeros([M, K], tl.float32)
    for i in tl.range(0, steps, num_stages=STAGES):
        inner = tl.dot(left, tile(y + i * K * N, K, N, Y), input_precision=ALLOWED)
        total = tl.dot(inner.to(left.dtype), tile(z + i * K * N, N, K, Z), total, input_precision=ALLOWED)
    tl.store(out + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None], total)


def products() -> Iterator[Product]:
    for dtype in DTYPES:
        yield from (Product(dtype, 64, 64, 64, *turned) for turned in itertools.product((False, True), repeat=3))
        yield from (Product(dtype, *sizes) for sizes in ((16, 16, 16), (32, 64, 32), (64, 16, 128), (128, 32, 64)))
        yield Product(dtype, 128, 128, 32, y_turned=True, warps=8)
        yield Product(dtype, 128, 32, 128, z_turned=True, stages=2, warps=8)


def wrong(p: Product, steps: int = 4) -> float:
    """The largest error, which should be 0; NaN where something was read too early."""
    g = torch.Generator().manual_seed(0)

    def stored(*shape: int, turned: bool) -> tuple[Any, Any]:
        values = torch.randint(-1, 2, shape, generator=g).to(DTYPES[p.dtype])
        return values.float(), (values.mT if turned else values).contiguous()

    x, x_stored = stored(p.M, p.K, turned=p.x_turned)
    y, y_stored = stored(steps, p.K, p.N, turned=p.y_turned)
    z, z_stored = stored(steps, p.N, p.K, turned=p.z_turned)
    out = torch.full((p.M, p.K), torch.nan)
    product_kernel[(1,)](
        x_stored, y_stored, z_stored, out, steps, p.M, p.N, p.K, p.x_turned, p.y_turned, p.z_turned,
        ALLOWED[p.dtype], p.stages, num_warps=p.warps,
    )  # fmt: skip
    return (out - (x @ y @ z).sum(0)).abs().max().item()


def main() -> int:
    arch, failed = sys.argv[1], 0
    for p in products():
        for eager in (False, True):
            product_kernel.device_caches.clear()
            with executing(arch, eager=eager):
                try:
                    error = wrong(p)
                except (AssertionError, NotImplementedError) as refused:
                    error = repr(refused)
            failed += error != 0
            print(f"{'ok    ' if error == 0 else 'FAILED'} {p}{' eager' if eager else ''}: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
