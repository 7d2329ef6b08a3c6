"""Backend "triton": the engine that `ops` calls, and what it cannot serve."""

from __future__ import annotations

from crossattn_kernels.kernels.backward import backward
from crossattn_kernels.kernels.forward import forward
from crossattn_kernels.kernels.tiles import INTERPRETED
from crossattn_kernels.problem import Problem

__all__ = ["backward", "forward", "unsupported"]


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
