"""What a run consists of: parts that can be run alone, each with its workloads, contenders, modes and seconds."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

from bench.floors import MODES
from bench.named import BATCH, DENSE, KEYS, MASKED, NAMED

QUICK = ("ours", "sdpa auto", "sdpa cudnn", "sdpa flash", "sdpa efficient")
PEERS = (*QUICK, "sdpa math", "eager", "xformers", "flash-attn")
FLEX = ("flex", "flex + block mask")
OPTIONAL = {"xformers": "xformers", "flash-attn": "flash_attn"}  # contender: the module that it needs
SHORT_MODES = dict(zip(("fwd", "bwd", "full"), MODES))


class Job(NamedTuple):
    """One row of results: names only, so that it travels between processes."""

    part: str
    workload: str
    provider: str
    mode: str


class Part(NamedTuple):
    workloads: tuple[str, ...]
    providers: tuple[str, ...]
    modes: tuple[str, ...]
    budget: float  # seconds on an H200; what does not fit is left out, and said


def _names(*workloads: object) -> tuple[str, ...]:
    return tuple(w.name for w in workloads)  # type: ignore[attr-defined]


# compilation of FlexAttention takes seconds a shape: beside the masks it is for, one shape of each regime
PARTS = {
    "dense": Part(_names(*DENSE), PEERS, MODES, 225),
    "masked": Part(_names(*MASKED), PEERS, MODES, 60),
    "flex": Part((*_names(*MASKED), "W1a", "W5a", "W4a", "W2a"), FLEX, MODES, 90),
    "batch": Part(_names(*BATCH), QUICK, MODES[:2], 45),
    "memory": Part(_names(*KEYS), ("ours", "sdpa auto", "sdpa efficient", "eager"), MODES[2:], 20),
    "host": Part(("W1c", "W6", "W7a", "W8b", "Flamingo 5"), ("ours", "sdpa auto"), (MODES[0], MODES[2]), 15),
}


def jobs_of(name: str, part: Part) -> list[Job]:
    """Workload by workload; a decoder's step (one query) has no backward; a mask is made only where there is one."""
    return [
        Job(name, w, p, m)
        for w in part.workloads
        for p in part.providers
        if installed(p) and not (p == "flex + block mask" and NAMED[w].mask is None)
        for m in part.modes
        if m == "forward" or NAMED[w].case.M > 1 or len(part.modes) == 1
    ]


def installed(provider: str) -> bool:
    return provider not in OPTIONAL or find_spec(OPTIONAL[provider]) is not None
