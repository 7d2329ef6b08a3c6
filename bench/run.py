"""`python -m bench.run`: time this package beside its peers; rows are appended to bench/results/<device>.csv.

    python -m bench.run                                     all parts that this machine can run
    python -m bench.run --part masked host                  some parts
    python -m bench.run --workload W1 W5b --mode bwd        some workloads, by name or by how their names begin
    python -m bench.run --provider ours "sdpa cudnn"        some contenders

On a CPU sizes are scaled down and only wall time is read.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path

try:
    import torch
except ModuleNotFoundError as error:
    sys.exit(f"bench.run needs a python3 with torch: this one, {sys.executable}, has no {error.name}")

from bench import jobs, providers, rows
from bench.named import NAMED
from bench.parts import FLEX, OPTIONAL, PARTS, PEERS, SHORT_MODES, Job, Part, installed, jobs_of
from bench.supervise import supervise

COMPILE_SECONDS = 60.0
CPU_PARTS = ("dense", "masked")  # FlexAttention has no backward on a CPU, and sweeps of scaled-down sizes say nothing


def main(argv: Sequence[str] | None = None) -> int:
    args = parsed(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.run --device cuda needs an NVIDIA GPU that this torch can use; there is none")
        return 2
    if args.device == "cpu":
        torch.set_num_threads(1)  # calls this small are not worth a second
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu-1-thread"
    path, machine = rows.path_of(args.out, name), rows.machine(name, args.commit)
    try:
        rows.check_columns(path)
    except ValueError as error:
        print(error)
        return 2
    setting = jobs.Setting(args.device, args.sizes == "small", path, machine)
    absent = ", ".join(p for p in OPTIONAL if not installed(p)) or "nothing"
    print(f"{name}, torch {torch.__version__}: rows go to {path}; not installed: {absent}", flush=True)
    chosen = parts(args)
    todo = [job for part, what in chosen.items() for job in jobs_of(part, what)]
    began = time.monotonic()
    if args.device == "cuda":
        compile_ahead(todo, setting)
    states = run(chosen, todo, setting)
    left = [job for job, state in zip(todo, states) if state == jobs.LEFT_OUT]
    for part, what in chosen.items():
        out = [f"{j.workload} {j.mode} {j.provider}" for j in left if j.part == part]
        if out:
            print(f"left out of {part}, {what.budget:.0f} s were over ({len(out)}): {', '.join(out)}")
    print(f"{len(todo) - len(left)} rows, {len(left)} left out, {time.monotonic() - began:.0f} s: {path}")
    return 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--workload", nargs="+", metavar="NAME", help="names, or how they begin")
    parser.add_argument("--provider", nargs="+", metavar="NAME", help=", ".join(providers.PROVIDERS))
    parser.add_argument("--mode", nargs="+", metavar="MODE", help="fwd, bwd, full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", choices=("full", "small"), help="default: full on a GPU, small on a CPU")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of each part, instead of its own")
    parser.add_argument("--out", type=Path, default=rows.FOLDER, help="folder of the CSV file")
    parser.add_argument("--commit", help="what was measured, if the tree has no .git")
    args = parser.parse_args(argv)
    try:
        args.part = _known("part", args.part, PARTS)
        args.workload = _known("workload", args.workload, NAMED, beginnings=True)
        args.provider = _known("provider", args.provider, providers.PROVIDERS)
        args.mode = _known("mode", args.mode, SHORT_MODES)
        args.sizes = args.sizes or ("full" if args.device == "cuda" else "small")
    except ValueError as error:
        parser.error(str(error))
    return args


def _known(what: str, given: list[str] | None, names: Iterable[str], beginnings: bool = False) -> list[str] | None:
    """The names that are meant, in their own order; ValueError that lists what there is."""
    if given is None:
        return None

    def meant(text: str) -> list[str]:
        return [text] if text in names else [n for n in names if beginnings and n.startswith(text)]

    wrong = [text for text in given if not meant(text)]
    if wrong:
        raise ValueError(f"no {what} is named {', '.join(map(repr, wrong))}; there are {', '.join(names)}")
    return [n for n in names if any(n in meant(text) for text in given)]


def parts(args: argparse.Namespace) -> dict[str, Part]:
    """The parts of a run, narrowed to what was asked for; workloads without a part are a part of their own."""
    if args.part or not args.workload:
        chosen = {n: PARTS[n] for n in args.part or (PARTS if args.device == "cuda" else CPU_PARTS)}
    else:
        chosen = {"chosen": Part(tuple(args.workload), PEERS, tuple(SHORT_MODES.values()), 300)}
    return {
        name: Part(
            tuple(args.workload or part.workloads),
            tuple(args.provider or part.providers),
            tuple(SHORT_MODES[m] for m in args.mode) if args.mode else part.modes,
            part.budget if args.budget is None else args.budget,
        )
        for name, part in chosen.items()
    }


def run(chosen: dict[str, Part], todo: list[Job], setting: jobs.Setting) -> Sequence[int]:
    """States of all jobs afterwards.  Seconds that a part does not use pass to the next."""
    ends, end = {}, time.monotonic()
    for name, part in chosen.items():
        ends[name] = end = end + part.budget
    deadlines = [ends[job.part] for job in todo]
    if setting.device != "cuda":
        states = [jobs.PENDING] * len(todo)
        jobs.work(todo, states, deadlines, setting)
        return states

    def died(job: Job, why: str) -> None:
        row = dict(jobs.heading(job, setting), status="died", detail=why)
        rows.append(setting.path, row)
        print(jobs.line(row), flush=True)

    return supervise(jobs.work, todo, deadlines, (setting,), died)


def compile_ahead(todo: list[Job], setting: jobs.Setting) -> None:
    """Fill the compilers' caches from several processes; what fails here fails again, and is recorded, in its turn."""
    pairs = list(dict.fromkeys((j.workload, j.provider) for j in todo if j.provider in ("ours", FLEX[0])))
    pairs.sort(key=lambda pair: pair[1] == "ours")  # FlexAttention takes longest
    if not pairs:
        return
    began = time.monotonic()
    workers = max(1, min(8, (os.cpu_count() or 2) // 2))
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    futures: list[Future] = [pool.submit(_first_call, *pair, setting) for pair in pairs]
    done, waiting = wait(futures, COMPILE_SECONDS)
    succeeded = sum(future.exception() is None for future in done)
    for process in list((pool._processes or {}).values()) if waiting else []:
        process.kill()
    pool.shutdown(cancel_futures=True)
    print(f"compiled ahead: {succeeded} of {len(pairs)} in {time.monotonic() - began:.0f} s", flush=True)


def _first_call(workload: str, provider: str, setting: jobs.Setting) -> None:
    from torch._inductor import config as inductor

    inductor.compile_threads = 1  # there is a process per compilation already
    jobs.free(setting.device)  # of the last one in this process
    call = NAMED[workload].inputs(setting.device, setting.small)
    for mode in ("forward", "forward+backward")[: 1 if NAMED[workload].case.M == 1 else 2]:
        providers.bind(provider, call, mode)()
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
