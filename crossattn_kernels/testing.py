"""Cases, inputs and error budgets for tests, benchmarks, the demo and the tuner; nothing else imports this.

The policy: inputs are drawn in the dtype under test; the oracle is the reference in fp64 on the same values; the
yardstick is the error that the reference (eager PyTorch) makes in the dtype under test.  A result's error may be at
most twice the yardstick, a gradient's three times, plus one rounding of the largest value.  There are no other
tolerances.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossattn_kernels.functional import cross_attention
from crossattn_kernels.masks import Mask

SLACK = {"y": 2, "lse": 2}
GRADIENT_SLACK = 3
FEW, DRAWS = 64, 4  # a tensor with fewer elements than this is judged over some draws,
SMALL, MORE_DRAWS = 1024, 16  # and over more where q has fewer elements than this, so that a draw costs little


class Row(NamedTuple):
    """One compared tensor: its largest error and what was allowed."""

    name: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # False for NaN


@dataclass(frozen=True)
class Case:
    """One call, drawn by `draw`.  Sizes as in `Problem`; what is not said is plain."""

    name: str
    B: int = 2
    Hq: int = 4
    Hk: int = 2
    M: int = 37
    N: int = 53
    D: int = 32
    Dv: int | None = None
    dtype: torch.dtype = torch.float32
    mask: str | None = None  # a key of MASKS
    bias: tuple[int, int, int, int] | None = None  # 1 where the bias varies
    gate: str | tuple[int, int, int, int] | None = None  # a key of GATES, or 1 where the gate varies
    gate_value: float | None = None  # the same everywhere, instead of drawn
    scale: str | float | None = None  # "scalar", "head", "signs" (one a head: 0, then below it) or a number
    softcap: float | None = None
    dropout_p: float = 0.0
    empty_rows: str = "zero"
    layout: str = "bhsd"  # a key of LAYOUTS
    share: str | None = None  # "q" or "kv": one batch entry for all; "q expanded", "kv expanded": the same by stride 0
    source: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


class Call(NamedTuple):
    """Arguments of `cross_attention`, and the gradients that flow into its results."""

    tensors: dict[str, Tensor]  # q, k, v and the differentiable ones of bias, gate, scale
    mask: Mask | None
    options: dict[str, Any]
    dy: Tensor
    dlse: Tensor


def _bits(shape: tuple[int, ...], device: torch.device | str, g: torch.Generator, share: float) -> Tensor:
    return (torch.rand(shape, generator=g, device=g.device) < share).to(device)


def _integers(low: int, high: int, shape: tuple[int, ...], device: torch.device | str, g: torch.Generator) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=g, device=g.device).to(device)


def _ranges(c: Case, device: torch.device | str, g: torch.Generator, heads: int = 1) -> Mask:
    start = _integers(0, c.N, (c.B, heads, c.M), device, g)
    return Mask(start, start + _integers(-5, max(1, c.N // 2), (c.B, heads, c.M), device, g))


def _packed(c: Case, device: torch.device | str, g: torch.Generator) -> Mask:
    """Five segments, the first and the fourth without queries, the third without keys; the last queries in none."""
    cu_q = torch.tensor([0, 0, c.M // 3, c.M // 2, c.M // 2, max(c.M // 2, c.M - 3)], device=device)
    cu_k = torch.tensor([0, c.N // 5, c.N // 2, c.N // 2, c.N // 2 + 1, c.N], device=device)
    return Mask.packed(cu_q, cu_k, c.M)


MASKS: dict[str, Callable[[Case, Any, torch.Generator], Mask]] = {
    "lengths": lambda c, d, g: Mask.lengths(_integers(0, c.N, (c.B,), d, g)),
    "padding": lambda c, d, g: Mask.key_padding(_bits((c.B, c.N), d, g, 0.7)),
    "ranges": _ranges,
    "head ranges": lambda c, d, g: _ranges(c, d, g, c.Hq),
    "packed": _packed,
    "media": lambda c, d, g: Mask.media(_bits((c.B, c.M), d, g, 0.15), max(1, c.N // 4)),
    "previous media": lambda c, d, g: Mask.media(_bits((c.B, c.M), d, g, 0.15), max(1, c.N // 4), latest=False),
    "causal": lambda c, d, g: Mask.causal(c.M, c.N, "bottom-right", d),
    "window": lambda c, d, g: Mask.window(c.M, c.N, 5, 3, d),
    "dense": lambda c, d, g: Mask.groups(_bits((c.B, 1, c.M, c.N), d, g, 0.5)),
    "head dense": lambda c, d, g: Mask.groups(_bits((1, c.Hq, c.M, c.N), d, g, 0.5)),
    "tiles": lambda c, d, g: Mask.groups(_bits((c.B, 1, c.M, -(-c.N // 17)), d, g, 0.4), 1, 17),
    "blocks": lambda c, d, g: Mask.blocks(_bits((1, 1, -(-c.M // 16), -(-c.N // 16)), d, g, 0.4), 16, 16),
    "every second": lambda c, d, g: Mask.groups((torch.arange(c.M, device=d) % 2 == 0)[:, None].expand(c.M, c.N)),
    "nothing": lambda c, d, g: Mask.lengths(torch.zeros(c.B, dtype=torch.long, device=d)),
    "all fields": lambda c, d, g: _ranges(c, d, g) & MASKS["padding"](c, d, g) & MASKS["tiles"](c, d, g),
}

GATES: dict[str, Callable[[Case], tuple[int, ...]]] = {
    "scalar": lambda c: (),
    "head": lambda c: (c.Hq,),
    "channel": lambda c: (c.Hq, c.Dv or c.D),
}

GATE_FORMS: tuple[Any, ...] = (*GATES, (1, 1, 1, 1), (1, 0, 1, 0), (0, 0, 0, 1))

LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "bhsd": lambda draw, B, H, S, D: draw(B, H, S, D),
    "bshd": lambda draw, B, H, S, D: draw(B, S, H, D).transpose(1, 2),
    "sbhd": lambda draw, B, H, S, D: draw(S, B, H, D).permute(1, 2, 0, 3),
    "sliced": lambda draw, B, H, S, D: draw(B, S, H, 3 * D + 1)[..., D : 2 * D].transpose(1, 2),
    "last strided": lambda draw, B, H, S, D: draw(B, H, D, S).mT,
}


def draw(
    case: Case, device: torch.device | str = "cpu", seed: int = 0, generator: torch.Generator | None = None
) -> Call:
    """Random inputs of a case; the same on every device, unless a generator of that device draws them there."""
    c, g = case, torch.Generator().manual_seed(seed) if generator is None else generator
    Dv = c.D if c.Dv is None else c.Dv

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=g.device).to(device, c.dtype)

    def tokens(name: str, H: int, S: int, width: int) -> Tensor:
        share = (c.share or "").split()
        entries = 1 if name in (share[0] if share else "") else c.B
        t = LAYOUTS[c.layout](randn, entries, H, S, width)
        return t.expand(c.B, -1, -1, -1) if "expanded" in share and entries < c.B else t

    full = (c.B, c.Hq, c.M, Dv)
    tensors = dict(q=tokens("q", c.Hq, c.M, c.D), k=tokens("k", c.Hk, c.N, c.D), v=tokens("v", c.Hk, c.N, Dv))
    options: dict[str, Any] = dict(empty_rows=c.empty_rows, softcap=c.softcap, dropout_p=c.dropout_p)
    if c.bias is not None:
        tensors["bias"] = randn(*(n if v else 1 for n, v in zip((c.B, c.Hq, c.M, c.N), c.bias)))
    if c.gate is not None:
        by_name = isinstance(c.gate, str)
        shape = GATES[c.gate](c) if by_name else tuple(n if v else 1 for n, v in zip(full, c.gate))  # type: ignore[index]
        tensors["gate"] = randn(*shape) if c.gate_value is None else torch.full_like(randn(*shape), c.gate_value)
    if isinstance(c.scale, str):
        tensors["scale"] = randn(*(() if c.scale == "scalar" else (c.Hq,))).abs() / math.sqrt(c.D)
        if c.scale == "signs":
            tensors["scale"] *= torch.arange(c.Hq, device=device).neg().clamp(min=-1)
    elif c.scale is not None:
        options["scale"] = c.scale
    mask = None if c.mask is None else MASKS[c.mask](c, device, g)
    return Call(tensors, mask, options, randn(*full), randn(*full[:3]).float())


def run(
    call: Call, backend: str | None, dtype: torch.dtype | None = None, through_lse: bool = True, dropout_seed: int = 11
) -> dict[str, Tensor]:
    """y, lse and all gradients ("dq", ...); in another dtype if one is given, without a gradient of lse if so asked."""
    cast = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in call.tensors.items()}
    device = call.tensors["q"].device
    generator = torch.Generator(device).manual_seed(dropout_seed) if call.options.get("dropout_p") else None
    q, k, v = (_same_strides(cast[n], call.tensors[n]) for n in "qkv")
    rest: dict[str, Any] = {n: t for n, t in cast.items() if n not in "qkv"}
    y, lse = cross_attention(
        q, k, v, call.mask, **rest, **call.options, generator=generator, return_lse=True, backend=backend
    )  # fmt: skip
    loss = (y * call.dy.to(y.dtype)).sum(dtype=lse.dtype)
    if through_lse:
        loss = loss + (lse.masked_fill(lse == -math.inf, 0) * call.dlse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, list(cast.values()), allow_unused=True)
    results = {"y": y.detach(), "lse": lse.detach()}
    for name, t, grad in zip(cast, cast.values(), grads):
        results["d" + name] = torch.zeros_like(t) if grad is None else grad
    return results


def _same_strides(t: Tensor, like: Tensor) -> Tensor:
    """`t` with an expanded batch again where `like` has one (a cast keeps strides otherwise)."""
    return t[:1].expand_as(t) if like.stride(0) == 0 and like.shape[0] > 1 else t


def compare(got: dict[str, Tensor], oracle: dict[str, Tensor], yardstick: dict[str, Tensor]) -> list[Row]:
    """One row a tensor, by the policy at the top of this file."""
    rows = []
    for name, exact in oracle.items():
        result, eager = got[name], yardstick[name]
        assert result.shape == exact.shape, f"{name}: {tuple(result.shape)} is not {tuple(exact.shape)}"
        hidden = exact == -math.inf  # lse of empty rows
        if not torch.equal(result == -math.inf, hidden):
            rows.append(Row(name, math.inf, 0.0))
            continue
        exact = exact.masked_fill(hidden, 0)
        slack = SLACK.get(name, GRADIENT_SLACK)
        rounding = torch.finfo(result.dtype).eps / 2 * _largest(exact)
        error, allowed = (_largest(t.double().masked_fill(hidden, 0) - exact) for t in (result, eager))
        rows.append(Row(name, error, slack * allowed + rounding))
    return rows


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def check(
    case: Case, backend: str | None, device: torch.device | str = "cpu", seed: int = 0, through_lse: bool = True
) -> list[Row]:
    """Errors and budgets of a backend on a case: results and all gradients."""
    tensors = draw(case).tensors
    # not where the interpreter may run them
    draws = MORE_DRAWS if tensors["q"].numel() < SMALL and backend != "triton" else DRAWS
    few = any(t.numel() < FEW for t in tensors.values())

    def rows(seed: int) -> list[Row]:
        call = draw(case, device, seed)
        ways = ((backend, None), ("reference", torch.float64), ("reference", None))
        return compare(*(run(call, name, dtype, through_lse) for name, dtype in ways))

    return worst([rows(seed + i) for i in range(draws if few else 1)])


def worst(draws: list[list[Row]]) -> list[Row]:
    """One table for several draws: the largest error of each tensor against the largest budget.

    The largest error of a tensor of a few elements is a matter of luck, eager's as ours; over some draws it is not.
    """
    return [
        Row(rows[0].name, max((r.error for r in rows), key=_nan_first), max(r.budget for r in rows))
        for rows in zip(*draws)
    ]


def _nan_first(x: float) -> float:
    return math.inf if math.isnan(x) else x


def assert_within_budget(rows: list[Row], what: object = "") -> None:
    """AssertionError that names every tensor over its budget."""
    bad = [f"{r.name}: error {r.error:.3e} > budget {r.budget:.3e}" for r in rows if not r.ok]
    assert not bad, f"{what}: {'; '.join(bad)}"


@contextlib.contextmanager
def poisoned(strict: bool = True) -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel forgets to write shows; with `strict` what PyTorch itself cannot do
    reproducibly raises."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=not strict)  # PyTorch then fills uninitialised memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def with_dtypes(cases: list[Case], *dtypes: torch.dtype) -> list[Case]:
    return [replace(c, dtype=d) for d in dtypes for c in cases]


# ---- the battery: every backend, small sizes; one axis at a time ----

PLAIN = Case("plain")

FEATURES = [
    PLAIN,
    *(replace(PLAIN, name=f"mask {m}", mask=m) for m in MASKS),
    replace(PLAIN, name="long padding", mask="padding", N=300),
    *(replace(PLAIN, name=f"{e} {m}", mask=m, empty_rows=e)
      for e in ("uniform", "attend_all") for m in ("ranges", "every second", "all fields", "nothing", "padding")),
    *(replace(PLAIN, name=f"bias {b}", bias=b)
      for b in ((1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 1, 1), (0, 0, 1, 1), (1, 0, 0, 1), (0, 1, 0, 1), (1, 1, 1, 0),
                (0, 0, 0, 0))),
    *(replace(PLAIN, name=f"gate {g}", gate=g) for g in GATE_FORMS),
    *(replace(PLAIN, name=f"gate {g} at 0", gate=g, gate_value=0.0) for g in GATES),
    replace(PLAIN, name="scale number", scale=0.7),
    replace(PLAIN, name="scale scalar", scale="scalar"),
    replace(PLAIN, name="scale head", scale="head"),
    replace(PLAIN, name="scale below 0", scale=-0.7, mask="all fields"),
    replace(PLAIN, name="scale signs", scale="signs", mask="all fields"),
    replace(PLAIN, name="scale signs, bias", scale="signs", bias=(0, 1, 1, 1)),
    replace(PLAIN, name="scale signs, softcap", scale="signs", softcap=1.5, mask="lengths"),
    replace(PLAIN, name="softcap", softcap=1.5),
    replace(PLAIN, name="dropout", dropout_p=0.3),
    *(replace(PLAIN, name=f"layout {lay}", layout=lay) for lay in LAYOUTS if lay != "bhsd"),
    *(replace(PLAIN, name=f"share {s}", share=s) for s in ("q", "kv", "q expanded", "kv expanded")),
    replace(PLAIN, name="share q, gate, scale", share="q", gate="head", scale="head"),
    replace(PLAIN, name="everything", mask="all fields", bias=(0, 1, 1, 1), gate="head", scale="head", softcap=2.0,
            dropout_p=0.2, empty_rows="uniform", layout="bshd"),
    replace(PLAIN, name="everything by channel", mask="ranges", bias=(1, 0, 0, 1), gate="channel", scale="scalar",
            dropout_p=0.2, empty_rows="attend_all", layout="sliced", share="kv"),
]  # fmt: skip

SIZES = [
    *(replace(PLAIN, name=f"D {d}", D=d, M=19, N=21) for d in (8, 16, 40, 72, 80, 88, 96, 112, 128, 160, 256)),
    *(replace(PLAIN, name=f"D {d} Dv {e}", D=d, Dv=e, M=19, N=21) for d, e in ((16, 40), (64, 24), (8, 128), (96, 64))),
    *(replace(PLAIN, name=f"{m} x {n}", M=m, N=n, D=16)
      for m, n in ((1, 1), (1, 130), (130, 1), (2, 3), (3, 77), (65, 64))),
    *(replace(PLAIN, name=f"heads {hq} / {hk}", Hq=hq, Hk=hk, M=9, N=33, D=16)
      for hq, hk in ((3, 1), (6, 2), (1, 1), (8, 1))),
    *(replace(PLAIN, name=f"empty {n}", **{n: 0}) for n in ("B", "M", "N")),  # type: ignore[arg-type]
    replace(PLAIN, name="no keys uniform", N=0, empty_rows="uniform", mask="lengths"),
]  # fmt: skip
