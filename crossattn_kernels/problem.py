"""One call described once: its tensors in canonical shape, options, sizes and costs; every shape error lives here.

Letters: B batch, Hq query heads, Hk key heads, M queries, N keys, D head size of q and k, Dv of v.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from crossattn_kernels.masks import Mask, as_range, check_integer, not_dense

EMPTY_ROWS = ("zero", "uniform", "attend_all")
FP32_MAX = torch.finfo(torch.float32).max
MANY_KEYS = 256  # of which a kernel of its own finds the first and the last that `keys` shows, before others run
Fields = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Kind = tuple[torch.device, torch.dtype, int, int]  # with D and Dv: what the choice of a backend looks at
T = TypeVar("T")
SPEC = {"q": "(B, Hq, M, D)", "k": "(B, Hk, N, D)", "v": "(B, Hk, N, Dv)"}


class Inputs(NamedTuple):
    """The tensors of a call.  `1|B` is 1 or B: a size of 1 broadcasts."""

    q: Tensor  # (1|B, Hq, M, D)
    k: Tensor  # (1|B, Hk, N, D)
    v: Tensor  # (1|B, Hk, N, Dv)
    start: Tensor | None = None  # int32 (1|B, 1|Hq, 1|M)
    end: Tensor | None = None  # int32 (1|B, 1|Hq, 1|M)
    keys: Tensor | None = None  # bool (1|B, N)
    visible: Tensor | None = None  # bool (1|B, 1|Hq, 1|query groups, 1|key groups)
    bias: Tensor | None = None  # (1|B, 1|Hq, 1|M, 1|N)
    gate: Tensor | None = None  # (1|B, 1|Hq, 1|M, 1|Dv), before tanh
    scale: Tensor | None = None  # (1|B, Hq), instead of Options.scale
    seed: Tensor | None = None  # int64 (), of the dropout mask

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(B, Hq, M, N)."""
        (entries, Hq, M, _), (others, _, N, _) = self.q.shape, self.k.shape
        return max(entries, others) if entries and others else 0, Hq, M, N

    @property
    def kind(self) -> Kind:
        return self.q.device, self.q.dtype, self.q.shape[3], self.v.shape[3]

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.q.shape[1] // max(1, self.k.shape[1])

    @property
    def bounded(self) -> bool:
        """True when the kernels look for the ends of key padding first: where it is long, and keys alone are hidden."""
        return self.keys is not None and self.visible is self.bias is None and self.k.shape[2] >= MANY_KEYS

    @property
    def gate_varies(self) -> bool:
        """True when the gate differs along Dv, so that the ungated output must be kept for the backward."""
        return self.gate is not None and self.gate.shape[3] > 1


class Gradients(NamedTuple):
    """One entry an input; None where it was not asked for."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None
    scale: Tensor | None = None


class Options(NamedTuple):
    """What a call asks for besides its tensors."""

    query_group: int = 1
    key_group: int = 1
    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0
    empty_rows: str = "zero"
    first_key: int = 0  # index of key 0 in the dropout mask: where a chunk lies in the whole
    chunk: bool = False  # the keys are part of a whole, whose o and lse come into the backward

    def mask(self, x: Inputs) -> Mask:
        return Mask(x.start, x.end, x.keys, x.visible, self.query_group, self.key_group)


class Problem(NamedTuple):
    """Sizes, type and demands of one call: what schedules, explanations and cost models look at."""

    B: int
    Hq: int
    Hk: int
    M: int
    N: int
    D: int
    Dv: int
    dtype: torch.dtype
    device: torch.device
    masked: bool = False
    bias_varies: tuple[bool, ...] | None = None  # along B, Hq, M and N; None without a bias
    plain: bool = True  # nothing but q, k, v, a number as scale and ranges
    sifts: bool = False  # an entry inside the range of its query may be hidden or changed
    bounded: bool = False  # key padding whose ends are looked for first
    extras: int = 0  # how many of: ranges, keys, visible, bias, gate, scales of heads, softcap, dropout, empty rows
    pairwise: bool = False  # an entry for each query and key is loaded: bias or visible
    scattered: bool = False  # and not by vectors: its rows are not aligned, or groups share it
    drops: bool = False  # dropout is asked for
    shares_q: bool = False  # one batch entry of q (k) for all
    shares_k: bool = False
    chunk: bool = False  # the keys are part of a longer whole
    aligned: bool = True  # q, k, v and all their rows begin at multiples of 16 bytes

    @staticmethod
    def of(x: Inputs, options: Options) -> Problem:
        B, Hq, M, N = x.sizes
        (entries, _, _, D), (others, Hk, _, _) = x.q.shape, x.k.shape
        pairwise, ranged = not x.visible is x.bias is None, not x.start is x.end is None
        masked = ranged or not x.keys is x.visible is None
        changed = bool(options.softcap), bool(options.dropout_p), options.empty_rows != "zero"
        grouped = options.query_group * options.key_group > 1
        return Problem(
            B, Hq, Hk, M, N, D, x.v.shape[3], x.q.dtype, x.q.device,
            masked=masked,
            bias_varies=None if x.bias is None else tuple(n > 1 for n in x.bias.shape),
            plain=not pairwise and x.keys is x.gate is x.scale is None and not any(changed),
            sifts=pairwise or (x.keys is not None and not x.bounded) or (masked and options.empty_rows == "uniform"),
            bounded=x.bounded,
            extras=ranged + sum(changed) + sum(t is not None for t in (x.keys, x.visible, x.bias, x.gate, x.scale)),
            pairwise=pairwise,
            scattered=pairwise and (grouped or N % 16 != 0),
            drops=bool(options.dropout_p),
            shares_q=entries < B,
            shares_k=others < B,
            chunk=options.chunk,
            aligned=all(_rows_aligned(t) for t in (x.q, x.k, x.v)),
        )  # fmt: skip

    @property
    def by_lse(self) -> bool:
        """p from lse is as exact as 16 bits need, unless a bias makes lse so large that it holds no digits of p."""
        return self.dtype.itemsize == 2 and not self.biased

    @property
    def biased(self) -> bool:
        return self.bias_varies is not None

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.Hq // self.Hk if self.Hk else 1

    def flops(self, mode: str = "forward") -> int:
        """Floating-point operations of the matrix products, as if nothing were masked; mode "forward" or "backward"."""
        return matmul_flops(self.B, self.Hq, self.M, self.N, self.D, self.Dv, mode)

    def bytes(self, mode: str = "forward") -> int:
        """Least traffic with device memory: every input read once, every output written once."""
        queries, keys = self.B * self.Hq * self.M, self.B * self.Hk * self.N
        once = (queries + keys) * (self.D + self.Dv) * self.dtype.itemsize
        return once + 4 * queries if mode == "forward" else 2 * once + 4 * queries


def _rows_aligned(t: Tensor) -> bool:
    return all(n * t.element_size() % 16 == 0 for n in (t.storage_offset(), *t.stride()[:3]))


def matmul_flops(B: int, Hq: int, M: int, N: int, D: int, Dv: int, mode: str) -> int:
    """2 products forward (q kᵀ, p v); 5 backward (q kᵀ, do vᵀ, ds k, dsᵀ q, pᵀ do)."""
    return 2 * B * Hq * M * N * (D + Dv if mode == "forward" else 3 * D + 2 * Dv)


# ---- canonical form ----


def canonical(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    empty_rows: str = "zero",
) -> tuple[Inputs, Options]:
    """Check every argument of `cross_attention` and bring it to the shapes of `Inputs`.

    Raises ValueError or TypeError: one sentence that names the argument and shows every shape.
    """
    _check_tensors(q, k, v)
    given = dict(q=q, k=k, v=v)  # what an error message shows
    shared = Inputs(*map(_unit_last_stride, (q, k, v)))
    B, Hq, M, N = shared.sizes
    bias = None if bias is None else fit("bias", typed("bias", bias, "floats", **given), (B, Hq, M, N), **given)
    if isinstance(mask, Tensor):
        mask, bias = _from_tensor(mask, bias, (B, Hq, M, N), **given)
    elif mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"mask must be a Mask or a tensor, got {type(mask).__name__}: {shapes(**given)}")
    fields: Fields = (None, None, None, None) if mask is None else _fields(mask, (B, Hq, M, N), **given)
    gate = None if gate is None else fit_gate(gate, (B, Hq, M, v.shape[3]), **given)
    by_head = _head_scale(scale, Hq, **given) if isinstance(scale, Tensor) else None
    x = Inputs(shared.q, shared.k, shared.v, *fields, bias, gate, by_head)
    options = Options(
        1 if mask is None else mask.query_group,
        1 if mask is None else mask.key_group,
        q.shape[3] ** -0.5 if scale is None or by_head is not None else _float("scale", scale, **given),
        0.0 if softcap is None else _softcap(softcap, **given),
        _dropout(dropout_p, **given),
        one_of("empty_rows", empty_rows, EMPTY_ROWS, **given),
    )
    return x, options


def shapes(**tensors: object) -> str:
    """`q (B, Hq, M, D) is (2, 8, 16, 64), ...`: every shape that there is, for an error message."""
    named = ((name, t) for name, t in tensors.items() if isinstance(t, Tensor) and not t.is_nested)
    return ", ".join(f"{n} {SPEC[n] + ' ' if n in SPEC else ''}is {tuple(t.shape)}" for n, t in named)


def _where(**given: object) -> str:
    said = shapes(**given)
    return f": {said}" if said else ""


def one_of(name: str, value: T, allowed: tuple[T, ...], **given: Tensor) -> T:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{_where(**given)}")
    return value


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    given = dict(q=q, k=k, v=v)
    check_dense(**given)
    for name, t in given.items():
        if t.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions: {shapes(**given)}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}: {shapes(**given)}")
    if not q.dtype.is_floating_point or q.dtype.itemsize < 2:
        wanted = "fp16, bf16 or fp32 (fp64 off the Triton backend)"
        raise TypeError(f"q, k and v must be {wanted}, got {q.dtype}: {shapes(**given)}")
    if not q.device == k.device == v.device:
        got = f"{q.device}, {k.device} and {v.device}"
        raise ValueError(f"q, k and v must be on one device, got {got}: {shapes(**given)}")
    wrong = _misfit(q, k, v)
    if wrong:
        swapped = _misfit(*(t.transpose(1, 2) for t in given.values())) is None
        hint = " (if heads are the third dimension, pass transpose(1, 2) of each)" if swapped else ""
        raise ValueError(f"{wrong} does not fit{hint}: {shapes(**given)}")


def check_dense(**given: Tensor) -> None:
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}{_where(**given)}")
    for name, t in given.items():
        _dense(name, t)


def _misfit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Which size does not fit the others."""
    (B, Hq, _, D), (entries, Hk, N, D_of_k), (entries_of_v, heads_of_v, N_of_v, _) = q.shape, k.shape, v.shape
    return (
        "the last size of `k`" if D_of_k != D
        else "the number of heads of `v`" if heads_of_v != Hk
        else "the number of keys of `v`" if N_of_v != N
        else "the batch of `v`" if entries_of_v != entries
        else "the batch of `k`" if not fits(B, entries) and entries != 1
        else "the number of heads of `k` (it must divide that of `q`)" if (Hq % Hk if Hk else Hq)
        else "the head size of `q`" if D == 0
        else "the head size of `v`" if v.shape[3] == 0
        else None
    )  # fmt: skip


def _unit_last_stride(t: Tensor) -> Tensor:
    """A tensor whose rows do not lie together is copied here, once for forward and backward; any other stays."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def fits(size: int, full: int) -> bool:
    """Whether a dimension broadcasts to `full`."""
    # `size in (1, full)` is False under torch.compile where one of the two is symbolic and the other is not
    return size == 1 or size == full


def fit(name: str, t: Tensor, target: tuple[int, ...], **given: Tensor) -> Tensor:
    """`t` with leading dimensions of 1, checked to broadcast to `target`."""
    _same_device(name, t, **given)
    full = t if t.ndim >= len(target) else t.view(*(1,) * (len(target) - t.ndim), *t.shape)
    if full.ndim != len(target) or not all(map(fits, full.shape, target)):
        hint = _padding_hint(t, target) if name == "mask" else ""
        raise ValueError(f"{name} must broadcast to {target}, got {tuple(t.shape)}{hint}: {shapes(**given)}")
    return full


def _padding_hint(mask: Tensor, target: tuple[int, ...]) -> str:
    if mask.is_floating_point() or mask.shape != (target[0], target[-1]):
        return ""
    keep = "mask" if mask.dtype == torch.bool else "mask.bool()"
    return f" (for padding, of shape (B, N), pass Mask.key_padding({keep}))"


def _same_device(name: str, t: Tensor, **given: Tensor) -> None:
    other, q = next(iter(given.items()))
    if t.device != q.device:
        raise ValueError(f"{name} is on {t.device} but {other} is on {q.device}: {shapes(**given, **{name: t})}")


def typed(name: str, t: Any, kind: str, **given: Tensor) -> Tensor:
    """`t`, checked to be a dense tensor of "floats", "integers" or "bools"."""
    if isinstance(t, Tensor) and kind == _kind(_dense(name, t, **given).dtype):
        return t
    got = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
    raise TypeError(f"{name} must be a tensor of {kind}, got {got}{_where(**given)}")


def _dense(name: str, t: Tensor, **given: Tensor) -> Tensor:
    if t.is_nested or t.layout != torch.strided:
        raise TypeError(not_dense(name, t) + _where(**given))
    return t


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floats"
    return "bools" if dtype == torch.bool else "complex numbers" if dtype.is_complex else "integers"


def _fields(mask: Mask, sizes: tuple[int, int, int, int], **given: Tensor) -> Fields:
    """start, end, keys and visible."""
    check_integer("mask.query_group", mask.query_group, 1)
    check_integer("mask.key_group", mask.key_group, 1)
    B, Hq, M, N = sizes
    groups = (-(-M // mask.query_group), -(-N // mask.key_group))
    return (
        _range("mask.start", mask.start, (B, Hq, M), **given),
        _range("mask.end", mask.end, (B, Hq, M), **given),
        _bits("mask.keys", mask.keys, (B, N), **given),
        _bits("mask.visible", mask.visible, (B, Hq, *groups), **given),
    )


def _range(name: str, t: Tensor | None, target: tuple[int, ...], **given: Tensor) -> Tensor | None:
    return None if t is None else fit(name, as_range(typed(name, t, "integers", **given)), target, **given)


def _bits(name: str, t: Tensor | None, target: tuple[int, ...], **given: Tensor) -> Tensor | None:
    if t is None:
        return None
    t = fit(name, typed(name, t, "bools", **given), target, **given)
    return t.expand(t.shape[0], target[1]) if len(target) == 2 else t


def fit_gate(gate: Tensor, target: tuple[int, ...], q: Tensor, **others: Tensor) -> Tensor:
    """() or (1,) one gate; (Hq,) one a head; (Hq, Dv) one a channel of a head; otherwise the usual broadcasting."""
    _same_device("gate", typed("gate", gate, "floats", q=q, **others), q=q, **others)
    if gate.ndim == 1 and fits(gate.shape[0], target[1]):
        gate = gate.view(1, -1, 1, 1)
    elif gate.ndim == 2 and fits(gate.shape[0], target[1]) and fits(gate.shape[1], target[3]):
        gate = gate.view(1, gate.shape[0], 1, gate.shape[1])
    return fit("gate", gate, target, q=q, **others)


def _head_scale(scale: Tensor, Hq: int, **given: Tensor) -> Tensor:
    _same_device("scale", typed("scale", scale, "floats", **given), **given)
    if scale.ndim > 1 or not all(fits(size, Hq) for size in scale.shape):
        raise ValueError(
            f"scale must be a float or a tensor of shape () or ({Hq},), got {tuple(scale.shape)}: {shapes(**given)}"
        )
    return scale.expand(Hq)[None]


def _float(name: str, value: Any, **given: Tensor) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}: {shapes(**given)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not -math.inf < number < math.inf:  # math.isfinite refuses the symbolic numbers of torch.compile
        raise ValueError(f"{name} must be finite, got {value}: {shapes(**given)}")
    return number


def _softcap(softcap: float, **given: Tensor) -> float:
    number = _float("softcap", softcap, **given)
    if not 0 < number <= FP32_MAX:
        what = "positive" if number <= 0 else "a number of fp32"
        raise ValueError(f"softcap must be {what}, got {softcap}: {shapes(**given)}")
    return number


def _dropout(dropout_p: float, **given: Tensor) -> float:
    if not 0 <= _float("dropout_p", dropout_p, **given) < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}: {shapes(**given)}")
    return float(dropout_p)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """a + b; what is finite in both stays so, because -inf would hide a key."""
    total = a + b
    largest = torch.finfo(total.dtype).max
    return torch.where(a.isfinite() & b.isfinite(), total.clamp(-largest, largest), total)


def _from_tensor(
    t: Tensor, bias: Tensor | None, target: tuple[int, int, int, int], **given: Tensor
) -> tuple[Mask, Tensor | None]:
    """SDPA's reading of a mask tensor: bool, True may attend; floating point, added to the logits."""
    kind = _kind(_dense("mask", t, **given).dtype)
    if kind not in ("bools", "floats"):
        got = f"{t.dtype} of shape {tuple(t.shape)}{_padding_hint(t, target)}"
        raise TypeError(f"mask must be a Mask or a tensor of bools or floats, got {got}: {shapes(**given)}")
    t = fit("mask", t, target, **given)
    if kind == "floats":
        return Mask(), t if bias is None else _sum(bias, t)
    # one bit a key is key padding, which is cheaper than a dense mask
    return Mask(keys=t[:, 0, 0]) if t.shape[1] == t.shape[2] == 1 and t.shape[3] == target[3] else Mask(visible=t), bias
