"""What one thread computes: types, operations and conversions, each over an array of threads.

Results are rounded once from a wider format: approximations (ex2, lg2, div.full, ...) are better here than on a chip,
and `fma` rounds twice: its sum to a wider format, then to its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

TINY = np.finfo(np.float32).tiny


class Type(NamedTuple):
    """How the bits of a register are held, and how values are made of them where NumPy has no such type."""

    raw: Any
    widen: Callable[[Any], Any] | None = None
    narrow: Callable[[Any], Any] | None = None

    @property
    def bits(self) -> int:
        return 8 * int(np.dtype(self.raw).itemsize)


class Operation(NamedTuple):
    """`result = compute(*sources)`, by names of types."""

    compute: Callable[..., Any]
    result: str
    sources: tuple[str, ...]


# ---- types ----


def widen_bf16(raw: Any) -> Any:
    return (raw.astype(np.uint32) << 16).view(np.float32)


def narrow_bf16(x: Any) -> Any:
    """To nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _halves(raw: Any, dtype: Any) -> Any:
    return np.ascontiguousarray(raw).view(dtype).reshape(-1, 2)  # (threads, low and high)


def _whole(halves: Any) -> Any:
    return np.ascontiguousarray(halves).view(np.uint32)[..., 0]


TYPES = {
    **{f"{kind}{bits}": Type(np.dtype(f"{k}{bits // 8}")) for bits in (8, 16, 32, 64) for kind, k in zip("sub", "iuu")},
    "f16": Type(np.float16),
    "f32": Type(np.float32),
    "f64": Type(np.float64),
    "pred": Type(np.bool_),
    "bf16": Type(np.uint16, widen_bf16, narrow_bf16),
    "bf16x2": Type(np.uint32, lambda r: widen_bf16(_halves(r, np.uint16)), lambda x: _whole(narrow_bf16(x))),
    "f16x2": Type(np.uint32, lambda r: _halves(r, np.float16), lambda x: _whole(x.astype(np.float16))),
    "tf32": Type(np.uint32),
}  # fmt: skip


def immediate(text: str, kind: str) -> Any:
    """The bits of a constant, as an array of one."""
    if text[:2] in ("0f", "0F"):
        return np.array([int(text[2:], 16)], np.uint32).view(TYPES[kind].raw)
    if text[:2] in ("0d", "0D"):
        return np.frombuffer(struct.pack("<Q", int(text[2:], 16)), np.float64)
    value = int(text.rstrip("U"), 0)
    if kind == "pred":
        return np.array([bool(value)])
    raw, bits = TYPES[kind].raw, TYPES[kind].bits
    return np.array([value % 2**bits], np.dtype(f"u{bits // 8}")).view(raw)


# ---- operations ----


def _flush(x: Any) -> Any:
    return np.where(np.abs(x) < TINY, x * np.float32(0), x)


def flushing(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Subnormal numbers are zeros of the same sign, read and written."""
    return lambda *xs: _flush(compute(*[_flush(x) if x.dtype.kind == "f" else x for x in xs]))


def fma(a: Any, b: Any, c: Any) -> Any:
    wide, to = (np.longdouble, a.dtype) if a.dtype == np.float64 else (np.float64, np.float32)
    return (a.astype(wide) * b + c).astype(to)


def in_fp64(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


def quotient(a: Any, b: Any) -> Any:
    """Of integers, towards zero."""
    whole = np.abs(a) // np.abs(b) if a.dtype.kind == "i" else a // b
    return np.where((a < 0) != (b < 0), -whole, whole) if a.dtype.kind == "i" else whole


def bits_of(a: Any, position: Any, length: Any, bits: int) -> Any:
    """The field, with the sign of its highest bit where the type has one."""
    return (a << (bits - position - length).astype(a.dtype)) >> (bits - length).astype(a.dtype)


def permuted_bytes(a: Any, b: Any, selector: Any) -> Any:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.uint64(0)
    for i in range(4):
        choice = (selector >> 4 * i).astype(np.uint64)
        byte = both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        out = out | np.where(choice & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte) << np.uint64(8 * i)
    return out


COMPARISONS = dict(eq=np.equal, ne=np.not_equal, lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal)


def comparison(name: str, kind: str) -> Callable[..., Any]:
    """Without `u`, nothing compares with NaN; with it, everything does."""
    if "f" not in kind:
        return COMPARISONS[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if len(name) == 3:
        return lambda a, b: COMPARISONS[name[:2]](a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: COMPARISONS[name](a, b) & ~np.isnan(a) & ~np.isnan(b)


Function = Callable[..., Any]
BOTH: dict[str, Function] = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or,
                             "xor": np.bitwise_xor, "min": np.fmin, "max": np.fmax}  # fmt: skip
SHIFTS = dict(shl=np.left_shift, shr=np.right_shift)
LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
ONE: dict[str, Function] = {"abs": np.abs, "neg": np.negative, "not": np.invert, "mov": np.asarray}
APPROXIMATE: dict[str, Function] = dict(
    ex2=np.exp2, lg2=np.log2, rcp=np.reciprocal, sqrt=np.sqrt, rsqrt=lambda x: 1 / np.sqrt(x), tanh=np.tanh, sin=np.sin,
    cos=np.cos,
)  # fmt: skip
WORDS = {"mul": {"lo", "hi", "wide"}, "mad": {"lo", "wide"}, "min": {"relu", "NaN"}, "max": {"relu", "NaN"}}
FLOATS = ("f16", "f32", "f64", "bf16", "bf16x2", "f16x2")


def operation(opcode: str) -> Operation:
    """What an opcode computes; NotImplementedError for one that is not known."""
    name, *words, kind = opcode.split(".")
    modifiers = set(words)
    if name == "cvt":
        return _conversion(opcode, words[-1] if words else "", kind, set(words[:-1]))
    found = _found(name, words, kind)
    known = WORDS.get(name, set()) | ({"ftz", "rn", "approx", "full"} if kind in FLOATS else set())
    if found is None or kind not in TYPES or name != "setp" and not modifiers <= known:
        raise NotImplementedError(opcode)
    return found._replace(compute=flushing(found.compute)) if "ftz" in modifiers and name != "setp" else found


def _found(name: str, words: list[str], kind: str) -> Operation | None:
    real = kind in FLOATS
    both, wide = (kind, kind), kind[0] + "64"
    raw = TYPES[wide].raw if wide in TYPES and not real else None
    match name:
        case "min" | "max" if "NaN" in words:
            return Operation(np.minimum if name == "min" else np.maximum, kind, both)
        case "min" | "max" if "relu" in words:
            return Operation(lambda a, b: np.maximum(BOTH[name](a, b), 0), kind, both)
        case _ if name in BOTH:
            return Operation(BOTH[name], kind, both)
        case _ if name in SHIFTS:
            return Operation(SHIFTS[name], kind, (kind, "u32"))
        case _ if name in ONE:
            return Operation(np.logical_not if (name, kind) == ("not", "pred") else ONE[name], kind, (kind,))
        case _ if name in APPROXIMATE and kind == "f32":
            return Operation(in_fp64(APPROXIMATE[name]), kind, (kind,))
        case "mul" if real or "lo" in words:
            return Operation(np.multiply, kind, both)
        case "mul" if "wide" in words and kind in ("s32", "u32"):
            return Operation(partial(np.multiply, dtype=raw), wide, both)
        case "mul" if "hi" in words and kind in ("s32", "u32"):
            return Operation(lambda a, b: np.multiply(a, b, dtype=raw) >> 32, kind, both)
        case "mad" if "lo" in words:
            return Operation(lambda a, b, c: a * b + c, kind, (kind,) * 3)
        case "mad" if "wide" in words and kind in ("s32", "u32"):
            return Operation(lambda a, b, c: np.multiply(a, b, dtype=raw) + c, wide, (*both, wide))
        case "fma" if real:
            return Operation(fma, kind, (kind,) * 3)
        case "div":
            return Operation(np.divide if real else quotient, kind, both)
        case "rem" if not real:
            return Operation(lambda a, b: a - quotient(a, b) * b, kind, both)
        case "selp":
            return Operation(lambda a, b, p: np.where(p, a, b), kind, (*both, "pred"))
        case "bfe":
            return Operation(partial(bits_of, bits=TYPES[kind].bits), kind, (kind, "u32", "u32"))
        case "prmt":
            return Operation(permuted_bytes, kind, ("b32",) * 3)
        case "setp":
            return _test([w for w in words if w != "ftz"], kind, "ftz" in words)
    return None


def _test(words: list[str], kind: str, ftz: bool) -> Operation:
    first, *then = words
    compare = comparison(first, kind)
    if ftz:
        plain = compare
        compare = lambda a, b: plain(_flush(a), _flush(b))  # noqa: E731
    if not then:
        return Operation(compare, "pred", (kind, kind))
    return Operation(lambda a, b, p: LOGIC[then[0]](compare(a, b), p), "pred", (kind, kind, "pred"))


TO_WHOLE = dict(rni=np.rint, rzi=np.trunc, rmi=np.floor, rpi=np.ceil)


def _conversion(opcode: str, to: str, kind: str, modifiers: set[str]) -> Operation:
    if to in ("bf16x2", "f16x2") and kind == "f32" and modifiers == {"rn"}:
        # the first operand is the upper half
        return Operation(lambda high, low: np.stack(np.broadcast_arrays(low, high), -1), to, (kind, kind))
    if (to, kind, modifiers) == ("tf32", "f32", {"rna"}):
        return Operation(lambda x: (x.view(np.uint32) + 0x1000) & 0xFFFFE000, to, (kind,))
    whole = modifiers & set(TO_WHOLE)
    to_integer = kind in FLOATS and to not in FLOATS
    if not {to, kind} <= set(TYPES) or modifiers - whole - {"rn"} or to_integer and not whole:
        raise NotImplementedError(opcode)
    rounded = TO_WHOLE[whole.pop()] if whole else None
    if rounded and to_integer:
        return Operation(lambda x: _saturated(rounded(x.astype(np.float64)), TYPES[to].raw), to, (kind,))
    if rounded:
        return Operation(rounded, to, (kind,))
    target = np.float32 if TYPES[to].narrow else TYPES[to].raw
    return Operation(lambda x: x.astype(target), to, (kind,))


def _saturated(x: Any, raw: Any) -> Any:
    """Into the range of an integer; NaN is 0."""
    return np.clip(np.nan_to_num(x, nan=0.0), np.iinfo(raw).min, np.iinfo(raw).max).astype(raw)
