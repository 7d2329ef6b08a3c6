"""`python -m crossattn_kernels tune`: times launch configurations on the present GPU and writes a table.

Never needed for correct results: without a table a rule decides.  Every configuration is first held to the policy of
`testing.py`, on a small call that meets the same tiles; a wrong one is refused, not timed.  What is measured is kept in
`tune-<gpu>.jsonl` at once, so that the next run goes on from there; the table changes at the end, as a whole.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from crossattn_kernels import trial, tuning
from crossattn_kernels.testing import Case
from crossattn_kernels.trial import Job, Machine
from crossattn_kernels.tuning import Config, tables

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CASES = (
    Case("sdxl", 8, 10, 10, 4096, 77, 64),
    Case("pixart", 2, 16, 16, 4096, 120, 72),
    Case("wan", 1, 40, 40, 32760, 512, 128),
    Case("idefics", 8, 32, 32, 1024, 320, 128, mask="media"),
    Case("llama-vision", 1, 32, 8, 2048, 6404, 128, mask="tiles"),
    Case("llama-vision-decode", 8, 32, 8, 1, 6404, 128),
    Case("perceiver", 64, 16, 16, 64, 2112, 64),
    Case("perceiver-video", 1, 16, 16, 64, 65536, 64),
    Case("q-former", 64, 12, 12, 32, 257, 64),
    Case("whisper", 16, 20, 20, 448, 1500, 64),
    Case("whisper-decode", 5, 20, 20, 1, 1500, 64),
    Case("long-video", 1, 32, 32, 1024, 100_000, 128),
    Case("t5", 8, 32, 32, 512, 512, 64, mask="padding", bias=(0, 1, 1, 1)),
    Case("t5gemma", 8, 8, 4, 1024, 1024, 256, softcap=50.0),
)
SIZES = ("B", "Hq", "Hk", "M", "N", "D")
WORKLOADS = {case.name: case for case in CASES}

Known = dict[tuple[str, ...], dict[Config, dict[str, Any]]]  # by a job's identity and as launched: a line of the log
Chosen = dict[tuple[Any, ...], tuple[Config, float]]  # by key of the table: with its share of the time before


def workloads(names: Sequence[str], shapes: Sequence[str], dtype: str) -> list[Case]:
    """Those of these names and sizes, all named ones if nothing is given; ValueError for what is unknown."""
    _known("workload", names, WORKLOADS)
    cases = [WORKLOADS[name] for name in names or ([] if shapes else WORKLOADS)]
    for text in shapes:
        sizes = [int(n) if n.isdecimal() else 0 for n in text.split(",")]
        if len(sizes) != 6 or min(sizes) < 1 or sizes[1] % sizes[2] or sizes[5] > 256:
            raise ValueError(
                f"a shape is B,Hq,Hk,M,N,D, all positive, with Hk a divisor of Hq and D at most 256, not {text!r}"
            )
        cases.append(Case(text, **dict(zip(SIZES, sizes))))  # type: ignore[arg-type]
    return [replace(case, dtype=DTYPES[dtype]) for case in dict.fromkeys(cases)]


def _known(what: str, names: Sequence[str], there_are: Iterable[str]) -> None:
    unknown = [name for name in names if name not in there_are]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(map(repr, unknown))}: there are {', '.join(there_are)}")


# ---- the log, the sweep, the table ----


def read_log(log: Path, machine: Machine) -> Known:
    """What is measured for this machine; a line that was cut short is left out, and ended."""
    known: Known = {}
    text = log.read_text() if log.exists() else ""
    if text and not text.endswith("\n"):
        log.write_text(text + "\n")
    for line in text.splitlines():
        try:
            record = json.loads(line)
            job, config = tuple(record[n] for n in ("shape", "dtype", "kernel")), Config(**record["config"])
        except (ValueError, KeyError, TypeError):
            continue
        if (record.get("gpu"), record.get("triton")) == (machine.gpu, machine.triton):
            known.setdefault(job, {})[config] = record
    return known


def measure(job: Job, config: Config, known: dict[Config, dict[str, Any]], machine: Machine) -> dict[str, Any]:
    """A line of the log: the time, over that of the first configuration with right results in one round; or a refusal.

    On the first run of a job that one is what is in use, on later runs the same as then.
    """
    base = next((c for c, record in known.items() if not record["refused"]), config)
    times, ratio = [], None
    try:
        refused = machine.check(job.case, job.kernel, config)
        if not refused:
            times = machine.times(job.case, job.kernel, [config] if base == config else [base, config])
            ratio = times[-1] / times[0]
    except torch.OutOfMemoryError:
        raise  # other programs may have taken it
    except Exception as error:  # whatever a compiler says
        refused = f"{type(error).__name__}: {error}".partition("\n")[0]
    ms = times[-1] if times else None
    return heading(job, machine) | dict(
        config=config._asdict(), base=base._asdict(), ms=ms, ratio=ratio, refused=refused
    )


def attempt(
    job: Job, config: Config, known: dict[Config, dict[str, Any]], machine: Machine, log: Path
) -> dict[str, Any]:
    """`measure`, and its line in the log; until there is one, another says what a run must not meet again if it ends
    here: the compiler aborts its process on some kernels."""
    size = log.stat().st_size if log.exists() else 0

    def say(record: dict[str, Any]) -> None:
        with log.open("a") as file:
            file.truncate(size)
            file.write(json.dumps(record) + "\n")

    say(heading(job, machine) | dict(config=config._asdict(), ms=None, ratio=None, refused="it ended the process"))
    try:
        record = measure(job, config, known, machine)
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        os.truncate(log, size)
        raise
    say(record)
    return record


def heading(job: Job, machine: Machine) -> dict[str, str]:
    return dict(zip(("gpu", "triton", "shape", "dtype", "kernel"), (machine.gpu, machine.triton, *job.identity)))


def sweep(todo: list[Job], known: Known, log: Path, machine: Machine, budget: float) -> int:
    """Measure what is not known, and say how much of it was left when the budget (seconds) was spent.

    A job that does not fit into memory is taken off the list, so that others with its key count without it.
    """
    began = machine.clock()
    asked = {(job.identity, config): job for job in todo for config in job.configs.values()}
    left = [(job, c) for (identity, c), job in asked.items() if c not in known.setdefault(identity, {})]
    for done, (job, config) in enumerate(left):
        if job not in todo:
            continue
        elapsed = machine.clock() - began
        _show(done, len(left), elapsed, f"{job.case.name} {job.kernel}")
        if elapsed >= budget:
            return len(left) - done
        try:
            record = attempt(job, config, known[job.identity], machine, log)
        except torch.OutOfMemoryError:
            todo.remove(job)
            print(f"\nleft out, as it does not fit into memory: {job.case.name} {job.kernel}", file=sys.stderr)
            continue
        known[job.identity][config] = record
        if record["refused"]:
            machine.settle()
    _show(len(left), len(left), machine.clock() - began, "")
    return 0


def _show(done: int, total: int, elapsed: float, what: str) -> None:
    bar = "#" * (20 * done // max(1, total))
    took = datetime.timedelta(seconds=int(elapsed))
    line = f"\r[{bar:20}] {done} done, {total - done} left, {took} {what:30}"
    print(line, end="\n" if done == total else "", file=sys.stderr, flush=True)


def best(todo: Sequence[Job], known: Known) -> Chosen:
    """What each key of the table should say, and its time over that of what is in use: the geometric mean over the jobs
    that share the key.  A configuration is in question if it was right and is measured for all of them."""
    chosen: Chosen = {}
    for key in dict.fromkeys(job.key for job in todo):
        sharing = [job for job in todo if job.key == key]
        means = {}
        for config in [c for c in sharing[0].configs if all(c in job.configs for job in sharing)]:
            records = [known[job.identity].get(job.configs[config]) for job in sharing]
            ratios = [record["ratio"] for record in records if record and record["ratio"]]
            if len(ratios) == len(sharing):
                means[config] = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        if means:
            config = min(means, key=means.__getitem__)
            chosen[key] = config, means[config]
    return chosen


def entries(path: Path | None) -> list[dict[str, Any]]:
    """Of a table; ValueError if it cannot be read, because it would be lost."""
    try:
        content: dict[str, Any] = json.loads(path.read_text()) if path else dict(schema=tables.SCHEMA, entries=[])
        if content["schema"] != tables.SCHEMA:
            raise ValueError(f"its schema is {content['schema']!r}, not {tables.SCHEMA}")
        return [e for e in content["entries"] if e["triton"] and all(e[name] for name in tables.KEY)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the table {path} cannot be read, move it away ({type(error).__name__}: {error})") from None


def merged(old: Sequence[dict[str, Any]], chosen: Chosen, machine: Machine) -> list[dict[str, Any]]:
    """A table's entries with the chosen ones in their places; those of other keys and other Tritons stay."""
    triton = ".".join(machine.triton.split(".")[:2])
    source = f"measured on {machine.gpu}, {datetime.date.today()}, torch {machine.torch}, triton {machine.triton}"
    new = []
    for key, (config, _) in chosen.items():
        said = {name: v for name, v in config._asdict().items() if v != Config._field_defaults.get(name)}
        new.append(dict(triton=triton, **dict(zip(tables.KEY, key)), **said, source=source))
    kept = [e for e in old if e["triton"] != triton or tuple(e[name] for name in tables.KEY) not in chosen]
    return kept + new


def run(
    names: Sequence[str], shapes: Sequence[str], dtype: str, kernels: Sequence[str], out: Path | None, budget: float,
    machine: Machine | None = None,
) -> int:  # fmt: skip
    """The exit status; ValueError for what cannot be done, before anything is measured.  budget: seconds."""
    cases = workloads(names, shapes, dtype)
    _known("kernel", kernels, trial.LAUNCHES)
    machine = machine or Machine.present()
    out = out or (tables.FOLDER if os.access(tables.FOLDER, os.W_OK) else Path())
    out.mkdir(parents=True, exist_ok=True)
    arch = tuning.chip_of(machine.device).arch
    gpu = re.sub("[^a-z0-9]+", "-", machine.gpu.lower()).strip("-")
    path, log = out / f"{arch}.json", out / f"tune-{gpu}.jsonl"
    # an architecture without a table goes on with the entries of the one that has served it so far
    old = entries(path if path.exists() else tables._path_for(tables.FOLDER, arch))
    todo, known = trial.jobs(cases, kernels or tuple(trial.LAUNCHES), machine.device), read_log(log, machine)
    try:
        left = sweep(todo, known, log, machine, budget)
        chosen = best(todo, known)
        tables.save(path, arch, merged(old, chosen, machine))
    except (KeyboardInterrupt, torch.AcceleratorError) as stop:
        asked = isinstance(stop, KeyboardInterrupt)
        why = "interrupted" if asked else f"the GPU has failed, {stop}".partition("\n")[0]
        print(f"\n{why}: what is measured stays in {log}, the table is as it was; run again to go on", file=sys.stderr)
        return 130 if asked else 1
    for key, (config, ratio) in chosen.items():
        print(*key, f"{ratio:.3f} of the time before:", config)
    refused = sum(bool(record["refused"]) for job in todo for record in known[job.identity].values())
    print(f"{refused} refused, {left} not measured; {path} has {len(chosen)} new entries")
    return 0
