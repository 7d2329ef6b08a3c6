"""Clocks and scales: interleaved times, extra memory of a fresh process, fitted exponents."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple


class Quantiles(NamedTuple):
    """What a table shows of a sample."""

    p20: float
    p50: float
    p80: float

    @staticmethod
    def of(sample: Sequence[float]) -> Quantiles:
        p20, _, _, p80 = statistics.quantiles(sample, n=5, method="inclusive")
        return Quantiles(p20, statistics.median(sample), p80)

    def __str__(self) -> str:
        return " / ".join(f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in self)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds_for(works: Sequence[Callable[[], object]], budget: float = 6.0) -> int:
    """How many rounds of all contenders fit a budget in seconds; 15 to 60, after a first warm-up."""
    once = sum(seconds(work) for work in works for _ in range(2)) / 2
    return max(15, min(60, round(budget / once)))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(value) over log(size): least squares."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def extra_memory(provider: str, sizes: Sequence[int], mode: str, **case: object) -> int:
    """Peak bytes beyond the inputs of one call, (B, H, M, N, D) = sizes, in a process of its own."""
    spec = json.dumps(dict(provider=provider, sizes=list(sizes), mode=mode, case=case))
    done = subprocess.run([sys.executable, "-m", "bench.measure", spec], check=True, capture_output=True, text=True)
    return int(done.stdout)


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def _measure(provider: str, sizes: list[int], mode: str, case: dict[str, object]) -> int:
    import torch

    from bench.providers import bind
    from crossattn_kernels.testing import Case, draw

    torch.set_num_threads(2)

    def work(B: int, H: int, M: int, N: int, D: int) -> Callable[[], object]:
        call = draw(Case("", B=B, Hq=H, Hk=H, M=M, N=N, D=D, **case))  # type: ignore[arg-type]
        return bind(provider, call, mode)

    work(1, 1, 32, 32, 32)()  # what a first call loads is not the call's
    return peak_of(work(*sizes))


def peak_of(work: Callable[[], object]) -> int:
    """Peak bytes that this process takes beyond what it has."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


if __name__ == "__main__":
    print(_measure(**json.loads(sys.argv[1])))
