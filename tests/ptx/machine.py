"""One program (CTA) at a time: an array over its threads a register, a closure an instruction.

Threads that part at a branch run in turn, those furthest behind first, so that they meet where the code joins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.ptx import tensor_cores
from tests.ptx.arithmetic import TYPES, immediate
from tests.ptx.memory import POISON, Copies, Global, Shared
from tests.ptx.parse import Entry, Instruction
from tests.ptx.steps import STEPS, Step, compute

SHARED_START = 1024  # a program's first bytes are the system's


class Block(NamedTuple):
    """Instructions that run one after the other, and where each thread of a mask goes then."""

    steps: list[Step]
    instructions: list[Instruction]
    leave: Callable[[Any], list[tuple[int, Any]]]


class Machine:
    """A kernel, bound once: `run` executes one program of it."""

    def __init__(self, entry: Entry, shared_bytes: int, races: bool = True, eager: bool = False) -> None:
        self.entry, self.threads, self.eager = entry, entry.threads, eager
        self.lanes = np.arange(entry.threads)
        self.shared = Shared(SHARED_START + shared_bytes, races)
        self.params = {name: np.zeros(1, np.uint64) for name in entry.params}
        self.places: dict[str, tuple[str, int]] = {}
        counts = dict.fromkeys(("pred", "b16", "b32", "b64"), 0)
        for name, kind in entry.registers.items():
            kind = kind if kind in counts else "b" + kind[1:]
            self.places[name] = kind, counts[kind]
            counts[kind] += 1
        self.files = {k: np.empty((n, self.threads), TYPES[k].raw) for k, n in counts.items()}
        self.block_of_grid, self.grid = np.zeros(3, np.uint32), np.ones(3, np.uint32)
        self.blocks = self._blocks()

    def run(self, program: int, programs: int, memory: Global) -> None:
        """Execute program `program`; its arguments lie in `params`."""
        for kind, file in self.files.items():
            file[:] = True if kind == "pred" else sum(POISON << 16 * i for i in range(file.itemsize // 2))
        self.shared.reset()
        self.block_of_grid[0], self.grid[0] = program, programs
        self.memory = memory
        self.copies = Copies(memory, self.shared)
        self.products = tensor_cores.Products(self.shared, self.files["b32"], self.eager)
        waiting = {0: np.ones(self.threads, bool)}
        with np.errstate(all="ignore"):
            while waiting:
                at = min(waiting)
                mask = waiting.pop(at)
                for target, taken in self._run_block(self.blocks[at], mask):
                    waiting[target] = waiting[target] | taken if target in waiting else taken

    def _run_block(self, block: Block, mask: Any) -> list[tuple[int, Any]]:
        active = None if mask.all() else mask
        done = 0
        try:
            for step in block.steps:
                step(active)
                done += 1
        except Exception as error:
            program = f"{self.entry.name}, program {self.block_of_grid[0]}"
            raise type(error)(f"{program}: {block.instructions[done]}: {error}") from error
        return block.leave(mask)

    # ---- control ----

    def _blocks(self) -> list[Block]:
        instructions = self.entry.instructions
        jumps = [i for i, x in enumerate(instructions) if x.opcode in ("bra", "bra.uni", "ret", "exit")]
        targets = {self.entry.labels[str(instructions[i].operands[0])] for i in jumps if instructions[i].operands}
        starts = sorted({0, *targets, *(i + 1 for i in jumps)} - {len(instructions)})
        number = {start: n for n, start in enumerate(starts)}
        blocks = []
        for start, end in zip(starts, [*starts[1:], len(instructions)]):
            body, last = instructions[start:end], instructions[end - 1]
            jump = last if end - 1 in jumps else None
            body = body[:-1] if jump else body
            blocks.append(Block([self._step(x) for x in body], body, self._leave(jump, number, number.get(end))))
        return blocks

    def _leave(self, jump: Instruction | None, number: dict[int, int], following: int | None) -> Any:
        if jump is None:
            return lambda mask: [(following, mask)]
        target = number[self.entry.labels[str(jump.operands[0])]] if jump.operands else None

        def leave(mask: Any) -> list[tuple[int, Any]]:
            taken = mask if jump.guard is None else mask & (self.read(jump.guard, "pred") ^ jump.negated)
            ways = [(target, taken), (following, mask & ~taken)]
            return [(where, who) for where, who in ways if where is not None and who.any()]

        return leave

    # ---- operands ----

    def read(self, name: str, kind: str) -> Any:
        """A view of what an operand holds, valid for ever: of a register, a special register or a constant."""
        if name in self.places:
            file, i = self.places[name]
            register = self.files[file][i]
            wider = register.itemsize // (TYPES[kind].bits // 8)
            assert wider, f"{name} is narrower than {kind}"
            return register.view(TYPES[kind].raw)[::wider]
        specials: dict[str, Any] = {
            **{f"%tid.{axis}": self.lanes * (axis == "x") for axis in "xyz"},
            **{f"%ctaid.{axis}": self.block_of_grid[i : i + 1] for i, axis in enumerate("xyz")},
            **{f"%nctaid.{axis}": self.grid[i : i + 1] for i, axis in enumerate("xyz")},
            "%laneid": self.lanes % 32,
            "global_smem": np.array([SHARED_START]),
        }
        if name in specials:
            found = specials[name]
            return found if found.dtype == np.uint32 else found.astype(TYPES[kind].raw)
        try:
            return immediate(name, kind)
        except ValueError:
            raise NotImplementedError(f"operand {name}") from None

    def address(self, operand: str, kind: str) -> Callable[[], Any]:
        """Of `[register + offset]`, for every thread."""
        base, _, offset = operand.strip("[] ").partition("+")
        start, further = self.read(base.strip(), kind), int(offset or 0)
        if start.size == 1:
            return lambda: np.repeat(start.astype(np.int64) + further, self.threads)
        return lambda: start.astype(np.int64) + further

    def rows(self, names: Any) -> tuple[int, ...]:
        """Where 4-byte registers lie in their file."""
        places = [self.places[name] for name in names]
        assert all(file == "b32" for file, _ in places)
        return tuple(i for _, i in places)

    def write(self, name: str, kind: str) -> Callable[[Any, Any], None]:
        """A function that puts values into a register, for the threads of a mask."""
        if name == "_":
            return lambda value, mask: None
        file, i = self.places[name]
        register = self.files[file][i]
        if register.itemsize == np.dtype(TYPES[kind].raw).itemsize:
            register = register.view(TYPES[kind].raw)

        def put(value: Any, mask: Any) -> None:
            if mask is None:
                register[:] = value
            else:
                np.copyto(register, value, "unsafe", mask)

        return put

    def _step(self, x: Instruction) -> Step:
        name, *words = x.opcode.split(".")
        try:
            step = STEPS.get(name, compute)(self, x, words)
        except (NotImplementedError, KeyError, AssertionError) as error:
            raise NotImplementedError(f"{self.entry.name}: {x}: {error}") from error
        if x.guard is None:
            return step
        guard, negated = self.read(x.guard, "pred"), x.negated

        def guarded(mask: Any) -> None:
            chosen = guard ^ negated if mask is None else mask & (guard ^ negated)
            count = np.count_nonzero(chosen)
            if count:
                step(None if count == self.threads else chosen)

        return guarded
