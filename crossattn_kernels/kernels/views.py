"""What crosses from the host to a kernel.  A field that is None vanishes at compile time, with the code behind it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossattn_kernels import dropout
from crossattn_kernels.problem import Inputs, Options, Problem
from crossattn_kernels.tuning import Config, power_of_two

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class View(NamedTuple):
    """A strided tensor; a broadcast dimension has stride 0."""

    ptr: Any
    strides: tuple


class MaskView(NamedTuple):
    """Which keys a query may see."""

    start: View | None = None  # (B, Hq, M)
    end: View | None = None  # (B, Hq, M)
    keys: View | None = None  # (B, N)
    visible: View | None = None  # (B, Hq, query groups, key groups)
    free: View | None = None  # (B, Hq, M): nonzero where a row sees every key after all
    flat: View | None = None  # (B, Hq, M): nonzero where its logits are 0 besides
    query_group: Any = 1  # constant
    key_group: Any = 1


class Logits(NamedTuple):
    """How the product q kᵀ becomes a logit."""

    scale: float
    head_scale: View | None  # (B, Hq), multiplies scale
    softcap: float | None
    bias: View | None  # (B, Hq, M, N)
    mask: MaskView


class Dropout(NamedTuple):
    """Draws below `threshold` of 2^24 are dropped, the rest is raised by `factor`."""

    seed: Tensor
    threshold: int
    factor: float
    first_key: int


def constant(n: Any) -> Any:
    """A number that the kernel is compiled for; the interpreter takes it as it is."""
    return n if INTERPRETED.value else tl.constexpr(n)


def view(t: Tensor | None, *shape: int) -> Any:
    """`t` broadcast to `shape` (as it is without one)."""
    if t is None:
        return None
    t = t.view(torch.uint8) if t.dtype == torch.bool else t
    return View(t, t.expand(shape).stride() if shape else t.stride())


def logits_view(x: Inputs, options: Options, free: Tensor | None) -> Logits:
    B, Hq, M, N = x.sizes
    groups = (-(-M // options.query_group), -(-N // options.key_group))
    mask = MaskView(
        view(x.start, B, Hq, M),
        view(x.end, B, Hq, M),
        view(x.keys, B, N),
        view(x.visible, B, Hq, *groups),
        view(free, B, Hq, M),
        view(free, B, Hq, M) if options.empty_rows == "uniform" else None,
        constant(options.query_group),
        constant(options.key_group),
    )
    scale = 1.0 if x.scale is not None else options.scale
    return Logits(scale, view(x.scale, B, Hq), options.softcap or None, view(x.bias, B, Hq, M, N), mask)


def row_gate_view(x: Inputs) -> View | None:
    """A gate that is one number a row, as (B, Hq, M)."""
    return None if x.gate is None or x.gate_varies else view(x.gate[..., 0], *x.sizes[:3])


def dropout_view(x: Inputs, options: Options) -> Dropout | None:
    if not options.dropout_p:
        return None
    assert x.seed is not None
    return Dropout(x.seed, dropout.threshold(options.dropout_p), 1 / (1 - options.dropout_p), options.first_key)


class Rows(NamedTuple):
    """What the backward knows of every query, each (B, Hq, M)."""

    lse: View
    high: View | None  # base-2 maximum of the logits; without it p comes from lse, as for a chunk of a longer whole
    inverse: View | None  # 1 / sum of 2^(s - high)
    delta: View  # rowsum(o * do) - dlse, or -dlse for a kernel whose tile holds all keys
    gate: View | None  # a gate that is one number a row


class Constants(NamedTuple):
    """What a kernel is compiled for."""

    GROUP: int  # query heads a key head
    HIDES: bool  # some query may not see some key
    ALONE: bool  # one tile holds all keys of the softmax
    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_M: int
    BLOCK_N: int
    TF32: bool  # for fp32 products; otherwise IEEE


def launch_options(problem: Problem, options: Options, config: Config) -> dict[str, Any]:
    """The compile-time argument C of a kernel, and how it is launched."""
    constants = Constants(
        GROUP=problem.group,
        HIDES=problem.masked or problem.biased,
        ALONE=problem.N <= config.BLOCK_N and not options.chunk,
        D=problem.D,
        DV=problem.Dv,
        BLOCK_D=max(16, power_of_two(problem.D)),
        BLOCK_DV=max(16, power_of_two(problem.Dv)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        TF32=torch.get_float32_matmul_precision() != "highest",
    )
    return dict(
        C=Constants(*map(constant, constants)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
