"""Compile the kernels for a GPU that is not here: what they became, and Triton's cache filled before deployment.

`python -m crossattn_kernels compile --arch sm_90` compiles a sweep of named calls and reports registers, spills, shared
memory and instructions of every kernel.  Calls go the way of real ones, with `meta` tensors instead of tensors on a
GPU, so that a kernel is specialised as it will be, and Triton's cache (by default `~/.triton/cache`) holds what a
machine with that GPU would compile: `compile_call` does this for calls of one's own,

    q = torch.empty(2, 4096, 10, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    k = torch.empty(2, 77, 10, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    compile_call("sm_90", q, k, k)

and the cache is then copied to where it is needed, to the same path, Triton and PyTorch.  Imports triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossattn_kernels import problem
from crossattn_kernels.aot.calls import Call, arguments, sweep
from crossattn_kernels.aot.machine_code import Figures, figures
from crossattn_kernels.aot.target import launched, standing_in, timed
from crossattn_kernels.masks import Mask
from crossattn_kernels.problem import Gradients, Inputs, Options
from crossattn_kernels.tuning import Config

__all__ = ["Call", "Row", "compile_call", "compile_named", "sweep"]


class Row(NamedTuple):
    """One kernel of one call."""

    kernel: str
    schedule: str
    config: Config
    figures: Figures
    seconds: float  # of compilation; next to none where Triton's cache had it


def compile_call(
    arch: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    backward: bool = True,
    started: Callable[[str], None] = lambda kernel: None,
    brief: bool = False,
    **rest: Any,
) -> list[Row]:
    """Compile what `cross_attention` with these `meta` tensors, and its backward, would run on `arch`.

    backward: whether the gradients of all floating-point arguments are wanted.
    started: called with the name of every kernel before it is compiled.
    brief: without counts of instructions, which take longer than a compilation that Triton's cache has.
    """
    with standing_in(arch), timed(started) as seconds:
        _run(*problem.canonical(q, k, v, mask, **rest), backward)
        return [
            Row(
                name,
                schedule,
                config,
                figures(compiled, arch, config.BLOCK_M * config.BLOCK_N, brief),
                seconds.get(name, 0.0),
            )
            for name, schedule, config, compiled in launched()
        ]


def compile_named(
    arch: str, call: Call, started: Callable[[str], None] = lambda kernel: None, brief: bool = False
) -> list[Row]:
    """The same for a call of the sweep."""
    shape, (q, k, v), rest = arguments(call)
    return compile_call(arch, q, k, v, backward=shape.backward, started=started, brief=brief, **rest)


def _run(x: Inputs, options: Options, backward: bool) -> None:
    from crossattn_kernels import kernels

    if options.dropout_p:
        x = x._replace(seed=torch.empty((), dtype=torch.int64, device=x.q.device))
    y, o, lse, state, found = kernels.forward(x, options)
    if backward:
        wanted: Any = Gradients._make(getattr(x, name) is not None for name in Gradients._fields)
        filled = None if options.empty_rows == "zero" or options.mask(x).is_trivial() else found
        kernels.backward(torch.empty_like(y), None, x, options, o if x.gate_varies else y, lse, state, filled, wanted)
