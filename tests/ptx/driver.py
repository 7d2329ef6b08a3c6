"""A driver of Triton whose device is the machine: kernels are compiled to PTX, and their launches are executed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton import knobs
from triton.runtime.driver import driver

from crossattn_kernels import kernels
from crossattn_kernels.aot import target
from crossattn_kernels.tuning import CHIPS
from tests.ptx.machine import Machine
from tests.ptx.memory import Global
from tests.ptx.parse import parse


class Binaries(target.Binaries):
    """Loads PTX: the handle of a function is its machine."""

    def __init__(self, arch: str, edit: Callable[[str], str], options: dict[str, bool]) -> None:
        self.shared, self.edit, self.options = CHIPS[arch].shared, edit, options

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(max_shared_mem=self.shared)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        machine = Machine(parse(self.edit(binary.decode())), shared, **self.options)
        return "module", machine, 0, 0, 1024  # registers, spills, threads a program may have


class Launch:
    """Runs the programs of a launch in a shuffled order, which must not matter."""

    def __init__(self, source: Any, metadata: Any, executed: list[str], seed: int) -> None:
        self.signature = tuple(source.signature.values())
        self.executed, self.seed = executed, seed
        if metadata.global_scratch_size or metadata.num_ctas != 1:
            raise NotImplementedError("descriptors and clusters")

    def __call__(self, x: int, y: int, z: int, stream: int, machine: Machine, *rest: Any) -> None:
        assert y == z == 1
        values = list(flat(self.signature, rest[4:]))  # after the metadata and the hooks
        scratch = [("u64", None)] * 2  # of the whole grid and of the profiler, which nothing here uses
        params = [*values, *scratch]
        assert len(params) == len(machine.params), f"{len(params)} arguments for {len(machine.params)} parameters"
        for (kind, value), held, declared in zip(params, machine.params.values(), machine.entry.params.values()):
            _put(held, kind, value, declared)
        memory = Global(value for _, value in values if isinstance(value, torch.Tensor))
        self.executed.append(machine.entry.name)
        order = list(range(x))
        random.Random(self.seed).shuffle(order)
        for program in order:
            machine.run(program, x, memory)


def flat(signature: tuple[Any, ...], args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """(type, value) of the arguments that a kernel has: what is constant, such as None and 1, is compiled in."""
    for kind, arg in zip(signature, args, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, arg)
        elif kind != "constexpr":
            yield kind, arg


def _put(held: Any, kind: str, value: Any, declared: str) -> None:
    """A parameter's bits, of a width that the kernel declares."""
    if isinstance(value, torch.Tensor):
        kind, value = "u64", value.data_ptr()
    elif value is None:
        kind, value = "u64", 0
    elif kind[0] == "*":
        raise NotImplementedError(f"a pointer given as {type(value).__name__}")
    width = {"i1": 8, "u1": 8}.get(kind) or int(kind.lstrip("iufp"))
    # a narrow integer is declared as wide as the ABI makes it
    assert width <= int(declared[1:]), f"{kind} for a parameter of type {declared}"
    held[0] = 0
    if kind in ("fp32", "f32"):
        held.view(np.float32)[0] = value
    elif kind[0] in "iu":
        held[0] = int(value) % 2**64
    else:
        raise NotImplementedError(f"an argument of type {kind}")


def _ptx_is_the_binary(*found: Any) -> tuple[str, str] | None:
    """Triton's hook on its stages: nothing assembles PTX."""
    if not found:
        return "ptx", "ptx"  # part of the key of Triton's cache, except in Triton 3.6
    found[1]["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


@contextmanager
def executing(
    arch: str,
    races: bool = True,
    eager: bool = False,
    seed: int = 0,
    edit: Callable[[str], str] = str,
) -> Iterator[list[str]]:
    """Within it, kernels of CPU tensors are compiled for `arch` and executed; yields the names of those that were.

    races, eager: of `Shared` and of `Products`; seed: of the order of programs; edit: what to change of the PTX.
    """
    executed: list[str] = []
    with target.standing_in(arch):
        stand_in = driver.active
        stand_in.launcher_cls = partial(Launch, executed=executed, seed=seed)
        stand_in.utils = Binaries(arch, edit, dict(races=races, eager=eager))
        with (
            knobs.cache.scope(),
            mock.patch.object(knobs.runtime, "add_stages_inspection_hook", _ptx_is_the_binary),
            mock.patch.object(kernels, "unsupported", lambda *asked: ()),
        ):
            knobs.cache.dir = os.path.join(knobs.cache.dir, "ptx")
            yield executed
