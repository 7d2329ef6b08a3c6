"""Backend "triton": the engine that `ops` calls, and what it cannot serve."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from crossattn_kernels.kernels.backward import Backward
from crossattn_kernels.kernels.bias_grad import bias_grad
from crossattn_kernels.kernels.forward import forward as forward_here
from crossattn_kernels.kernels.short_queries import short_queries
from crossattn_kernels.kernels.views import INTERPRETED
from crossattn_kernels.problem import Gradients, Inputs, Options

__all__ = ["backward", "forward", "unsupported"]


def forward(x: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, o, lse, state, filled), as `ops.forward_op` documents."""
    with _current(x.q.device):
        return forward_here(x, options)


def backward(
    dy: Tensor,
    dlse: Tensor | None,
    x: Inputs,
    options: Options,
    o: Tensor,
    lse: Tensor,
    state: Tensor,
    filled: Tensor | None,
    wanted: Gradients,
) -> Gradients:
    """Gradients of the wanted inputs; o is the gated output, or the ungated one when the gate varies along Dv."""
    if not math.prod(x.sizes):
        return Gradients(*(torch.zeros_like(getattr(x, n)) if w else None for n, w in zip(Gradients._fields, wanted)))
    with _current(x.q.device):
        return gradients(Backward(dy, dlse, x, options, o, lse, state, filled, wanted))


def gradients(backward: Backward) -> Gradients:
    """Those that are wanted, by the schedule of the plan if both sides want some."""
    x, wanted = backward.x, backward.wanted
    by_queries = wanted.q or wanted.scale or (wanted.gate and not x.gate_varies)
    by_keys = wanted.k or wanted.v
    schedule = backward.launch.plan.backward_schedule if by_queries and by_keys else "two-pass"
    if schedule == "short queries":
        found = short_queries(backward)
    elif schedule == "short keys":
        sums = backward.query_sums(x.sizes[0])
        found = backward.by_keys(sums)._replace(**backward.summed(sums))
    else:
        found = backward.by_keys() if by_keys else Gradients()
        found = found._replace(**backward.by_queries()) if by_queries else found
    if wanted.gate and x.gate_varies:
        found = found._replace(gate=backward.dgate_by_channel())
    if wanted.bias:
        found = found._replace(bias=bias_grad(backward))
    asked = zip(found, (x.q, x.k, x.v, x.bias, x.gate, x.scale), wanted)
    return Gradients(*[g.to(t.dtype) if w and g is not None and t is not None else None for g, t, w in asked])


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whichever holds the tensors."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else HERE


HERE = contextlib.nullcontext()


def unsupported(device: torch.device, dtype: torch.dtype, D: int, Dv: int) -> tuple[str, ...]:
    """Every reason why the kernels cannot serve such tensors."""
    reasons = []
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED.value):
        reasons.append(f"the tensors are on {device}, not on a GPU")
    if dtype.itemsize > 4:
        reasons.append(f"{dtype} is wider than fp32")
    if D > 256 or Dv > 256:
        reasons.append(f"head sizes go up to 256, got D = {D} and Dv = {Dv}")
    return tuple(reasons)
