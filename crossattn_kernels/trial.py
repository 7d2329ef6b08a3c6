"""What `tune.py` tries: the configurations of a kernel on a call, whether they are right and how long they take."""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib import metadata
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from crossattn_kernels import testing, tuning
from crossattn_kernels.problem import Problem, canonical
from crossattn_kernels.testing import Case
from crossattn_kernels.tuning import Chip, Config, rules, tables

# kernel of a table: what is launched for it, with preparation and sums of parts
LAUNCHES = {
    "forward": ("forward_kernel", "merge_kernel"),
    "dq": ("dq_kernel",),
    "dkv": ("tile_ranges_kernel", "dkv_kernel", "fold_kernel"),
    "short_keys": ("dkv_kernel", "fold_kernel"),
    "short_queries": ("short_queries_kernel", "fold_kernel"),
    "bias_grad": ("bias_grad_kernel",),
}
CLEARED = 2**29  # bytes read before each measurement: more than any cache holds
HOLD = 2_000_000  # cycles that the device spins, about a millisecond, while the host queues what is measured
OF_SCHEDULE = {"short keys": ("short_keys",), "short queries": ("short_queries",), "two-pass": ("dq", "dkv")}


class Machine(NamedTuple):
    """What measurements hold for and how they are made; `check` and `times` take (case, kernel, what to run it by)."""

    device: torch.device
    gpu: str
    torch: str
    triton: str
    check: Callable[[Case, str, Config], str]  # what is wrong; empty if nothing is
    times: Callable[[Case, str, Sequence[Config]], list[float]]  # milliseconds of each
    settle: Callable[[], None] = lambda: None  # raises where the GPU has failed for good
    clock: Callable[[], float] = time.monotonic  # seconds

    @staticmethod
    def present() -> Machine:
        """The first GPU; ValueError if there is none."""
        if not torch.cuda.is_available():
            raise ValueError("tune needs a GPU that this torch can use; there is none")
        found, device = metadata.packages_distributions().get("triton"), torch.device("cuda", 0)
        if not found:
            raise ValueError("tune needs Triton, which is not installed")
        gpu, triton = torch.cuda.get_device_name(device), metadata.version(found[0])
        found_wrong, times = partial(check, device=device), partial(cuda_times, device=device)
        settle = partial(torch.cuda.synchronize, device)
        return Machine(device, gpu, torch.__version__, triton, found_wrong, times, settle)


class Job(NamedTuple):
    """One kernel on one workload."""

    case: Case
    kernel: str
    problem: Problem
    configs: dict[Config, Config]  # as a table says it: as it is launched; the present one first

    @property
    def key(self) -> tables.Key:
        """What its configuration is looked up by, as `tables.KEY`."""
        return tables.key_of(self.problem, self.kernel)

    @property
    def identity(self) -> tuple[str, str, str]:
        """Shape, with what else the case asks for; dtype; kernel."""
        c = self.case
        asks = (f"{n}={v}" for n, v in vars(c).items() if n in ("mask", "bias", "softcap") and v is not None)
        shape = ",".join(str(n) for n in (c.B, c.Hq, c.Hk, c.M, c.N, c.D))
        return " ".join((shape, *asks)), str(c.dtype).removeprefix("torch."), self.kernel


# ---- what there is to try ----


def jobs(cases: Sequence[Case], kernels: Sequence[str], device: torch.device) -> list[Job]:
    """Those of the kernels that calls of the cases run, a table's keys in turn; ValueError if there are none."""
    found, chip = [], tuning.chip_of(device)
    for case in cases:
        problem = problem_of(case, device)
        used = ("forward", *OF_SCHEDULE[tuning.plan(problem).backward_schedule], *["bias_grad"] * problem.biased)
        for kernel in used:
            if kernel in kernels:
                configs = {c: launched(kernel, c, problem, chip) for c in candidates(kernel, problem, chip)}
                found.append(Job(case, kernel, problem, configs))
    if not found:
        raise ValueError(f"nothing to do: no call of {', '.join(c.name for c in cases)} runs {' or '.join(kernels)}")
    return sorted(found, key=lambda job: job.key)


def problem_of(case: Case, device: torch.device) -> Problem:
    """What `plan` looks at, without tensors of full size."""
    call = testing.draw(reduced(case, Config(16, 16, 4, 1)))
    problem = Problem.of(*canonical(**call.tensors, mask=call.mask, **call.options))  # type: ignore[arg-type]
    return problem._replace(B=case.B, Hq=case.Hq, Hk=case.Hk, M=case.M, N=case.N, device=device)


def candidates(kernel: str, problem: Problem, chip: Chip) -> list[Config]:
    """What a table could say: what it or the rule says now, then all else that fits."""
    present = tables.lookup(chip, problem, kernel) or rules.tiles(kernel, problem, chip)
    sizes = (16, 32, 64) if problem.dtype.itemsize == 4 else (32, 64, 128)
    # this tile is also the longest that the schedule serves: another one would give it other calls
    queries = (present.BLOCK_M,) if kernel == "short_queries" else sizes
    keys = (present.BLOCK_N,) if kernel == "short_keys" else sizes
    stages = (2, 3, 4) if kernel == "forward" else (1, 2, 3)
    by_descriptor = (False, True) if kernel == "forward" and chip.descriptors and problem.aligned else (False,)
    grid = itertools.product(by_descriptor, queries, keys, (4, 8), stages)
    others = (Config(m, n, warps, depth, descriptors=loads) for loads, m, n, warps, depth in grid)
    return list(dict.fromkeys([present, *(c for c in others if _fits(kernel, c, problem, chip))]))


def _fits(kernel: str, config: Config, problem: Problem, chip: Chip) -> bool:
    try:
        rules.check_fit(kernel, config, problem, chip)
    except ValueError:
        return False
    return True


def launched(kernel: str, config: Config, problem: Problem, chip: Chip) -> Config:
    """What `plan` makes of a configuration: tiles no larger than the problem, and the splits of the rule."""
    if kernel == "short_queries":
        return rules.all_queries(config, problem, chip)
    split = {"forward": rules.split_keys, "dq": rules.split_dq, "bias_grad": rules.split_terms}
    return split.get(kernel, rules.split_queries)(rules.fitted(config, problem), problem, chip)


# ---- one configuration ----


def forcing(kernel: str, config: Config) -> dict[str, Any]:
    """The arguments of `tuning.force` for a kernel of a table."""
    schedule = next((name for name, kernels in OF_SCHEDULE.items() if kernel in kernels), None)
    field = "dkv" if kernel == "short_keys" else kernel
    return {field: config} | ({"backward_schedule": schedule} if schedule else {})


def reduced(case: Case, config: Config) -> Case:
    """A small call for the same tiles: it shares heads alike, and ends within a tile where the large one does."""

    def few(n: int, tile: int) -> int:
        return n if n < 5 * tile else 4 * tile + n % tile

    Hk = min(case.Hk, 2)
    M, N = few(case.M, config.BLOCK_M), few(case.N, config.BLOCK_N)
    return replace(case, B=min(case.B, 2), Hq=case.Hq // case.Hk * Hk, Hk=Hk, M=M, N=N)


def check(case: Case, kernel: str, config: Config, device: torch.device) -> str:
    """What is over its budget on a small call whose kernel runs by this configuration; empty if nothing is."""
    return wrong(reduced(case, config), forcing(kernel, config._replace(splits=min(config.splits, 2))), device)


def wrong(case: Case, changes: dict[str, Any], device: torch.device) -> str:
    """What is over its budget with these changes to the plan; empty if nothing is."""
    with warnings.catch_warnings(), tuning.force(**changes), testing.poisoned(strict=False):
        warnings.filterwarnings("ignore", message=".*deterministic")  # of the reference, not of the kernels
        rows = testing.check(case, "triton", device)
    return "; ".join(f"{row.name}: error {row.error:.1e} > {row.budget:.1e}" for row in rows if not row.ok)


def launches(case: Case, names: Sequence[str], changes: dict[str, Any], device: torch.device) -> Callable[[], None]:
    """Runs a call once; what it returns launches these kernels of it again, and nothing else."""
    from crossattn_kernels.kernels.launch import Launcher

    kept: list[Callable[[], None]] = []
    launch = Launcher.__call__

    def keep(self: Launcher, jitted: Any, *args: Any, label: str = "") -> None:
        launch(self, jitted, *args, label=label)
        if jitted.__name__ in names:
            kept.append(partial(launch, self, jitted, *args, label=label))

    with tuning.force(**changes), patch.object(Launcher, "__call__", keep):
        testing.run(_drawn(case, device), "triton", through_lse=False)

    def again() -> None:
        for one in kept:
            one()

    return again


@lru_cache(maxsize=1)
def _drawn(case: Case, device: torch.device) -> testing.Call:
    return testing.draw(case, device)


def cuda_times(case: Case, kernel: str, configs: Sequence[Config], device: torch.device) -> list[float]:
    """Median milliseconds of each."""
    return in_turns([launches(case, LAUNCHES[kernel], forcing(kernel, c), device) for c in configs], device)


def in_turns(ways: Sequence[Callable[[], None]], device: torch.device) -> list[float]:
    """Median milliseconds of each, taken in turns, the L2 cache cold."""
    clear = torch.empty(CLEARED, dtype=torch.uint8, device=device)

    def once(way: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HOLD)
        clear.sum()  # read, not written: dirty lines would go back to memory while the way runs
        start.record()
        way()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    slowest = max(once(way) for _ in range(3) for way in ways)
    rounds = min(100, max(10, int(200 / slowest)))
    samples = [[once(way) for way in ways] for _ in range(rounds)]
    return [statistics.median(times) for times in zip(*samples)]
