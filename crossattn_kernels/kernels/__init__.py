"""Backend "triton": the engine that `ops` calls, and what it cannot serve."""

from __future__ import annotations

from torch import Tensor

from crossattn_kernels.kernels.backward import Backward
from crossattn_kernels.kernels.bias_grad import bias_grad
from crossattn_kernels.kernels.forward import forward
from crossattn_kernels.kernels.views import INTERPRETED
from crossattn_kernels.problem import Inputs, Options, Problem
from crossattn_kernels.tiled import Gradients

__all__ = ["backward", "forward", "unsupported"]


def backward(
    dy: Tensor,
    dlse: Tensor | None,
    x: Inputs,
    options: Options,
    o: Tensor,
    lse: Tensor,
    state: Tensor,
    free: Tensor | None,
    wanted: Gradients,
) -> Gradients:
    """Gradients of the wanted inputs; o is the gated output, or the ungated one when the gate varies along Dv."""
    run = Backward(dy, dlse, x, options, o, lse, state, free)
    row_gate = bool(wanted.gate) and not x.gate_varies
    dq = dk = dv = dgate = dscale = None
    if wanted.q or wanted.scale or row_gate:
        dq, dgate, dscale = run.dq(row_gate, bool(wanted.scale))
    if wanted.k or wanted.v:
        dk, dv = run.dkv()
    if wanted.gate and x.gate_varies:
        dgate = run.dgate_by_channel()
    found = Gradients(dq, dk, dv, bias_grad(run) if wanted.bias else None, dgate, dscale)
    asked = ((g, getattr(x, name), w) for name, g, w in zip(Gradients._fields, found, wanted))
    return Gradients(*(g.to(t.dtype) if w and g is not None else None for g, t, w in asked))


def unsupported(problem: Problem) -> tuple[str, ...]:
    """Every reason why the kernels cannot serve a problem."""
    reasons = []
    if problem.device.type != "cuda" and not (problem.device.type == "cpu" and INTERPRETED.value):
        reasons.append(f"the tensors are on {problem.device}, not on a GPU")
    if problem.dtype.itemsize > 4:
        reasons.append(f"{problem.dtype} is wider than fp32")
    if max(problem.D, problem.Dv) > 256:
        reasons.append(f"head sizes go up to 256, got D = {problem.D} and Dv = {problem.Dv}")
    return tuple(reasons)
