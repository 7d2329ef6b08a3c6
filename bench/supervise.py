"""Jobs in a process of their own: what kills it (a fault on the device, an abort, a hang) costs one job, not all."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, MutableSequence, Sequence
from typing import Any

from bench.jobs import DONE, LEFT_OUT, PENDING

PATIENCE = 75.0  # seconds that one job, or the start of a process with its first, may take before it is killed
FRUITLESS = 4  # processes in a row that die on their first job: then it is the machine, not the job


def supervise(
    target: Callable[..., None],
    jobs: Sequence[Any],
    deadlines: Sequence[float],
    arguments: tuple[Any, ...],
    died: Callable[[Any, str], None],
    method: str = "spawn",
    patience: float = PATIENCE,
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
        child = context.Process(target=_leaving, args=(target, jobs, states, deadlines, *arguments))
        child.start()
        late, seen, since = False, before, time.monotonic()
        while child.is_alive():
            child.join(0.2)
            if list(states) != seen:
                seen, since = list(states), time.monotonic()
            if time.monotonic() > since + patience:
                late = True
                child.kill()
                child.join()
        idle = list(states) == before
        fruitless = fruitless + 1 if idle else 0
        i = next((i for i, state in enumerate(states) if state == PENDING), None)
        # a process that ended by itself, having done something, wanted to be replaced
        if i is not None and (child.exitcode or idle):
            ended = f"its process ended with exit code {child.exitcode}"
            died(jobs[i], "it did not end in time, and was killed" if late else ended)
            states[i] = DONE
    for i, state in enumerate(states):
        states[i] = LEFT_OUT if state == PENDING else state
    return states


def _leaving(target: Callable[..., None], *arguments: Any) -> None:
    """Ends the process without destructors: those of a broken CUDA context abort, and the next job would be blamed."""
    target(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
