"""What each instruction does to the state of a machine: a function of the threads that run it, made once.

An instruction that is not here is arithmetic, or unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx import arithmetic, tensor_cores
from tests.ptx.arithmetic import TYPES
from tests.ptx.memory import UNSIGNED
from tests.ptx.parse import Instruction

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Step = Callable[[Any], None]  # runs for the threads of a mask, or for all if it is None
POINTERS = {"global": "b64", "shared": "b32"}


def compute(m: Machine, x: Instruction, words: list[str]) -> Step:
    op = arithmetic.operation(x.opcode)
    to, *sources = x.operands
    args = [m.read(str(s), kind) for s, kind in zip(sources, op.sources, strict=True)]
    types, result = [TYPES[kind] for kind in op.sources], TYPES[op.result]
    if any(t.widen for t in types) or result.narrow:
        readers = [partial(t.widen, a) if t.widen else partial(np.asarray, a) for t, a in zip(types, args)]
        narrow = result.narrow or np.asarray

        def value() -> Any:
            return narrow(op.compute(*[read() for read in readers]))
    else:
        value = partial(op.compute, *args)
    if "|" in str(to):  # of the halves of a pair
        low, high = (m.write(part, "pred") for part in str(to).split("|"))

        def both(mask: Any) -> None:
            pairs = value()
            low(pairs[:, 0], mask)
            high(pairs[:, 1], mask)

        return both
    put = m.write(str(to), op.result)
    return lambda mask: put(value(), mask)


def mov(m: Machine, x: Instruction, words: list[str]) -> Step:
    to, source = x.operands
    if not isinstance(to, tuple) and not isinstance(source, tuple):
        step, places = compute(m, x, words), [m.places.get(str(name)) for name in (to, source)]
        if not all(place is not None and place[0] == "b32" for place in places):
            return step
        rows = m.rows([to, source])

        def copy(mask: Any) -> None:
            step(mask)
            m.products.copied(*rows, mask)

        return copy
    # a register of parts, or the parts of a register: both little end first
    parts, whole = (to, source) if isinstance(to, tuple) else (source, to)
    bits = int(words[-1][1:]) // len(parts)
    views = [None if part == "_" else m.read(part, f"b{bits}") for part in parts]
    all_of = m.read(str(whole), words[-1]).view(UNSIGNED[bits // 8]).reshape(m.threads, -1)

    def move(mask: Any) -> None:
        for i, view in enumerate(views):
            if view is not None:
                pair = (view, all_of[:, i]) if isinstance(to, tuple) else (all_of[:, i], view)
                np.copyto(*pair, where=True if mask is None else mask)

    return move


def ld(m: Machine, x: Instruction, words: list[str]) -> Step:
    space, *_, kind = words
    to = x.operands[0] if isinstance(x.operands[0], tuple) else (x.operands[0],)
    puts = [m.write(name, kind) for name in to]
    if space == "param":
        value = m.params[str(x.operands[1]).strip("[]")].view(TYPES[kind].raw)[:1]
        return lambda mask: puts[0](value, mask)
    plain(words)
    address, size = m.address(str(x.operands[1]), POINTERS[space]), TYPES[kind].bits // 8

    def load(mask: Any) -> None:
        lanes = m.lanes if mask is None else np.flatnonzero(mask)
        memory = m.memory if space == "global" else m.shared
        found = memory.load(lanes, address()[lanes], size, len(to)).view(TYPES[kind].raw)
        for i, put in enumerate(puts):
            value = found[:, i]
            if mask is not None:
                value = np.zeros(m.threads, found.dtype)
                value[lanes] = found[:, i]
            put(value, mask)

    return load


def st(m: Machine, x: Instruction, words: list[str]) -> Step:
    space, *_, kind = words
    plain(words)
    sources = x.operands[1] if isinstance(x.operands[1], tuple) else (x.operands[1],)
    views = [m.read(name, kind) for name in sources]
    address, raw = m.address(str(x.operands[0]), POINTERS[space]), UNSIGNED[TYPES[kind].bits // 8]

    def store(mask: Any) -> None:
        lanes = m.lanes if mask is None else np.flatnonzero(mask)
        values = np.stack([np.broadcast_to(v.view(raw), (m.threads,))[lanes] for v in views], -1)
        (m.memory if space == "global" else m.shared).store(lanes, address()[lanes], values)

    return store


def whole(step: Callable[[], None]) -> Step:
    """What all threads do together."""

    def run(mask: Any) -> None:
        if mask is not None:
            raise NotImplementedError("some of the threads")
        step()

    return run


def whole_warps(mask: Any) -> None:
    by_warp = mask.reshape(-1, 32)
    assert (by_warp.all(1) == by_warp.any(1)).all(), "a part of a warp does what a warp does together"


def plain(words: list[str]) -> None:
    space, *modifiers, _ = words
    if space not in ("global", "shared") or set(modifiers) - {"v2", "v4"}:
        raise NotImplementedError("this kind of access")


def bar(m: Machine, x: Instruction, words: list[str]) -> Step:
    if words == ["warp", "sync"]:
        return lambda mask: None  # the threads of a warp run in step
    if words != ["sync"] or x.operands != ("0",):
        raise NotImplementedError("a barrier of some threads")

    def wait(mask: Any) -> None:
        assert mask is None, f"{np.count_nonzero(mask)} of {m.threads} threads meet at a barrier"
        m.shared.barrier()

    return wait


def shfl(m: Machine, x: Instruction, words: list[str]) -> Step:
    _, mode, kind = words
    to, *rest = x.operands
    name, _, predicate = str(to).partition("|")
    put, put_inside = m.write(name, kind), m.write(predicate or "_", "pred")
    values, by, limits, members = (m.read(str(r), "b32") for r in rest)
    assert limits.size == members.size == 1 and members[0] == 2**32 - 1, "some lanes only"
    lane, clamp, segment = m.lanes % 32, int(limits[0]) & 31, int(limits[0]) >> 8 & 31
    last = lane & segment | clamp & ~segment

    def shuffle(mask: Any) -> None:
        n = by.astype(np.int64) & 31
        ways = dict(up=lane - n, down=lane + n, bfly=lane ^ n, idx=lane & segment | n & ~segment)
        inside = ways[mode] >= last if mode == "up" else ways[mode] <= last
        source = m.lanes - lane + np.where(inside, ways[mode], lane)
        found = values[source]
        if mask is not None:
            assert mask[source[mask]].all(), "a lane that is not there is asked"
        put(found, mask)
        put_inside(inside, mask)

    return shuffle


def redux(m: Machine, x: Instruction, words: list[str]) -> Step:
    _, name, kind = words
    to, source, _ = x.operands
    put, values = m.write(str(to), kind), m.read(str(source), kind)
    reduce: Any = dict(min=np.min, max=np.max, add=np.sum)[name]

    def run(mask: Any) -> None:
        if mask is not None:
            whole_warps(mask)
        put(np.repeat(reduce(values.reshape(-1, 32), axis=1), 32), mask)

    return run


def mma(m: Machine, x: Instruction, words: list[str]) -> Step:
    _, _, shape, *order, total, kind, other, start = words
    known = f"m16n8k{32 // tensor_cores.SIZES[kind]}", ["row", "col"], "f32", kind, "f32"
    if (shape, order, total, other, start) != known:
        raise NotImplementedError("this product")
    d, a, b, c = (list(m.rows(names)) for names in x.operands)
    multiply, file = tensor_cores.product(kind), m.files["b32"]

    def run(mask: Any) -> None:
        found = multiply(file[a], file[b], file[c])
        if mask is None:
            file[d] = found
        else:
            whole_warps(mask)
            file[d] = np.where(mask, found, file[d])

    return run


def ldmatrix(m: Machine, x: Instruction, words: list[str]) -> Step:
    to, address = list(m.rows(x.operands[0])), m.address(str(x.operands[1]), "b32")
    trans, file = "trans" in words, m.files["b32"]
    assert f"x{len(to)}" in words and words[-1] == "b16"

    def run() -> None:
        file[to] = tensor_cores.load_matrices(m.shared, address(), len(to), trans)

    return whole(run)


def stmatrix(m: Machine, x: Instruction, words: list[str]) -> Step:
    source, address = list(m.rows(x.operands[1])), m.address(str(x.operands[0]), "b32")
    trans, file = "trans" in words, m.files["b32"]
    assert f"x{len(source)}" in words and words[-1] == "b16"
    return whole(lambda: tensor_cores.store_matrices(m.shared, address(), file[source], trans))


def cp(m: Machine, x: Instruction, words: list[str]) -> Step:
    match words:
        case ["async", "commit_group"]:
            return whole(lambda: m.copies.commit())
        case ["async", "wait_group"]:
            allowed = int(str(x.operands[0]))
            return whole(lambda: m.copies.wait(allowed))
        case ["async", "ca" | "cg", "shared", "global"]:
            pass
        case _:
            raise NotImplementedError("this copy")
    first, second, width, *part = (str(o) for o in x.operands)
    to, source = m.address(first, "b32"), m.address(second, "b64")
    wanted = m.read(part[0] if part else width, "b32")

    def copy(mask: Any) -> None:
        lanes = m.lanes if mask is None else np.flatnonzero(mask)
        size = np.broadcast_to(wanted, (m.threads,))[lanes]
        m.copies.issue(lanes, to()[lanes], source()[lanes], int(width, 0), size)

    return copy


def fence(m: Machine, x: Instruction, words: list[str]) -> Step:
    if words != ["proxy", "async", "shared::cta"]:
        raise NotImplementedError("this fence")
    return whole(m.shared.fence)


def wgmma(m: Machine, x: Instruction, words: list[str]) -> Step:
    if words[0] == "fence":
        return whole(lambda: m.products.fence())
    if words[0] == "commit_group":
        return whole(lambda: m.products.commit())
    if words[0] == "wait_group":
        allowed = int(str(x.operands[0]))
        return whole(lambda: m.products.wait(allowed))
    shape, total, kind, other = words[-4:]
    d, a, b, add, *rest = x.operands
    signs, transposed = rest[:2], [t == "1" for t in rest[2:]]
    to = m.rows(d)
    known = f"m64n{2 * len(to)}k{32 // tensor_cores.SIZES[kind]}", "f32", kind, ["1", "1"]
    if (shape, total, other, signs) != known:
        raise NotImplementedError("this product")
    left = m.rows(a) if isinstance(a, tuple) else m.read(str(a), "b64")
    by_a, by_b = [*[False] * (2 - len(transposed)), *transposed]
    right, adds = m.read(str(b), "b64"), m.read(str(add), "pred")

    def issue() -> None:
        m.products.issue(to, left, right, kind, (by_a, by_b), np.broadcast_to(adds, (m.threads,)))

    return whole(issue)


STEPS = {step.__name__: step for step in (mov, ld, st, bar, shfl, redux, mma, ldmatrix, stmatrix, cp, fence, wgmma)}
