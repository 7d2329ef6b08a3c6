"""Host time from call to last launch, without a GPU: Triton's own launcher calls a CUDA driver that launches nothing.

`python -m bench.host` prints microseconds of one call, median over rounds; run it on a quiet machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton

from bench.libcuda import launching
from crossattn_kernels import cross_attention, kernels
from crossattn_kernels.kernels import launch
from crossattn_kernels.kernels.forward import forward_kernel
from crossattn_kernels.problem import canonical

CALLS, ROUNDS = 200, 15


def microseconds(*works: Callable[[], Any]) -> list[float]:
    """Of one call of each, medians over rounds in which each has its turn."""
    rounds = []
    for _ in range(ROUNDS + 1):
        rounds.append([_seconds(work) / CALLS * 1e6 for work in works])
    return [statistics.median(column) for column in zip(*rounds[1:])]


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        work()
    return time.perf_counter() - start


def main() -> None:
    with launching("sm_90"):
        report()


def report() -> None:
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 8, n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (32, 77, 77))
    constants = [t.detach() for t in (q, k, v)]
    x, options = canonical(q, k, v)
    seen: list[tuple[Any, ...]] = []
    with mock.patch.object(launch.Launcher, "__call__", lambda *call: seen.append(call)):
        kernels.forward(x, options)
    run, kernel, arguments, *tensors = next(call for call in seen if call[1] is forward_kernel)
    programs, *args = arguments(*tensors)
    config = run.plan.forward
    C, warps = run.constants(config), dict(num_warps=config.num_warps, num_stages=config.num_stages)

    def ours() -> torch.Tensor:
        return cross_attention(q, k, v, backend="triton")

    def inference() -> torch.Tensor:
        return cross_attention(*constants, backend="triton")

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def both(forward: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        dy = torch.empty(1, 8, 32, 64, dtype=torch.bfloat16)
        return lambda: torch.autograd.grad(forward(), (q, k, v), dy)

    works = {
        "kernel[grid](...) of Triton": lambda: kernel[(programs,)](*args, C, **warps, enable_fp_fusion=True),
        "decision and launch of the same kernel": lambda: launch.Launcher.of(x, options)(kernel, arguments, *tensors),
        "decision alone": lambda: launch.Launcher.of(x, options),
        "checks of the arguments": lambda: canonical(q, k, v),
        "forward of the kernels": lambda: kernels.forward(x, options),
        "cross_attention, forward, nothing to differentiate": inference,
        "cross_attention, forward": ours,
        "cross_attention, forward and backward": both(ours),
        "SDPA on the CPU, which computes, forward": sdpa,
    }
    print(f"torch {torch.__version__}, triton {triton.__version__}, host microseconds a call")
    for name, us in zip(works, microseconds(*works.values())):
        print(f"{us:8.1f}  {name}")


if __name__ == "__main__":
    main()
