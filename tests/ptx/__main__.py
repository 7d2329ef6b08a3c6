"""`python -m tests.ptx --arch sm_90 "split, plain" float16`: every schedule and feature as compiled code, against fp64.

A line a case: its largest share of a budget, the kernels that ran, seconds.  Exit status 1 if any is over its budget.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from crossattn_kernels.aot import Call, calls, sweep
from crossattn_kernels.problem import Problem, canonical
from crossattn_kernels.testing import FEATURES, PLAIN, SIZES, Case, check, poisoned
from crossattn_kernels.tuning import assumed, force, plan
from tests.ptx.driver import executing

# sizes that make `plan` choose a schedule, with some tiles and a part of one
SCHEDULES: dict[str, dict[str, Any]] = {
    "two-pass": dict(M=140, N=270),
    "short keys": dict(M=150, N=77),
    "short queries": dict(M=16, N=300),
    "split": dict(B=1, M=16, N=1000),
    "packed decode": dict(B=1, Hq=8, Hk=2, M=1, N=1000),
    "split queries": dict(B=1, M=300, N=1000),
}
# tiles and layouts change with the head size
WIDE = [
    replace(case, name=f"{case.name} {d}", B=1, Hq=2, Hk=1, M=140, N=270, D=d)
    for case in FEATURES
    for d in (32, 72, 96, 128, 256)
    if case.name in ("plain", "mask ranges", "everything")
]
SOME = ("plain", "mask all fields", "dropout", "everything", "everything by channel")


BIAS = dict(bias=(0, 1, 1, 1))
# what the kinds of the compiler's sweep ask for, as cases of the battery
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ranges": dict(mask="ranges"),
    "keys": dict(mask="padding"),
    "blocks": dict(mask="blocks"),
    "bits": dict(mask="dense"),
    "bias": BIAS,
    "row gate": dict(gate="head"),
    "channel gate": dict(gate="channel"),
    "dropout": dict(dropout_p=0.2),
    "keys, bias": dict(mask="padding", **BIAS),
    "ranges, gate": dict(mask="ranges", gate="head"),
    "ranges, softcap": dict(mask="ranges", softcap=2.0),
    "bits, ranges": dict(mask="all fields"),
    "keys, bias, dropout": dict(mask="padding", dropout_p=0.2, **BIAS),
    "gate, dropout": dict(gate="head", dropout_p=0.2),
    "everything": vars(next(c for c in FEATURES if c.name == "everything")),
}
KERNELS = {"two-pass": ("dq", "dkv"), "short keys": ("dkv",), "short queries": ("short_queries",)}


def cases(arch: str) -> Iterator[tuple[str, Case, dict[str, Any]]]:
    """Names, cases, and what is forced of the plan: `schedule, feature-dtype`."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for schedule, sizes in SCHEDULES.items():
            few = dtype != torch.bfloat16 or schedule == "split queries"
            for case in FEATURES:
                if not few or case.name in SOME:
                    case = replace(case, dtype=dtype, D=64, **{"Hq": 2, "Hk": 1, **sizes})
                    yield f"{schedule}, {case}", case, {}
        for case in [*WIDE, *SIZES]:
            case = replace(case, dtype=dtype)
            yield f"size, {case}", case, {}
    for call in sweep():
        yield f"sweep, {call}", *_swept(call, arch)


def _swept(call: Call, arch: str) -> tuple[Case, dict[str, Any]]:
    """A call of the compiler's sweep in small, with the tiles and the splits that it has in full."""
    shape, (q, k, v), rest = calls.arguments(call)
    with assumed(arch):
        full = plan(Problem.of(*canonical(q, k, v, **rest)))
    sizes = dict(B=1, Hq=2 * shape.Hq // shape.Hk, Hk=2, D=shape.D, M=min(shape.M, 140), N=min(shape.N, 270))
    how = dict(name=str(call), layout="bshd", dtype=calls.DTYPES[call.dtype])
    case = replace(PLAIN, **KINDS[call.kind] | sizes | how)
    forced = ("backward_schedule", "forward", "bias_grad", *KERNELS[full.backward_schedule])
    return case, {field: getattr(full, field) for field in forced}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="sm_90", choices=("sm_80", "sm_90"))
    parser.add_argument("names", nargs="*", default=[""], help="only cases whose names contain one of these")
    parser.add_argument("--no-races", action="store_true", help="do not look for races in shared memory")
    parser.add_argument("--eager", action="store_true", help="what is asynchronous on Hopper happens at once")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    chosen = [c for c in cases(options.arch) if any(part in c[0] for part in options.names)]
    for name, case, forced in chosen:
        began = time.perf_counter()
        with (
            poisoned(),
            force(**forced),
            executing(options.arch, not options.no_races, options.eager) as executed,
        ):
            ok, found = outcome(case)
        failed += not ok
        kernels, seconds = ", ".join(dict.fromkeys(executed)), time.perf_counter() - began
        print(f"{'ok    ' if ok else 'FAILED'} {name}: {found}; {kernels}; {seconds:.1f} s", flush=True)
    print(f"{failed} of {len(chosen)} failed for {options.arch}")
    return int(failed > 0)


def outcome(case: Case) -> tuple[bool, str]:
    """Whether a case is within its budgets, and its largest share of one."""
    try:
        rows = check(case, "triton")
    except Exception as error:  # a report of all cases is worth more than the first failure
        return False, f"{type(error).__name__}: {error}"
    shares = {r.name: r.error / r.budget if r.budget else r.error for r in rows}
    name = max(shares, key=lambda n: math.inf if math.isnan(shares[n]) else shares[n])
    return all(row.ok for row in rows), f"{shares[name]:5.2f} of the budget ({name})"


if __name__ == "__main__":
    sys.exit(main())
