"""Jobs in a process of their own: what kills it (a fault on the device, an abort, a hang) costs one job, not all."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, MutableSequence, Sequence
from typing import Any

from bench.jobs import DONE, LEFT_OUT, PENDING

GRACE = 60.0  # seconds that a job may run past its deadline, or a process take to start, before it is killed
FRUITLESS = 4  # processes in a row that die on their first job: then it is the machine, not the job


def supervise(
    target: Callable[..., None],
    jobs: Sequence[Any],
    deadlines: Sequence[float],
    arguments: tuple[Any, ...],
    died: Callable[[Any, str], None],
    method: str = "spawn",
    grace: float = GRACE,
) -> MutableSequence[int]:
    """`target(jobs, states, deadlines, *arguments)` in processes, one after the other, until no job is pending.

    Returns the states; `died` hears of each job during which a process ended, and how.  Processes that die one after
    the other without having done a job end the run.
    """
    context = multiprocessing.get_context(method)
    states = context.Array("b", len(jobs), lock=False)
    fruitless = 0
    while PENDING in states and fruitless < FRUITLESS:
        before = list(states)
        child = context.Process(target=target, args=(jobs, states, deadlines, *arguments))
        child.start()
        while child.is_alive():
            child.join(0.2)
            i = _first_pending(states)
            if i is not None and time.monotonic() > deadlines[i] + grace:
                child.kill()
                child.join()
                break
        idle = list(states) == before
        fruitless = fruitless + 1 if idle else 0
        i = _first_pending(states)
        # a process that ended by itself, having done something, wanted to be replaced
        if i is not None and (child.exitcode or idle):
            died(jobs[i], f"its process ended with exit code {child.exitcode}")
            states[i] = DONE
    for i, state in enumerate(states):
        states[i] = LEFT_OUT if state == PENDING else state
    return states


def _first_pending(states: Sequence[int]) -> int | None:
    return next((i for i, s in enumerate(states) if s == PENDING), None)
