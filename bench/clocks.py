"""The clocks of one call, in seconds; on a CPU only wall time.

    cold    CUDA events, L2 flushed before each call        device time of one call, gaps between its kernels included
    warm    CUDA events, operands as the last call left them
    graph   CUDA events around one graph of many calls, per call: kernels back to back, no launches
    wall    from the call until the device is done, queue empty: what a caller who waits sees
    host    from the call until its last launch, queue full: what a caller who does not wait pays

Before each event-timed call the device is kept busy until the host has queued all of it, so that cold and warm hold no
launch cost.  Two events with nothing between them already measure 1 to 2 us.  Calls longer than LONG skip warm and
graph, which would say the same as cold.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.measure import Quantiles, seconds

WARMUP = 3
LONG = 10e-3  # seconds of one call
SPIN = 2e9  # cycles a second, above the clock of any GPU: the device spins for at least as long as asked
IN_GRAPH = 20  # calls in a graph
FEWEST, MOST = 5, 100  # repetitions

Work = Callable[[], object]


class Times(NamedTuple):
    """Quantiles in seconds; None where the clock does not exist or was not read."""

    cold: Quantiles | None = None
    warm: Quantiles | None = None
    graph: Quantiles | None = None
    wall: Quantiles | None = None
    host: Quantiles | None = None


def repetitions(once: float, budget: float) -> int:
    """How many calls of `once` seconds fit into a budget of seconds."""
    return max(FEWEST, min(MOST, int(budget / max(once, 1e-9))))


def on_cpu(work: Work, budget: float = 0.2) -> Times:
    for _ in range(WARMUP):
        work()
    count = repetitions(min(seconds(work) for _ in range(2)), budget)
    return Times(wall=Quantiles.of([seconds(work) for _ in range(count)]))


def on_cuda(work: Work, flush: torch.Tensor, budget: float = 0.05) -> tuple[Times, str]:
    """All clocks, and why the graph's is missing if it is.  flush: twice the L2 cache or more, read to evict the rest.

    To be called with the stream on which `work` runs as the current one, which must not be the default stream.
    """
    for _ in range(WARMUP):
        work()
    wall = [waited(work) for _ in range(FEWEST)]
    count = repetitions(min(wall), budget)
    wall = [waited(work) for _ in range(count)]
    hold = 2 * max(queued(work) for _ in range(3))
    cold, host = zip(*(between_events(work, hold, flush) for _ in range(count)))
    times = Times(cold=Quantiles.of(cold), wall=Quantiles.of(wall), host=Quantiles.of(host))
    if times.cold.p50 > LONG:
        return times, ""
    warm = [between_events(work, hold)[0] for _ in range(count)]
    times = times._replace(warm=Quantiles.of(warm))
    try:
        return times._replace(graph=Quantiles.of(in_graph(work, times.cold.p50, count))), ""
    except Exception as error:  # what cannot be captured still has its other times
        torch.cuda.synchronize()
        return times, f"no graph: {said(error)}"


def waited(work: Work) -> float:
    """Seconds until the device is done with one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def queued(work: Work) -> float:
    """Seconds until the host has queued one call."""
    torch.cuda.synchronize()
    return seconds(work)


def between_events(work: Work, hold: float, flush: torch.Tensor | None = None) -> tuple[float, float]:
    """(device seconds, host seconds) of one call; the device spins for `hold` seconds while the host queues it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(hold * SPIN) + 20_000)
    if flush is not None:
        flush.sum()  # read, not written: dirty lines would go back to memory during the call
    start.record()
    host = seconds(work)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, host


def in_graph(work: Work, once: float, count: int) -> list[float]:
    """Seconds of one call in a graph of many, over some replays."""
    calls = max(1, min(IN_GRAPH, int(0.02 / once)))
    graph = torch.cuda.CUDAGraph()
    # on the current stream: a backward runs on the stream of its forward, and must be captured there
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(calls):
            work()
    graph.replay()
    replays = max(FEWEST, count // calls)
    return [between_events(graph.replay, 300e-6)[0] / calls for _ in range(replays)]


def said(error: BaseException) -> str:
    """Its type and the beginning of what it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
