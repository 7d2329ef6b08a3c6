"""`plan(problem) -> Plan`: which schedules run and by which tiles; a pure function, nothing is timed in a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from crossattn_kernels.problem import Problem
from crossattn_kernels.tuning import rules, tables
from crossattn_kernels.tuning.chips import ASSUMED, CHIPS, Chip, assumed, chip_of
from crossattn_kernels.tuning.rules import Config, dk_dv_apart, power_of_two
from crossattn_kernels.tuning.tables import lookup

__all__ = [
    "CHIPS",
    "Chip",
    "Config",
    "Plan",
    "dk_dv_apart",
    "assumed",
    "chip_of",
    "circumstances",
    "force",
    "plan",
    "power_of_two",
    "suppose",
]


BACKWARD = ("short keys", "short queries", "two-pass")  # the first that can serve a call, without spills, runs


class Plan(NamedTuple):
    """What runs for one problem: two schedules, and how each kernel is launched if it is."""

    forward_schedule: str  # "stream" or "split"
    backward_schedule: str  # "short keys", "short queries" or "two-pass"
    forward: Config
    dq: Config
    dkv: Config  # of "short keys" too, whose kernel writes dq besides
    short_queries: Config
    bias_grad: Config
    merge: Config
    rows: Config  # kernels that look at one row at a time
    fold: Config  # BLOCK_M elements, whatever they are
    reasons: tuple[tuple[str, str], ...] = ()  # schedules that do not run, and why


_FORCED: list[tuple[tuple[str, Any], ...]] = [()]


def plan(problem: Problem) -> Plan:
    """The schedules and configurations of a call on the GPU of its tensors, or on the assumed one if they are on none.

    Raises ValueError if a forced configuration does not fit that GPU.
    """
    return _plan(problem, chip_of(problem.device), _FORCED[-1])


@contextmanager
def force(**changes: Any) -> Iterator[None]:
    """Within it, plans have these fields instead of their own: `backward_schedule="two-pass"`, `dq=Config(...)`."""
    unknown = changes.keys() - set(Plan._fields)
    if unknown:
        raise ValueError(f"a plan has {', '.join(Plan._fields)}, not {', '.join(sorted(unknown))}")
    _FORCED.append(tuple(changes.items()))
    try:
        yield
    finally:
        _FORCED.pop()


@contextmanager
def suppose(entries: dict[tables.Key, Config]) -> Iterator[None]:
    """Within it, plans are made as if every table had these entries; call signatures that were met keep their plans."""
    before = dict(tables.SUPPOSED)
    tables.SUPPOSED.update(entries)
    _plan.cache_clear()
    try:
        yield
    finally:
        tables.SUPPOSED.clear()
        tables.SUPPOSED.update(before)
        _plan.cache_clear()


def circumstances() -> tuple[Any, ...]:
    """All that a plan depends on besides its problem: what is forced, and the chip of tensors that are on no GPU."""
    return _FORCED[-1], ASSUMED[-1]


@lru_cache(maxsize=4096)
def _plan(problem: Problem, chip: Chip, changes: tuple[tuple[str, Any], ...]) -> Plan:
    fixed = dict(changes)

    def config(kernel: str) -> Config:
        return lookup(chip, problem, kernel) or rules.tiles(kernel, problem, chip)

    short_keys, short_queries = (
        fixed.get(f) or config(k) for f, k in (("dkv", "short_keys"), ("short_queries", "short_queries"))
    )
    reasons = rules.reasons(problem, short_keys.BLOCK_N, short_queries.BLOCK_M)
    avoided = rules.crowded(problem) | reasons
    schedule = fixed.get("backward_schedule") or next(s for s in BACKWARD if s not in avoided)
    if schedule not in BACKWARD:
        raise ValueError(f"backward_schedule must be one of {', '.join(map(repr, BACKWARD))}, got {schedule!r}")
    if schedule in reasons:
        raise ValueError(f"the schedule {schedule!r} cannot serve this call: {reasons[schedule]}")
    avoided.pop(schedule, None)  # forced
    for field in ("forward", "dq", "dkv", "short_queries", "bias_grad"):
        if field in fixed:
            kernel = "short_keys" if (field, schedule) == ("dkv", "short keys") else field
            rules.check_fit(kernel, fixed[field], problem, chip)
    forward = rules.split_keys(rules.fitted(config("forward"), problem), problem, chip)
    made = Plan(
        "stream" if fixed.get("forward", forward).splits == 1 else "split",
        schedule,
        forward,
        rules.split_dq(rules.fitted(config("dq"), problem), problem, chip),
        rules.split_queries(
            rules.fitted(short_keys if schedule == "short keys" else config("dkv"), problem), problem, chip
        ),
        rules.all_queries(short_queries, problem, chip),
        rules.split_terms(rules.fitted(config("bias_grad"), problem), problem, chip),
        merge=Config(16, 16, 4, 1),
        rows=Config(64, 64, 4, 1),
        fold=Config(1024, 16, 4, 1),
        reasons=tuple(avoided.items()),
    )._replace(**fixed)
    descriptors = made.forward.descriptors and problem.aligned and chip.descriptors
    return made._replace(forward=made.forward._replace(descriptors=descriptors))
