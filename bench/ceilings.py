"""What the machine can do, measured in the same run as what is judged by it: products, copies, exponentials."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.clocks import between_events
from bench.floors import Cost
from bench.measure import seconds

ROUNDS = 10


def on_cuda() -> Cost:
    """bf16 product of 8192^3; device copy of 2 GiB; exp2 in registers.  Medians, per second."""
    from bench.exponentials import PROGRAMS_PER_SM, exponentials

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.zeros(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties().multi_processor_count
    count = exponentials(programs)[1]

    def once(work: Callable[[], object]) -> float:
        return between_events(work, 200e-6)[0]

    return Cost(
        flops=2 * 8192**3 / _median(lambda: once(lambda: a @ a)),
        bytes=2 * source.numel() / _median(lambda: once(lambda: target.copy_(source))),
        exps=count / _median(lambda: once(lambda: exponentials(programs))),
    )


def on_cpu() -> Cost:
    """fp32 product of 1024^3; copy of 64 MiB; exp of 2^22 numbers."""
    a, source, x = torch.randn(1024, 1024), torch.zeros(2**26, dtype=torch.uint8), torch.randn(2**22)
    target, y = torch.empty_like(source), torch.empty_like(x)
    return Cost(
        flops=2 * 1024**3 / _median(lambda: seconds(lambda: a @ a)),
        bytes=2 * source.numel() / _median(lambda: seconds(lambda: target.copy_(source))),
        exps=x.numel() / _median(lambda: seconds(lambda: torch.exp(x, out=y))),
    )


def _median(measure: Callable[[], float]) -> float:
    return sorted(measure() for _ in range(ROUNDS))[ROUNDS // 2]
