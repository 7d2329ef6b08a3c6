"""`compile --choose`: where kernels spill, the largest tiles that the compiler keeps in registers enter the table."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import triton

from crossattn_kernels.aot import Call, Row
from crossattn_kernels.aot.calls import arguments, sweep
from crossattn_kernels.aot.target import standing_in
from crossattn_kernels.aot.workers import Failure, Worker
from crossattn_kernels.problem import Problem, canonical
from crossattn_kernels.tuning import CHIPS, Chip, Config, rules, tables
from crossattn_kernels.tuning.tables import Key

KERNELS = ("forward", "dq", "dkv", "short_queries", "bias_grad")  # of tables; named with "_kernel" where they run
SIZES, STAGES = (16, 32, 64, 128), (3, 2, 1)
LEAST_AREA = 1024  # that any kernel may try, however small its tile is now
FAR = 64  # bytes of stack
Entries = dict[Key, Config]


class Use(NamedTuple):
    """A call that meets an entry, and whether it was well compiled."""

    call: Call
    good: bool


def run(arch: str, only: str, every: bool) -> int:
    """Choose entries for the calls with `only` in their names; 1 if a kernel spills by every tile.

    Raises ValueError for an unknown arch, and where kernels are bound to Triton's interpreter.
    """
    with standing_in(arch):
        named = [call for call in sweep(every) if only in str(call)]
    chip, worker = CHIPS[arch], Worker(arch)
    chosen: Entries = {}
    hopeless: set[Key] = set()
    while spilling := {key: of_key for key, of_key in surveyed(named, worker, chosen, chip) if key not in hopeless}:
        for key, of_key in spilling.items():
            config = chosen_for(key, of_key, worker, chosen, chip)
            why = "; ".join(str(use.call) for use in of_key if not use.good)
            print(*key, "spills by every tile" if config is None else tuple(config)[:4], "for", why, flush=True)
            if config is None:
                hopeless.add(key)
            else:
                chosen[key] = config
                write(arch, chosen)  # whoever stops here goes on from here
    worker.stop()
    return int(bool(hopeless))


def surveyed(calls: Sequence[Call], worker: Worker, entries: Entries, chip: Chip) -> Iterator[tuple[Key, list[Use]]]:
    """What meets each entry that spills."""
    uses: dict[Key, list[Use]] = {}
    for call in calls:
        for key, row in keyed(call, worker.compile(call, entries, brief=True)):
            uses.setdefault(key, []).append(Use(call, good(row, chip)))
    return ((key, of_key) for key, of_key in uses.items() if not all(use.good for use in of_key))


def keyed(call: Call, found: Sequence[Row] | Failure) -> Iterator[tuple[Key, Row]]:
    """The kernels of a call that have entries in tables."""
    problem = problem_of(call)
    for row in [] if isinstance(found, Failure) else found:
        kernel = row.kernel.removesuffix("_kernel")
        if kernel in KERNELS:
            kernel = "short_keys" if kernel == "dkv" and row.schedule == "short keys" else kernel
            yield tables.key_of(problem, kernel), row


def problem_of(call: Call) -> Problem:
    _, (q, k, v), rest = arguments(call)
    return Problem.of(*canonical(q, k, v, **rest))


def good(row: Row, chip: Chip) -> bool:
    """Whether it keeps to registers and to the shared memory that there is."""
    return not row.figures.stack and row.figures.shared <= chip.shared


def chosen_for(key: Key, uses: Sequence[Use], worker: Worker, entries: Entries, chip: Chip) -> Config | None:
    """The first candidate by which all calls that meet an entry are good."""
    calls = [use.call for use in sorted(uses, key=lambda use: use.good)]
    problem = problem_of(calls[0])
    present = tables.lookup(chip, problem, key[2]) or rules.tiles(key[2], problem, chip)
    far: set[tuple[int, ...]] = set()  # tiles that spill so much that a pipeline more or less does not matter
    for config in candidates(key[2], present):
        if config[:3] in far:
            continue
        bad, met = None, 0
        for call in calls:
            found = worker.compile(call, entries | {key: config}, brief=True)
            rows = [row for k, row in keyed(call, found) if k == key]
            met += len(rows)  # none where the tile is too short for the schedule, so that another one runs
            if isinstance(found, Failure) or not all(good(row, chip) for row in rows):
                bad = call
                if any(row.figures.stack > FAR for row in rows):
                    far.add(config[:3])
                break
        if bad is None and met:
            return config
        calls.sort(key=lambda call: call != bad)  # the next candidate had better do for this one
    return None


def candidates(kernel: str, present: Config) -> list[Config]:
    """Tiles no larger than the present one, in the order in which they are wanted.

    First those that keep a schedule for calls as long as now, and those with 64 rows of what stays, since each row that
    streams is read for that many and Hopper's wide products ask for it; then large ones, where a tile without a
    pipeline counts half, and of these those with many rows of what stays.
    """
    by_keys = kernel in ("dkv", "short_keys")
    area = max(LEAST_AREA, present.BLOCK_M * present.BLOCK_N)

    def serves(config: Config) -> int:
        return {"short_keys": config.BLOCK_N, "short_queries": config.BLOCK_M}.get(kernel, 0)

    def order(config: Config) -> tuple[float, ...]:
        stays = config.BLOCK_N if by_keys else config.BLOCK_M
        area = config.BLOCK_M * config.BLOCK_N / (1 if config.num_stages > 1 else 2)
        return -serves(config), stays < 64, -area, -stays, -config.num_stages, -config.num_warps

    grid = (Config(*each) for each in itertools.product(SIZES, SIZES, {8, present.num_warps}, STAGES))
    smaller = (c for c in grid if c.BLOCK_M * c.BLOCK_N <= area and serves(c) <= serves(present))
    return sorted((c for c in smaller if c[:4] != present[:4]), key=order)


def write(arch: str, chosen: Entries) -> None:
    """Into the table that is shipped, in the places of entries of the same Triton."""
    version = ".".join(triton.__version__.split(".")[:2])
    source = f"chosen by the compile report, {datetime.date.today()}"
    path = tables.FOLDER / f"{arch}.json"
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    kept = [e for e in entries if e["triton"] != version or tuple(e[name] for name in tables.KEY) not in chosen]
    new = (
        dict(triton=version, **dict(zip(tables.KEY, key)), **dict(zip(Config._fields[:4], config)), source=source)
        for key, config in chosen.items()
    )
    tables.save(path, arch, [*kept, *new])
