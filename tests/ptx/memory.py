"""Global memory is this process's own, within the tensors of a launch; shared memory is poisoned and watched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import triton

POISON = 0x7FFF  # NaN in every floating-point type, a wild address, a large integer
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class _Everything:
    """The whole address space as bytes from 16 on; nothing is read until it is indexed."""

    __array_interface__ = dict(version=3, shape=(2**47 - 32,), typestr="|u1", data=(16, False))


SPACE = np.asarray(_Everything())


class Global:
    """The tensors that a launch may touch, from the first element to the last of each."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        spans: list[list[int]] = []
        for t in sorted((t for t in tensors if t.numel()), key=torch.Tensor.data_ptr):
            start = t.data_ptr()
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
            end = start + (last + 1) * t.element_size()
            if spans and start < spans[-1][1]:
                spans[-1][1] = max(end, spans[-1][1])
            else:
                spans.append([start, end])
        # the first belongs to nobody, so that no address is before all
        bounds = np.array([[0, 0], *spans], np.int64)
        self.starts, self.ends = bounds[:, 0].copy(), bounds[:, 1].copy()

    def load(self, lanes: Any, addresses: Any, size: int, count: int) -> Any:
        """(lane, element): `count` elements of `size` bytes a lane."""
        return self._elements(size, count)[self._rows(lanes, addresses, size * count)]

    def store(self, lanes: Any, addresses: Any, values: Any) -> None:
        size, count = values.itemsize, values.shape[1]
        rows = self._rows(lanes, addresses, size * count)
        elements = self._elements(size, count)
        elements[rows] = values
        agreed(lanes, elements[rows] == values)

    @staticmethod
    def _elements(size: int, count: int) -> Any:
        width = size * count
        return SPACE[: SPACE.size // width * width].view(UNSIGNED[size]).reshape(-1, count)

    def _rows(self, lanes: Any, addresses: Any, width: int) -> Any:
        at = np.searchsorted(self.starts, addresses, "right") - 1
        wrong = (at < 1) | (addresses + width > self.ends[at])
        if wrong.any():
            i = int(np.argmax(wrong))
            near = f", {addresses[i] + width - self.ends[at[i]]} past the end of a tensor" if at[i] > 0 else ""
            raise AssertionError(f"thread {lanes[i]}: {width} bytes at {addresses[i]:#x} lie in no tensor{near}")
        aligned(lanes, addresses, width)
        return addresses // width - 16 // width


def aligned(lanes: Any, addresses: Any, width: int) -> None:
    wrong = addresses % width != 0
    if wrong.any():
        i = int(np.argmax(wrong))
        raise AssertionError(f"thread {lanes[i]}: {width} bytes at {addresses[i]:#x}, which is not a multiple")


def agreed(lanes: Any, kept: Any) -> None:
    """Threads that store to one place at once store one value."""
    if not kept.all():
        raise AssertionError(
            f"thread {lanes[int(np.argmin(kept.all(1)))]}: another stores something else to the same place"
        )


class Shared:
    """The shared memory of one program.

    With `races`: between two barriers, what one warp writes no other may touch; what is in flight counts on both sides
    of a barrier; and what threads have written an asynchronous product reads after a fence only.
    """

    def __init__(self, size: int, races: bool = True) -> None:
        self.size, self.races = size, races
        self.bytes = np.zeros(-(-size // 16) * 16, np.uint8)
        self.views = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self.readers, self.writers = (np.zeros(self.bytes.size, np.uint32) for _ in range(2))
        self.unfenced = np.zeros(self.bytes.size, bool)
        self.reset()

    def reset(self) -> None:
        self.views[2][:] = POISON
        self.held: list[tuple[Any, Any, Any]] = []
        self.unfenced[:] = False
        self.barrier()

    def load(self, lanes: Any, addresses: Any, size: int, count: int) -> Any:
        at = self._elements(lanes, addresses, size, count)
        self.touch(lanes, addresses, size * count, write=False)
        return self.views[size][at]

    def store(self, lanes: Any, addresses: Any, values: Any) -> None:
        size, count = values.itemsize, values.shape[1]
        at = self._elements(lanes, addresses, size, count)
        before = self.views[size][at]
        self.views[size][at] = values
        agreed(lanes, self.views[size][at] == values)
        # warps that hold copies of a value may all write it
        self.touch(lanes, addresses, size * count, write=True, same=np.repeat(before == values, size, 1))

    def _elements(self, lanes: Any, addresses: Any, size: int, count: int) -> Any:
        wrong = (addresses < 0) | (addresses + size * count > self.size)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise AssertionError(
                f"thread {lanes[i]}: {size * count} bytes at shared address {addresses[i]} of {self.size}"
            )
        aligned(lanes, addresses, size * count)
        return (addresses // size)[:, None] + np.arange(count)

    # ---- who touches what ----

    def touch(self, lanes: Any, addresses: Any, width: int, write: bool, **how: Any) -> Any:
        """An access of some threads; otherwise as `count`."""
        if not self.races:
            return None
        at = addresses[:, None] + np.arange(width)
        by = np.broadcast_to((np.uint32(1) << (lanes // 32).astype(np.uint32))[:, None], at.shape)
        return self.count(at, by, write, **how)

    def count(self, at: Any, by: Any, write: bool, hold: bool = False, same: Any = False) -> Any:
        """The bytes `at` are touched by the warps whose bits are set in `by`, until the next barrier or, with `hold`,
        until what is returned is released.  `same`: where a write changes nothing."""
        if not self.races:
            return None
        earlier = self.writers[at] | (self.readers[at] if write else 0)
        self._mark(at, by, write)
        others = earlier & ~by & ~np.uint32(same * 0xFFFFFFFF)
        if write:
            self.unfenced[at] = True
        if others.any():
            i = np.unravel_index(int(np.argmax(others != 0)), at.shape)
            mine, theirs = (f"{int(bits[i]):b}"[::-1].index("1") for bits in (by, others))
            raise AssertionError(
                f"a race: warp {mine} {'writes' if write else 'reads'} shared byte {at[i]}, which warp {theirs} "
                f"{'reads or writes' if write else 'writes'} without a barrier between them"
            )
        held = (at, by, write)
        if hold:
            self.held.append(held)
        return held

    def release(self, held: Any) -> None:
        self.held = [h for h in self.held if h is not held]

    def barrier(self) -> None:
        self.readers[:] = self.writers[:] = 0
        for held in self.held:
            self._mark(*held)

    def _mark(self, at: Any, by: Any, write: bool) -> None:
        np.bitwise_or.at(self.writers if write else self.readers, at, by)

    def fence(self) -> None:
        self.unfenced[:] = False


# Since 3.7 Triton fences copies from the products that read them (https://github.com/triton-lang/triton/pull/9610);
# before, Hopper's products read without a fence what copies had written, against the letter of the manual
COPIES_ARE_FENCED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


class Copies:
    """cp.async: what is copied arrives when it is waited for, and not a moment before."""

    def __init__(self, memory: Global, shared: Shared) -> None:
        self.memory, self.shared = memory, shared
        self.open: list[tuple[Any, ...]] = []
        self.groups: list[list[tuple[Any, ...]]] = []

    def issue(self, lanes: Any, to: Any, source: Any, width: int, wanted: Any) -> None:
        wanted = np.broadcast_to(wanted, lanes.shape)
        if ((wanted != 0) & (wanted != width)).any():
            raise NotImplementedError("a copy of a part")
        chosen = wanted != 0
        self.memory.load(lanes[chosen], source[chosen], 4, width // 4)  # an address that is wrong is so at once
        self.shared.store(lanes, to, np.full((lanes.size, width // 2), POISON, np.uint16))
        held = self.shared.touch(lanes, to, width, write=True, hold=True)
        self.open.append((lanes, to, source, width, chosen, held))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, allowed: int) -> None:
        while len(self.groups) > allowed:
            for copy in self.groups.pop(0):
                self._arrive(*copy)

    def _arrive(self, lanes: Any, to: Any, source: Any, width: int, wanted: Any, held: Any) -> None:
        data = np.zeros((lanes.size, width // 4), np.uint32)
        data[wanted] = self.memory.load(lanes[wanted], source[wanted], 4, width // 4)
        self.shared.release(held)
        self.shared.store(lanes, to, data)
        if not COPIES_ARE_FENCED:
            self.shared.unfenced[to[:, None] + np.arange(width)] = False
