"""Fragments of matrices in registers, matrices in shared memory, and products of them.

A fragment is described by the row and the column of every element: arrays of (lane, register, part of the register).
Products are summed in fp64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.arithmetic import widen_bf16
from tests.ptx.memory import POISON, Shared

LANE = np.arange(32)[:, None, None]
GROUP, MEMBER = LANE // 4, LANE % 4


class Fragment(NamedTuple):
    rows: Any  # (lane, register, part)
    columns: Any

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.rows.max()) + 1, int(self.columns.max()) + 1

    def matrices(self, values: Any) -> Any:
        """(warp, row, column) from (register, thread, part)."""
        registers, threads, parts = values.shape
        found = np.empty((threads // 32, *self.shape), values.dtype)
        by_warp = values.transpose(1, 0, 2).reshape(-1, 32, registers, parts)
        found[:, self.rows, self.columns] = by_warp
        return found

    def registers(self, matrices: Any) -> Any:
        """(register, thread) from (warp, row, column), one element a register."""
        return matrices[:, self.rows, self.columns][..., 0].reshape(-1, self.rows.shape[1]).T


def left(size: int) -> Fragment:
    """(16, 32 bytes) of elements of `size` bytes, in 4 registers."""
    register, part = np.arange(4)[:, None], np.arange(4 // size)
    rows, columns = GROUP + 8 * (register % 2), MEMBER * len(part) + part + 16 // size * (register // 2)
    return Fragment(*np.broadcast_arrays(rows, columns))


def right(size: int) -> Fragment:
    """(32 bytes, 8) in 2 registers."""
    register, part = np.arange(2)[:, None], np.arange(4 // size)
    rows, columns = MEMBER * len(part) + part + 16 // size * register, GROUP
    return Fragment(*np.broadcast_arrays(rows, columns))


def sums(columns: int) -> Fragment:
    """(16, columns) in fp32."""
    register = np.arange(columns // 2)[:, None]
    rows = GROUP + 8 * (register // 2 % 2)
    return Fragment(*np.broadcast_arrays(rows, 2 * MEMBER + register % 2 + 8 * (register // 4)))


def elements(kind: str, raw: Any) -> Any:
    """Values in fp64 of operands in 4-byte registers or in elements; the last axis grows where a register holds two."""
    if kind == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind == "bf16":
        return widen_bf16(raw.view(np.uint16)).astype(np.float64)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float64)
    raise NotImplementedError(f"products of {kind}")


SIZES = dict(bf16=2, f16=2, tf32=4)


def product(kind: str) -> Callable[[Any, Any, Any], Any]:
    """mma.m16n8: (register, thread) of the sum from those of a, b and c."""
    size = SIZES[kind]
    a_of, b_of, c_of = left(size), right(size), sums(8)

    def multiply(a: Any, b: Any, c: Any) -> Any:
        x, y = a_of.matrices(elements(kind, a[..., None])), b_of.matrices(elements(kind, b[..., None]))
        total = x @ y + c_of.matrices(c.view(np.float32)[..., None])
        return c_of.registers(total.astype(np.float32)).view(np.uint32)

    return multiply


# ---- 8 x 8 matrices of 2-byte elements between shared memory and registers ----


def _spread(transposed: bool) -> Any:
    """(lane, part): row and column of the two elements that a lane holds of each matrix."""
    near, far = GROUP[:, 0], 2 * MEMBER[:, 0] + np.arange(2)
    return np.broadcast_arrays(*((far, near) if transposed else (near, far)))


def _rows(addresses: Any, count: int) -> tuple[Any, Any]:
    """Lanes 8i ... 8i + 7 of a warp name the rows of matrix i."""
    lanes = np.arange(addresses.size)
    lanes = lanes[lanes % 32 < 8 * count]
    return lanes, addresses[lanes]


def load_matrices(shared: Shared, addresses: Any, count: int, transposed: bool) -> Any:
    """(register, thread)"""
    matrices = shared.load(*_rows(addresses, count), 2, 8).reshape(-1, count, 8, 8)
    pairs = np.ascontiguousarray(matrices[(..., *_spread(transposed))])
    return pairs.view(np.uint32)[..., 0].transpose(1, 0, 2).reshape(count, -1)


def store_matrices(shared: Shared, addresses: Any, registers: Any, transposed: bool) -> None:
    count = len(registers)
    pairs = np.ascontiguousarray(registers).view(np.uint16).reshape(count, -1, 32, 2)
    matrices = np.empty((pairs.shape[1], count, 8, 8), np.uint16)
    matrices[(..., *_spread(transposed))] = pairs.transpose(1, 0, 2, 3)
    shared.store(*_rows(addresses, count), matrices.reshape(-1, 8))


# ---- products that run beside the program (Hopper) ----

SWIZZLED = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row of the pattern


def place(descriptor: int, rows: int, size: int, transposed: bool) -> Any:
    """(row, k): byte addresses of a matrix of 32 bytes of k; `transposed` where rows are contiguous."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    span = SWIZZLED[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise NotImplementedError("a pattern that does not start at a multiple of its size")
    row, k = np.arange(rows)[:, None], np.arange(32 // size)[None]
    if transposed:
        across, along = (stride, leading) if span == 16 else (leading, stride)
        linear = row * size % span + row * size // span * across + k % 8 * span + k // 8 * along
    elif span == 16:
        linear = row % 8 * span + row // 8 * stride + k * size % 16 + k * size // 16 * leading
    else:
        linear = row % 8 * span + row // 8 * stride + k * size
    linear = start + linear
    return linear ^ (linear >> 7 & span // 16 - 1) << 4


class Products:
    """wgmma: operands are read and sums are written when a product is waited for; until then its registers hold NaN.

    With `eager`, at once.  A correct program cannot tell.
    """

    def __init__(self, shared: Shared, registers: Any, eager: bool = False) -> None:
        self.shared, self.registers, self.eager = shared, registers, eager
        self.open: list[Any] = []
        self.groups: list[list[Any]] = []
        self.sums: dict[tuple[int, ...], Any] = {}  # of the products in flight
        self.fenced: Any = None  # the registers at the last fence

    def issue(self, to: tuple[int, ...], a: Any, b: Any, kind: str, transposed: tuple[bool, bool], add: Any) -> None:
        """to: registers of the sums; a: registers, or descriptors of every thread as b."""
        size, N = SIZES[kind], 2 * len(to)
        places = [None if isinstance(x, tuple) else self._places(x, rows, size, t)
                  for x, rows, t in zip((a, b), (64, N), transposed)]  # fmt: skip
        held = [self._held(p, size) for p in places if p is not None]
        if to not in self.sums:
            self._check_fence(list(to))
            if any(set(to) & set(others) for others in self.sums):
                raise NotImplementedError("products in flight share some of their registers")
            self.sums[to] = self.registers[list(to)]
            self.registers[list(to)] = POISON << 16 | POISON
        c_of, a_of = sums(N), left(size)
        adds = add.reshape(-1, 128)[:, :1, None].copy()

        def run() -> None:
            if places[0] is None:
                x = a_of.matrices(elements(kind, self.registers[list(a)][..., None])).reshape(-1, 64, 32 // size)
            else:
                x = self._elements(kind, places[0])
            y = self._elements(kind, places[1])
            c = c_of.matrices(self.sums[to].view(np.float32)[..., None]).reshape(-1, 64, N)
            total = x @ y.transpose(0, 2, 1) + np.where(adds, c, 0)
            by_warp = total.reshape(-1, 16, N).astype(np.float32)
            self.sums[to] = np.ascontiguousarray(c_of.registers(by_warp)).view(np.uint32)
            for h in held:
                self.shared.release(h)

        self.open.append((to, run))
        if self.eager:
            self.commit()
            self.wait(0)

    def _places(self, descriptors: Any, rows: int, size: int, transposed: bool) -> Any:
        by_group = descriptors.reshape(-1, 128)
        if (by_group != by_group[:, :1]).any():
            raise AssertionError("the threads of a group name different matrices")
        at = np.stack([place(int(d), rows, size, transposed) for d in by_group[:, 0]])
        if at.max() + size > self.shared.size:
            raise AssertionError(f"a matrix ends at shared address {at.max() + size} of {self.shared.size}")
        return at

    def _elements(self, kind: str, at: Any) -> Any:
        size = SIZES[kind]
        return elements(kind, self.shared.views[size][at // size]).reshape(at.shape)

    def _held(self, at: Any, size: int) -> Any:
        """Its bytes are being read, by the four warps of the group, until the product is done."""
        if not self.shared.races:
            return None
        at = (at.reshape(len(at), -1, 1) + np.arange(size)).reshape(len(at), -1)
        if self.shared.unfenced[at].any():
            raise AssertionError("a product reads what threads have written, without a fence between them")
        # each warp starts it, so that none may have written since the last barrier, not even one of the four
        if self.shared.writers[at].any():
            raise AssertionError("a race: a product reads what a warp writes, without a barrier between them")
        by = np.broadcast_to((np.uint32(15) << (4 * np.arange(len(at), dtype=np.uint32)))[:, None], at.shape)
        return self.shared.count(at, by, write=False, hold=True)

    def fence(self) -> None:
        if self.shared.races:
            self.fenced = self.registers.copy()

    def copied(self, to: int, source: int, mask: Any) -> None:
        """A copy counts as made before the fence if what it copies was there: ptxas makes it then."""
        if self.fenced is not None:
            np.copyto(self.fenced[to], self.fenced[source], where=True if mask is None else mask)

    def _check_fence(self, rows: list[int]) -> None:
        # of the sums only: LLVM sinks the last conversions of a left operand below the fence, against the letter of the
        # manual, and ptxas places the fence of the chip (WARPGROUP.ARRIVE) behind them
        if self.shared.races and (self.fenced is None or (self.registers[rows] != self.fenced[rows]).any()):
            raise AssertionError("sums were written after the last wgmma.fence")

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, allowed: int) -> None:
        while len(self.groups) > allowed:
            for _, run in self.groups.pop(0):
                run()
        busy = {to for group in [*self.groups, self.open] for to, _ in group}
        for to in [to for to in self.sums if to not in busy]:
            self.registers[list(to)] = self.sums.pop(to)
            if self.shared.races:
                self.fenced[list(to)] = self.registers[list(to)]
