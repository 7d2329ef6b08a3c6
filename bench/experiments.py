"""`python -m bench.experiments`: choices of `plan` and of the kernels, each timed beside what else could be done.

    python -m bench.experiments                 all of them, on the first NVIDIA GPU; lines go to bench/results
    python -m bench.experiments --only packing  one of them
    python -m bench.experiments --page          docs/performance-log.md, from what was measured so far

What is tried, and what it is predicted to gain, is in `hypotheses.py`.  A way is held to the policy of `testing.py`, on
a small call that meets the same tiles, and is timed beside what ships, in turns; a wrong one is not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import MutableSequence, Sequence
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
except ModuleNotFoundError as error:
    sys.exit(f"bench.experiments needs a python3 with torch: this one, {sys.executable}, has no {error.name}")

from bench import rows
from bench.clocks import said
from bench.hypotheses import EXPERIMENTS, Experiment, Way, half, plan_of, ways_of
from bench.jobs import DONE, LEFT_OUT, PENDING, answers
from bench.supervise import supervise
from bench.variants import forward_by
from crossattn_kernels import trial, tuning
from crossattn_kernels.tuning import Config

PAGE = Path(__file__).parents[1] / "docs" / "performance-log.md"
SECONDS = 240.0  # of a run


class Job(NamedTuple):
    experiment: str
    way: str


BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}


# ---- a run ----


def work(jobs: Sequence[Job], states: MutableSequence[int], deadlines: Sequence[float], path: Path, head: Any) -> None:
    """Do what is pending and not late (time.monotonic()); returns early when the device no longer answers."""
    device = torch.device("cuda", 0)
    for i, job in enumerate(jobs):
        if states[i] != PENDING:
            continue
        if time.monotonic() > deadlines[i]:
            states[i] = LEFT_OUT
            continue
        experiment = BY_NAME[job.experiment]
        row = head | job._asdict() | measured(experiment, ways_of(experiment, device)[job.way], device)
        append(path, row)
        states[i] = DONE
        if not answers("cuda"):
            return


def measured(experiment: Experiment, way: Way, device: torch.device) -> dict[str, Any]:
    """Its time and that of what ships, in milliseconds, or why there is none."""
    case, ships = half(experiment.case), plan_of(half(experiment.case), device)
    tiles = max((ships.forward, ships.dq, ships.dkv), key=lambda c: c.BLOCK_M * c.BLOCK_N)
    few = {f: c._replace(splits=min(c.splits, 2)) if isinstance(c, Config) else c for f, c in way.changes.items()}
    found: dict[str, Any] = dict(predicted=round(way.predicted, 3))
    try:
        with forward_by(way.variant):
            wrong = trial.wrong(trial.reduced(case, tiles), few, device)
            if wrong:
                return found | dict(status="wrong", detail=wrong)
            other = trial.launches(case, experiment.kernels, way.changes, device)
        same = trial.launches(case, experiment.kernels, {}, device)
        base, ms = trial.in_turns([same, other], device)
    except Exception as error:  # whatever a compiler says
        return found | dict(status="error", detail=said(error))
    return found | dict(status="ok", detail="", ms=ms, base_ms=base, ratio=ms / base)


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    outcome = f"{row['ratio']:.3f} of {row['base_ms']:.4g} ms" if row["status"] == "ok" else row["detail"]
    print(
        f"{row['experiment']:36}{row['way']:20}predicted {row['predicted']:.2f}, {row['status']}: {outcome}", flush=True
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BY_NAME, metavar="NAME", help=", ".join(BY_NAME))
    parser.add_argument("--budget", type=float, default=SECONDS, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=rows.FOLDER, help="folder of the results")
    parser.add_argument("--commit", help="what was measured, if the tree has no .git")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.name} and measure nothing")
    args = parser.parse_args(argv)
    if args.page:
        PAGE.write_text(page(read(args.out)))
        return 0
    if not torch.cuda.is_available():
        print("bench.experiments needs an NVIDIA GPU that this torch can use; there is none")
        return 2
    gpu = torch.cuda.get_device_name()
    path = rows.path_of(args.out, gpu)
    path = path.with_name(f"{path.stem}-experiments.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        n: v
        for n, v in rows.machine(gpu, args.commit).items()
        if n in ("device", "driver", "torch", "triton", "commit", "date")
    }
    device = torch.device("cuda", 0)
    jobs = [Job(name, way) for name in args.only or BY_NAME for way in ways_of(BY_NAME[name], device)]

    def died(job: Job, why: str) -> None:
        way = ways_of(BY_NAME[job.experiment], device)[job.way]
        append(path, head | job._asdict() | dict(predicted=round(way.predicted, 3), status="died", detail=why))

    deadline = time.monotonic() + args.budget
    states = supervise(work, jobs, [deadline] * len(jobs), (path, head), died)
    left = [f"{job.experiment}: {job.way}" for job, state in zip(jobs, states) if state == LEFT_OUT]
    print(f"{len(jobs) - len(left)} measured, {len(left)} left out: {path}", *left, sep="\n")
    return 0


# ---- the page ----


def read(folder: Path) -> dict[Job, dict[str, Any]]:
    """The last line of each."""
    lines = [line for path in sorted(folder.glob("*-experiments.jsonl")) for line in path.read_text().splitlines()]
    found = map(json.loads, lines)
    return {Job(row["experiment"], row["way"]): row for row in found}


HEADING = """# What else could be done, and would it be faster?

Each section is a hypothesis: another way than what ships, and its time as predicted before anything was measured. No
prediction is a result. `make experiments-gpu` measures the ways on an NVIDIA GPU, each beside what ships, and adds
lines to `bench/results/`; the predictions are for an H200. Measured so far: {done} of {all} ways.

A number is the time of a way over the time of what ships: below 1, the way is faster. A way that gives wrong results
is not timed.

The page is written by `python -m bench.experiments --page`, from `bench/hypotheses.py` and the results. Terms are
those of [schedules.md](schedules.md); where the named sizes come from is in `bench/named.py`.
"""


def page(found: dict[Job, dict[str, Any]]) -> str:
    with tuning.assumed("sm_90"):
        jobs = [Job(e.name, name) for e in EXPERIMENTS for name in ways_of(e, torch.device("meta"))]
    done = [job for job in jobs if job in found and found[job]["status"] == "ok"]
    heading = HEADING.format(done=len(done), all=len(jobs))
    return "\n".join([heading, *map("\n".join, (section(e, found) for e in EXPERIMENTS))])


def section(experiment: Experiment, found: dict[Job, dict[str, Any]]) -> list[str]:
    c = experiment.case
    sizes = f"{c.B} x {c.Hq} x {c.M} queries, {c.Hk} x {c.N} keys, D = {c.D}, bf16"
    lines = [f"## {experiment.name[0].upper()}{experiment.name[1:]}", "", experiment.question, ""]
    lines += [f"{sizes} ({c.source}). {experiment.because}", "", "| way | predicted | measured |", "|---|---|---|"]
    with tuning.assumed("sm_90"):
        ways = ways_of(experiment, torch.device("meta"))
    for way in ways.values():
        row = found.get(Job(experiment.name, way.name))
        lines.append(f"| {way.name} | {way.predicted:.2f} | {outcome(row)} |")
    return [*lines, "", f"Verdict: {experiment.verdict or 'not measured yet'}.", ""]


def outcome(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not yet"
    if row["status"] != "ok":
        return f"{row['status']}: {row['detail']}"
    return f"{row['ratio']:.2f} of {row['base_ms']:.3g} ms, {row['device']}, {row['date']}, {row['commit']}"


if __name__ == "__main__":
    sys.exit(main())
