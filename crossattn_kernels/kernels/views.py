"""What crosses from the host to a kernel.  A field that is None is gone at compile time, and so is the code behind it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossattn_kernels import dropout
from crossattn_kernels.problem import Inputs, Options, Problem
from crossattn_kernels.tuning import Config, power_of_two


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
    query_group: int = 1
    key_group: int = 1


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
        options.query_group,
        options.key_group,
    )
    scale = 1.0 if x.scale is not None else options.scale
    return Logits(scale, view(x.scale, B, Hq), options.softcap or None, view(x.bias, B, Hq, M, N), mask)


def dropout_view(x: Inputs, options: Options) -> Dropout | None:
    if not options.dropout_p:
        return None
    assert x.seed is not None
    return Dropout(x.seed, dropout.threshold(options.dropout_p), 1 / (1 - options.dropout_p), options.first_key)


def constants(problem: Problem, config: Config) -> dict[str, Any]:
    """What every kernel is specialised for, and its launch options."""
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return dict(
        GROUP=problem.group,
        HIDES=problem.masked or problem.biased,
        D=problem.D,
        DV=problem.Dv,
        BLOCK_D=max(16, power_of_two(problem.D)),
        BLOCK_DV=max(16, power_of_two(problem.Dv)),
        PRECISION=precision,
        enable_fp_fusion=True,
        **config._asdict(),
    )
