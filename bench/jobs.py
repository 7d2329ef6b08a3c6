"""From a job to a row: draw, check, time; whatever goes wrong becomes part of the row."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, MutableSequence, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import ceilings, clocks, providers, rows
from bench.floors import Cost, Visible, floor, total, visible
from bench.named import NAMED, Named
from bench.parts import Job
from bench.verdict import Truth, judge, same_bits, truths

PENDING, DONE, LEFT_OUT = range(3)
NO_KERNEL = ("No available kernel", "No viable backend")  # what SDPA says when a backend asked for by name cannot


class Setting(NamedTuple):
    """Where a run happens and where its rows go."""

    device: str
    small: bool
    path: Path
    machine: rows.Row


class Prepared(NamedTuple):
    """A workload, drawn, and what is known of it."""

    known: list[Truth]
    seen: Visible


def work(jobs: Sequence[Job], states: MutableSequence[int], deadlines: Sequence[float], setting: Setting) -> None:
    """Do what is pending and not late (time.monotonic()); returns early when the device no longer answers."""
    if setting.device != "cuda":
        return _work(jobs, states, deadlines, setting, None)
    gc.freeze()  # each capture of a graph collects garbage, of which imports make none
    flush = torch.zeros(flush_bytes() // 4, device="cuda")
    # one stream for all: a backward runs on its forward's stream, and graphs cannot be captured on the default one
    with torch.cuda.stream(torch.cuda.Stream()):
        _work(jobs, states, deadlines, setting, flush)


def flush_bytes() -> int:
    """Twice the L2 cache, at least 128 MiB."""
    return max(2**27, 2 * torch.cuda.get_device_properties().L2_cache_size)


def _work(
    jobs: Sequence[Job],
    states: MutableSequence[int],
    deadlines: Sequence[float],
    setting: Setting,
    flush: torch.Tensor | None,
) -> None:
    rates = ceilings.on_cpu() if flush is None else ceilings.on_cuda()
    print(
        f"rates: {rates.flops / 1e12:.4g} TFLOP/s, {rates.bytes / 1e9:.4g} GB/s, {rates.exps / 1e9:.4g} Gexp/s",
        flush=True,
    )
    ready: Prepared | str = ""
    workload = None
    for i, job in enumerate(jobs):
        if states[i] != PENDING:
            continue
        if time.monotonic() > deadlines[i]:
            states[i] = LEFT_OUT
            continue
        if job.workload != workload:
            ready = ""  # the memory of the last one first
            ready, workload = prepare(NAMED[job.workload], setting), job.workload
        row, alive = result(job, ready, rates, setting, flush)
        rows.append(setting.path, row)
        states[i] = DONE
        print(line(row), flush=True)
        if not alive:
            return


def prepare(workload: Named, setting: Setting) -> Prepared | str:
    """Drawn inputs and exact results; or why there are none."""
    try:
        free(setting.device)
        known = truths(lambda seed: workload.inputs(setting.device, setting.small, seed))
        return Prepared(known, visible(known[0].call))
    except Exception as error:
        return f"no reference: {clocks.said(error)}"


def heading(job: Job, setting: Setting) -> rows.Row:
    """What a row says before anything is measured."""
    case = NAMED[job.workload].at(setting.device, setting.small)
    sizes = {n: getattr(case, n) for n in ("B", "Hq", "Hk", "M", "N", "D")}
    what = dict(dtype=str(case.dtype).removeprefix("torch."), gate=case.gate or "", source=case.source)
    return dict(setting.machine, **job._asdict(), **sizes, **what)


def result(
    job: Job, ready: Prepared | str, rates: Cost, setting: Setting, flush: torch.Tensor | None
) -> tuple[rows.Row, bool]:
    """A row, and whether the device still answers."""
    row: rows.Row = heading(job, setting)
    row |= dict(rate_tflops=rates.flops / 1e12, rate_gbps=rates.bytes / 1e9, rate_gexps=rates.exps / 1e9)
    if isinstance(ready, str):
        return row | dict(status="error", detail=ready), answers(setting.device)
    case, call = NAMED[job.workload].at(setting.device, setting.small), ready.known[0].call
    row["visible"] = ready.seen.pairs
    try:
        with providers.scope(job.provider):
            row |= measured(job, ready, flush)
    except providers.Refused as refusal:
        row |= dict(status="refused", detail=str(refusal))
    except Exception as error:
        refused = job.provider in providers.SDPA and any(text in str(error) for text in NO_KERNEL)
        why = providers.why_not(job.provider, call) if refused else ""
        row |= dict(status="refused" if refused else "error", detail=why[:600] or clocks.said(error))
    if row["status"] == "ok":
        least, must = floor(case, job.mode, rates, ready.seen), total(case, job.mode, ready.seen)
        seconds = row.get("cold_p50_us", row["wall_p50_us"]) / 1e6  # on a CPU there is wall time only
        row |= dict(floor_us=1e6 * least.seconds, floor_limit=least.limit, over_floor=seconds / least.seconds)
        row |= dict(tflops=must.flops / seconds / 1e12, gbps=must.bytes / seconds / 1e9)
    return row, answers(setting.device)


def measured(job: Job, ready: Prepared, flush: torch.Tensor | None) -> rows.Row:
    """Correctness, then the clocks; a wrong result is not timed."""
    call = ready.known[0].call
    verdict = judge(lambda call: providers.bind(job.provider, call, job.mode), ready.known, job.mode)
    shares = {r.name: r.error / r.budget if r.budget else r.error for r in verdict}
    found: rows.Row = dict(status="ok", error_over_budget=max(shares.values()))
    if not all(r.ok for r in verdict):
        over = "; ".join(f"{r.name}: error {r.error:.2e} > budget {r.budget:.2e}" for r in verdict if not r.ok)
        return found | dict(status="wrong", detail=over)
    with torch.set_grad_enabled(job.mode != "forward"):
        found["runs"] = providers.chosen(job.provider, call)
    run = providers.bind(job.provider, call, job.mode)
    found["same_bits"] = same_bits(run)
    if flush is None:
        return found | rows.times_columns(clocks.on_cpu(run))
    found["peak_mib"] = peak_bytes(run) / 2**20
    times, found["detail"] = clocks.on_cuda(run, flush)
    return found | rows.times_columns(times)


def peak_bytes(run: Callable[[], object]) -> int:
    """Device memory beyond what exists before the call; its results are part of it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def answers(device: str) -> bool:
    """False when an error has made the CUDA context unusable: only a new process helps."""
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        return True
    except Exception:
        return False


def free(device: str) -> None:
    gc.collect()
    if device == "cuda" and answers(device):
        torch.cuda.empty_cache()


def line(row: rows.Row) -> str:
    """One line of a run's output."""
    shown = " ".join(f"{c} {row[f'{c}_p50_us']:.4g}" for c in clocks.Times._fields if f"{c}_p50_us" in row)
    runs = f" [{row['runs']}]" if row.get("runs") else ""
    what = f"{row['workload']:18}{row['mode']:18}{row['provider'] + runs:30}"
    if row["status"] != "ok":
        return f"{what}{row['status']}: {row['detail']}"
    bits = "" if row["same_bits"] else ", not reproducible"
    return f"{what}{shown} us; {row['over_floor']:.3g} x floor ({row['floor_limit']}){bits}"
