"""One program (CTA) at a time: an array over its threads a register, a closure an instruction.

Threads that part at a branch run in turn, those furthest behind first, so that they meet where the code joins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tests.ptx import arithmetic, tensor_cores
from tests.ptx.arithmetic import TYPES, immediate
from tests.ptx.memory import POISON, UNSIGNED, Copies, Global, Shared
from tests.ptx.parse import Entry, Instruction

Step = Callable[[Any], None]  # runs for the threads of a mask, or for all if it is None
POINTERS = {"global": "b64", "shared": "b32"}
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
            file[:] = kind == "pred" or sum(POISON << 16 * i for i in range(file.itemsize // 2))
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
        specials = {
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
        start, offset = self.read(base.strip(), kind), int(offset or 0)
        return lambda: np.broadcast_to(start.astype(np.int64) + offset, (self.threads,))

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

    # ---- instructions ----

    def _step(self, x: Instruction) -> Step:
        name, *words = x.opcode.split(".")
        find = getattr(self, f"_{name}", None) or self._compute
        try:
            step: Step = find(x, words)
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

    def _compute(self, x: Instruction, words: list[str]) -> Step:
        op = arithmetic.operation(x.opcode)
        to, *sources = x.operands
        args = [self.read(str(s), kind) for s, kind in zip(sources, op.sources, strict=True)]
        types, result = [TYPES[kind] for kind in op.sources], TYPES[op.result]
        if any(t.widen for t in types) or result.narrow:
            readers = [partial(t.widen, a) if t.widen else lambda a=a: a for t, a in zip(types, args)]
            narrow = result.narrow or (lambda value: value)

            def compute() -> Any:
                return narrow(op.compute(*[read() for read in readers]))
        else:
            compute = partial(op.compute, *args)
        if "|" in str(to):  # of the halves of a pair
            low, high = (self.write(part, "pred") for part in str(to).split("|"))

            def both(mask: Any) -> None:
                value = compute()
                low(value[:, 0], mask)
                high(value[:, 1], mask)

            return both
        put = self.write(str(to), op.result)
        return lambda mask: put(compute(), mask)

    def _mov(self, x: Instruction, words: list[str]) -> Step:
        to, source = x.operands
        if not isinstance(to, tuple) and not isinstance(source, tuple):
            return self._compute(x, words)
        # a register of parts, or the parts of a register: both little end first
        parts, whole = (to, source) if isinstance(to, tuple) else (source, to)
        bits = int(words[-1][1:]) // len(parts)
        views = [None if part == "_" else self.read(part, f"b{bits}") for part in parts]
        all_of = self.read(str(whole), words[-1]).view(UNSIGNED[bits // 8]).reshape(self.threads, -1)

        def move(mask: Any) -> None:
            for i, view in enumerate(views):
                if view is not None:
                    pair = (view, all_of[:, i]) if isinstance(to, tuple) else (all_of[:, i], view)
                    np.copyto(*pair, where=True if mask is None else mask)

        return move

    def _ld(self, x: Instruction, words: list[str]) -> Step:
        space, *_, kind = words
        to = x.operands[0] if isinstance(x.operands[0], tuple) else (x.operands[0],)
        puts = [self.write(name, kind) for name in to]
        if space == "param":
            value = self.params[str(x.operands[1]).strip("[]")].view(TYPES[kind].raw)[:1]
            return lambda mask: puts[0](value, mask)
        self._plain(words)
        address, size = self.address(str(x.operands[1]), POINTERS[space]), TYPES[kind].bits // 8

        def load(mask: Any) -> None:
            lanes = self.lanes if mask is None else np.flatnonzero(mask)
            memory = self.memory if space == "global" else self.shared
            found = memory.load(lanes, address()[lanes], size, len(to)).view(TYPES[kind].raw)
            for i, put in enumerate(puts):
                value = found[:, i]
                if mask is not None:
                    value = np.zeros(self.threads, found.dtype)
                    value[lanes] = found[:, i]
                put(value, mask)

        return load

    def _st(self, x: Instruction, words: list[str]) -> Step:
        space, *_, kind = words
        self._plain(words)
        sources = x.operands[1] if isinstance(x.operands[1], tuple) else (x.operands[1],)
        views = [self.read(name, kind) for name in sources]
        address, raw = (
            self.address(str(x.operands[0]), "b64" if space == "global" else "b32"),
            UNSIGNED[TYPES[kind].bits // 8],
        )

        def store(mask: Any) -> None:
            lanes = self.lanes if mask is None else np.flatnonzero(mask)
            values = np.stack([np.broadcast_to(v.view(raw), (self.threads,))[lanes] for v in views], -1)
            (self.memory if space == "global" else self.shared).store(lanes, address()[lanes], values)

        return store

    @staticmethod
    def _plain(words: list[str]) -> None:
        space, *modifiers, _ = words
        if space not in ("global", "shared") or set(modifiers) - {"v2", "v4"}:
            raise NotImplementedError("this kind of access")

    def _bar(self, x: Instruction, words: list[str]) -> Step:
        if words == ["warp", "sync"]:
            return lambda mask: None  # the threads of a warp run in step
        if words != ["sync"] or x.operands != ("0",):
            raise NotImplementedError("a barrier of some threads")

        def wait(mask: Any) -> None:
            assert mask is None, f"{np.count_nonzero(mask)} of {self.threads} threads meet at a barrier"
            self.shared.barrier()

        return wait

    def _shfl(self, x: Instruction, words: list[str]) -> Step:
        _, mode, kind = words
        to, *rest = x.operands
        name, _, predicate = str(to).partition("|")
        put, put_inside = self.write(name, kind), self.write(predicate or "_", "pred")
        values, by, limits, members = (self.read(str(r), "b32") for r in rest)
        assert limits.size == members.size == 1 and members[0] == 2**32 - 1, "some lanes only"
        lane, clamp, segment = self.lanes % 32, int(limits[0]) & 31, int(limits[0]) >> 8 & 31
        last = lane & segment | clamp & ~segment

        def shuffle(mask: Any) -> None:
            n = by.astype(np.int64) & 31
            ways = dict(up=lane - n, down=lane + n, bfly=lane ^ n, idx=lane & segment | n & ~segment)
            inside = ways[mode] >= last if mode == "up" else ways[mode] <= last
            source = self.lanes - lane + np.where(inside, ways[mode], lane)
            found = values[source]
            if mask is not None:
                assert mask[source[mask]].all(), "a lane that is not there is asked"
            put(found, mask)
            put_inside(inside, mask)

        return shuffle

    def _redux(self, x: Instruction, words: list[str]) -> Step:
        _, name, kind = words
        to, source, _ = x.operands
        put, values = self.write(str(to), kind), self.read(str(source), kind)
        reduce = {**arithmetic.BOTH, "min": np.minimum, "max": np.maximum}[name].reduce

        def run(mask: Any) -> None:
            assert mask is None or (mask.reshape(-1, 32).all(1) == mask.reshape(-1, 32).any(1)).all(), "half a warp"
            put(np.repeat(reduce(values.reshape(-1, 32), axis=1), 32), mask)

        return run

    def _whole(self, step: Callable[[], None]) -> Step:
        """What all threads do together."""

        def run(mask: Any) -> None:
            if mask is not None:
                raise NotImplementedError("some of the threads")
            step()

        return run

    def _mma(self, x: Instruction, words: list[str]) -> Step:
        _, _, shape, *order, total, kind, other, start = words
        size = tensor_cores.SIZES.get(kind, 0)
        if (
            shape != f"m16n8k{size and 32 // size}"
            or order != ["row", "col"]
            or (total, other, start) != ("f32", kind, "f32")
        ):
            raise NotImplementedError("this product")
        d, a, b, c = (list(self.rows(names)) for names in x.operands)
        multiply, file = tensor_cores.product(kind), self.files["b32"]

        def run(mask: Any) -> None:
            found = multiply(file[a], file[b], file[c])
            if mask is None:
                file[d] = found
            else:
                assert (mask.reshape(-1, 32).all(1) == mask.reshape(-1, 32).any(1)).all(), "half a warp"
                file[d] = np.where(mask, found, file[d])

        return run

    def _ldmatrix(self, x: Instruction, words: list[str]) -> Step:
        to, address = list(self.rows(x.operands[0])), self.address(str(x.operands[1]), "b32")
        trans, file = "trans" in words, self.files["b32"]
        assert f"x{len(to)}" in words and words[-1] == "b16"

        def run() -> None:
            file[to] = tensor_cores.load_matrices(self.shared, address(), len(to), trans)

        return self._whole(run)

    def _stmatrix(self, x: Instruction, words: list[str]) -> Step:
        source, address = list(self.rows(x.operands[1])), self.address(str(x.operands[0]), "b32")
        trans, file = "trans" in words, self.files["b32"]
        assert f"x{len(source)}" in words and words[-1] == "b16"
        return self._whole(lambda: tensor_cores.store_matrices(self.shared, address(), file[source], trans))

    def _cp(self, x: Instruction, words: list[str]) -> Step:
        match words:
            case ["async", "commit_group"]:
                return self._whole(lambda: self.copies.commit())
            case ["async", "wait_group"]:
                allowed = int(str(x.operands[0]))
                return self._whole(lambda: self.copies.wait(allowed))
            case ["async", "ca" | "cg", "shared", "global"]:
                pass
            case _:
                raise NotImplementedError("this copy")
        to, source, width, *wanted = (str(o) for o in x.operands)
        to, source = self.address(to, "b32"), self.address(source, "b64")
        wanted = self.read(wanted[0] if wanted else width, "b32")

        def copy(mask: Any) -> None:
            lanes = self.lanes if mask is None else np.flatnonzero(mask)
            size = np.broadcast_to(wanted, (self.threads,))[lanes]
            self.copies.issue(lanes, to()[lanes], source()[lanes], int(width, 0), size)

        return copy

    def _fence(self, x: Instruction, words: list[str]) -> Step:
        if words != ["proxy", "async", "shared::cta"]:
            raise NotImplementedError("this fence")
        return self._whole(self.shared.fence)

    def _wgmma(self, x: Instruction, words: list[str]) -> Step:
        if words[0] == "fence":
            return lambda mask: None
        if words[0] == "commit_group":
            return self._whole(lambda: self.products.commit())
        if words[0] == "wait_group":
            allowed = int(str(x.operands[0]))
            return self._whole(lambda: self.products.wait(allowed))
        shape, total, kind, other = words[-4:]
        d, a, b, add, *rest = x.operands
        signs, transposed = rest[:2], [t == "1" for t in rest[2:]]
        to = self.rows(d)
        if (total, kind, signs) != (
            "f32",
            other,
            ["1", "1"],
        ) or shape != f"m64n{2 * len(to)}k{32 // tensor_cores.SIZES[kind]}":
            raise NotImplementedError("this product")
        left = self.rows(a) if isinstance(a, tuple) else self.read(str(a), "b64")
        by_a, by_b = [*[False] * (2 - len(transposed)), *transposed]
        right, adds = self.read(str(b), "b64"), self.read(str(add), "pred")

        def issue() -> None:
            self.products.issue(to, left, right, kind, (by_a, by_b), np.broadcast_to(adds, (self.threads,)))

        return self._whole(issue)
