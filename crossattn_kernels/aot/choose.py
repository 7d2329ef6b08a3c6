"""`compile --choose`: the tiles with the fastest products that the compiler keeps in registers enter the table."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import triton

from crossattn_kernels.aot import Call, Row
from crossattn_kernels.aot.calls import arguments, sweep
from crossattn_kernels.aot.products import cycles
from crossattn_kernels.aot.target import standing_in
from crossattn_kernels.aot.workers import Failure, Worker
from crossattn_kernels.problem import Problem, canonical
from crossattn_kernels.tuning import CHIPS, Chip, Config, rules, tables
from crossattn_kernels.tuning.tables import Key

KERNELS = ("forward", "dq", "dkv", "short_queries", "bias_grad")  # of tables; named with "_kernel" where they run
SIZES, WARPS, STAGES = (16, 32, 64, 128), (8, 4), (3, 2, 1)
GAIN = 0.8  # of the time that products take now, for which a tile that does not spill is given up
ONE_STAGE = 2  # as many times as long counts a tile that is loaded while nothing else happens
MOST_SUMS = 192  # registers a thread; with more, no tile was ever kept in registers
FAR = 64  # bytes of stack
Entries = dict[Key, Config]


class Use(NamedTuple):
    """A call that meets an entry, and whether it was well compiled."""

    call: Call
    good: bool


def run(arch: str, only: str, every: bool) -> int:
    """Choose entries for the calls with `only` in their names; 1 if a kernel is good by no tile.

    Entries of which a kernel is not `good`, and those for which another tile promises products faster by `GAIN`.

    Raises ValueError for an unknown arch, and where kernels are bound to Triton's interpreter.
    """
    with standing_in(arch):
        named = [call for call in sweep(every) if only in str(call)]
    worker = Worker(arch)
    try:
        return int(not all(_settled(arch, named, worker).values()))
    finally:
        worker.stop()


def _settled(arch: str, named: Sequence[Call], worker: Worker) -> dict[Key, bool]:
    """Every entry that the calls meet, and whether it is good in the end; better ones are written as they are found."""
    chip = CHIPS[arch]
    chosen: Entries = {}
    settled: dict[Key, bool] = {}  # entries that stay, and whether they are good
    rejected: dict[Key, set[Config]] = {}
    while met := {key: uses for key, uses in surveyed(named, worker, chosen, chip).items() if key not in settled}:
        for key, uses in met.items():
            bad = [str(use.call) for use in uses if not use.good]
            if bad and key in chosen:
                rejected.setdefault(key, set()).add(chosen[key])  # good for fewer calls than it meets now
            config = chosen_for(key, uses, worker, chosen, chip, rejected.setdefault(key, set()))
            if config is None or not bad:  # what is better than a good one is chosen once
                settled[key] = not bad
            if config is not None:
                chosen[key] = config
                write(arch, chosen)  # whoever stops here goes on from here
            if config is not None or bad:
                result = "is good by no tile" if config is None else tuple(config)[:4]
                print(*key, result, "for", "; ".join(bad) or "faster products", flush=True)
    return settled


def surveyed(calls: Sequence[Call], worker: Worker, entries: Entries, chip: Chip) -> dict[Key, list[Use]]:
    """What meets each entry."""
    uses: dict[Key, list[Use]] = {}
    for call in calls:
        for key, row in keyed(call, worker.compile(call, entries)):
            uses.setdefault(key, []).append(Use(call, good(row, chip)))
    return uses


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
    """Whether it keeps to registers and shared memory and, where instructions were counted, is right and pipelined."""
    it = row.figures
    return not it.stack and it.shared <= chip.shared and it.waits <= it.hgmma / 2 and not it.overwritten


def chosen_for(
    key: Key, uses: Sequence[Use], worker: Worker, entries: Entries, chip: Chip, rejected: set[Config]
) -> Config | None:
    """The first candidate by which all calls that meet an entry are good: in brief, then with instructions counted.

    Those that are not are rejected, and not tried again.
    """
    calls = [use.call for use in sorted(uses, key=lambda use: use.good)]
    problem, kernel = problem_of(calls[0]), key[2]
    present = entries.get(key) or tables.lookup(chip, problem, kernel) or rules.tiles(kernel, problem, chip)
    far: set[tuple[int, ...]] = set()  # tiles that spill so much that a pipeline more or less does not matter
    for config in candidates(key, present, chip.arch, all(use.good for use in uses)):
        if config in rejected or config[:3] in far or rules.accumulators(kernel, config, problem) > MOST_SUMS:
            continue
        bad, met = None, 0
        for call, brief in [*((call, True) for call in calls), *((call, False) for call in calls)]:
            found = worker.compile(call, entries | {key: config}, brief)
            rows = [row for k, row in keyed(call, found) if k == key]
            met += len(rows)  # none where the tile is too short for the schedule, so that another one runs
            if isinstance(found, Failure) or not all(good(row, chip) for row in rows):
                bad = call
                if any(row.figures.stack > FAR for row in rows):
                    far.add(config[:3])
                break
        if bad is None and met:
            return config
        rejected.add(config)
        calls.sort(key=lambda call: call != bad)  # the next candidate had better do for this one
    return None


def candidates(key: Key, present: Config, arch: str, good: bool = False) -> list[Config]:
    """Other tiles than the present one, in the order in which they are wanted; if that is good, only better ones.

    First those that keep a schedule for calls as long as now, then those whose products take the least time (in fp32,
    which has no tensor cores here, large ones), then those with many rows of what stays, since what streams is loaded
    once for all of them.
    """
    dtype, D, kernel, _ = key

    def serves(config: Config) -> int:
        return {"short_keys": config.BLOCK_N, "short_queries": config.BLOCK_M}.get(kernel, 0)

    def cost(config: Config) -> float:
        time = 1 / (config.BLOCK_M * config.BLOCK_N) if dtype == "full" else cycles(kernel, config, D, arch == "sm_90")
        return time * ONE_STAGE if config.num_stages == 1 else time

    def order(config: Config) -> tuple[float, ...]:
        stays = config.BLOCK_N if kernel in ("dkv", "short_keys") else config.BLOCK_M
        area = config.BLOCK_M * config.BLOCK_N
        return -serves(config), cost(config), -stays, -area, -config.num_stages, -config.num_warps

    grid = (Config(*each) for each in itertools.product(SIZES, SIZES, WARPS, STAGES))
    found = (c for c in grid if serves(c) <= serves(present) and c[:4] != present[:4])
    if good and dtype == "full":
        return []
    if good:
        found = (c for c in found if serves(c) == serves(present) and cost(c) <= GAIN * cost(present))
    return sorted(found, key=order)


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
