"""`make gpu`: parity of the compiled kernels on an NVIDIA GPU, at real sizes; writes bench/results/<gpu>-parity.json.

Needs nothing but a python3 with torch and Triton.  Every launch configuration that ships is among the cases: each
dtype, each padded head size, each kernel, each field of the mask.  Exits 1 when a result is over its budget.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, MutableSequence, Sequence
from dataclasses import replace
from pathlib import Path

try:
    import torch
    import triton
except ModuleNotFoundError as error:
    sys.exit(f"make gpu needs a python3 with torch and triton: this one, {sys.executable}, has no {error.name}")

from bench.jobs import DONE, LEFT_OUT, PENDING, answers
from bench.rows import path_of
from bench.supervise import supervise
from crossattn_kernels import Mask, cross_attention, cross_attention_chunked, explain
from crossattn_kernels.testing import FEATURES, SIZES, Call, Case, Row, check, compare, draw, poisoned, run, with_dtypes

BUDGET = 450.0  # seconds, after which no case is begun
PATIENCE = 120.0  # seconds that one case may take; nearly all of it is compilation
HALF = (torch.bfloat16, torch.float16)
REAL = replace(FEATURES[0], B=2, Hq=8, Hk=4, M=777, N=1030, D=64)
# the battery with tiles enough to be cut, and the shapes of published models
FEATURES = [
    replace(REAL, **{f: getattr(c, f) for f in vars(c) if f not in ("B", "Hq", "Hk", "M", "N", "D", "Dv")})
    for c in FEATURES
]
SIZES = [
    replace(c, M=c.M if "x" in c.name else 333, N=c.N if "x" in c.name else 401) if c.M * c.N else c for c in SIZES
]
MODELS = [
    Case("SDXL 4096 x 77", 2, 10, 10, 4096, 77, 64, source="SDXL U-Net, 64 x 64 latents"),
    Case("SD1.5 4096 x 77", 2, 8, 8, 4096, 77, 40, source="SD 1.5 U-Net"),
    Case("SD1.5 256 x 77", 2, 8, 8, 256, 77, 160, source="SD 1.5 U-Net"),
    Case("Wan 8190 x 512", 1, 40, 40, 8190, 512, 128, source="Wan 14B, a quarter of 480p"),
    Case("Flamingo", 4, 8, 8, 1024, 320, 64, mask="media", gate="scalar", source="OpenFlamingo, 5 images"),
    Case("Idefics", 2, 32, 32, 1024, 320, 128, mask="media", empty_rows="uniform", source="Idefics 9B"),
    Case("Llama-3.2-Vision", 1, 32, 8, 1024, 6404, 128, mask="tiles", empty_rows="attend_all"),
    Case("Llama-3.2-Vision decode", 8, 32, 8, 1, 6404, 128, source="one token"),
    Case("Perceiver", 8, 16, 16, 64, 2112, 96, share="q expanded", source="Idefics perceiver, learned latents"),
    Case("Q-Former", 16, 12, 12, 32, 257, 64, share="q", dropout_p=0.1, source="BLIP-2"),
    Case("Whisper", 4, 20, 20, 448, 1500, 64, scale=1.0 / 8, source="Whisper large"),
    Case("Whisper beams", 5, 20, 20, 1, 1500, 64, share="kv expanded", source="one audio, five beams"),
    Case("T5", 2, 32, 32, 512, 512, 64, scale=1.0 / 8, mask="padding", bias=(0, 1, 1, 1), source="T5 XL"),
    Case("T5Gemma", 2, 8, 4, 333, 444, 256, softcap=50.0, source="T5Gemma"),
    Case("Mask2Former", 2, 8, 8, 100, 4096, 32, mask="head dense", empty_rows="attend_all", source="Mask2Former"),
    Case("GroundingDINO", 1, 4, 4, 4000, 200, 256, mask="padding", source="image to text"),
]  # fmt: skip
# each schedule with tiles that are full, and every configuration of the tables: by head size and what a call asks for
EVERYTHING = next(c for c in FEATURES if c.name == "everything")
SCHEDULES = [
    replace(kind, name=f"{M} x {N}, D {D}, {name}", M=M, N=N, D=D, Hq=8, Hk=4)
    for name, kind in dict(plain=REAL, ranges=replace(REAL, mask="ranges"), everything=EVERYTHING).items()
    for D in (64, 128, 256)
    for M, N in ((600, 600), (700, 128), (700, 32), (32, 700), (1, 4096))
] + [
    replace(REAL, name=f"{M} x {N}, D {D}, plain", M=M, N=N, D=D)
    for M, N in ((600, 640), (32, 704))  # keys that are not ragged
    for D in (40, 64, 72, 128, 160, 256)
]
# what tables know apart besides; rows of a bias are loaded by vectors only where N is a multiple of 16
FULL_TILES = ((600, 600), (700, 77), (32, 700))
OPTIONS = [
    replace(REAL, name=f"{M} x {N}, D {D}, {' '.join(asked)}", M=M, N=N, D=D, Hq=8, Hk=4, **asked)
    for asked, shapes in (
        (dict(gate="head"), (*FULL_TILES, (700, 32), (1, 4096))),
        (dict(bias=(1, 1, 1, 1)), (*FULL_TILES, (600, 592), (700, 80), (32, 704))),
        (dict(mask="ranges", gate="head"), FULL_TILES),
        (dict(mask="padding"), (*FULL_TILES, (1, 4096))),
        (dict(mask="ranges", bias=(1, 1, 1, 1)), ((600, 592), (700, 80), (32, 704))),
        (dict(dropout_p=0.1), FULL_TILES),
        (dict(bias=(1, 1, 1, 1), dropout_p=0.1), FULL_TILES),
        (dict(mask="padding", bias=(1, 1, 1, 1), gate="head", dropout_p=0.1), FULL_TILES),
    )
    for D in (64, 128, 256)
    for M, N in shapes
] + [replace(REAL, name=f"D {D}, ranges", mask="ranges", D=D) for D in (40, 72, 160)]


def cases() -> list[Case]:
    small = with_dtypes(FEATURES, torch.float32, *HALF)
    sizes = with_dtypes(SIZES, torch.float32, *HALF)
    models = with_dtypes(MODELS, *HALF) + with_dtypes(MODELS[:1] + MODELS[4:5], torch.float32)
    schedules = with_dtypes(SCHEDULES, torch.float32, torch.bfloat16) + with_dtypes(OPTIONS, torch.bfloat16)
    return small + sizes + models + schedules


def bitwise() -> list[Row]:
    """Two runs: the number of elements that differ, of which none may."""
    case = next(c for c in FEATURES if c.name == "everything")
    call = draw(replace(case, dtype=torch.bfloat16), "cuda")
    first = run(call, "triton")
    runs = [run(call, "triton") for _ in range(5)]
    return [Row(n, float(sum((r[n] != t).sum().item() for r in runs)), 0.0) for n, t in first.items()]


def many_programs() -> list[Row]:
    """B * H beyond 65,535."""
    q, k, v = (torch.randn(35_000, 2, n, 16, device="cuda", dtype=torch.bfloat16) for n in (17, 5, 5))
    y = cross_attention(q, k, v)
    exact = cross_attention(*(t[-3:].double() for t in (q, k, v)), backend="reference")
    eager = cross_attention(*(t[-3:] for t in (q, k, v)), backend="reference")
    error, yardstick = ((t.double() - exact).abs().max().item() for t in (y[-3:], eager))
    return [Row("y", error, 2 * yardstick + torch.finfo(y.dtype).eps / 2 * exact.abs().max().item())]


def beyond_int32() -> list[Row]:
    """Keys whose offsets pass 2^31 elements."""
    N = 2**31 // (64 * 64) + 99
    k = torch.randn(1, N, 64, 64, device="cuda", dtype=torch.bfloat16)[:, :, :1].transpose(1, 2)
    q = torch.randn(1, 1, 3, 64, device="cuda", dtype=torch.bfloat16)
    mask = Mask(torch.full((1, 1, 1), N - 50, device="cuda"))
    y = cross_attention(q, k, k, mask)
    near = k[:, :, -50:].contiguous()
    return [
        Row(
            "y",
            (y - cross_attention(q, near, near)).abs().max().item(),
            torch.finfo(y.dtype).eps * near.abs().max().item(),
        )
    ]


def chunks() -> list[Row]:
    """Three chunks against their concatenation."""
    q, k, v = (torch.randn(2, 8, n, 64, device="cuda", dtype=torch.bfloat16) for n in (300, 900, 900))
    y = cross_attention_chunked(q, list(zip(k.split(300, 2), v.split(300, 2))))
    exact = cross_attention(*(t.double() for t in (q, k, v)), backend="reference")
    eager = cross_attention(q, k, v, backend="reference")
    error, yardstick = ((t.double() - exact).abs().max().item() for t in (y, eager))
    return [Row("y", error, 2 * yardstick + torch.finfo(y.dtype).eps / 2 * exact.abs().max().item())]


def hidden_values(device: str = "cuda", backend: str = "triton", sizes: tuple[int, ...] = (64, 128)) -> list[Row]:
    """NaN in a key that no query sees: as with 0 there.  The forward runs twice where it lies in a tile with others."""
    found = []
    for mask in ("padding", "dense"):
        for D in sizes:
            call = draw(replace(REAL, B=1, N=77, D=D, mask=mask, dtype=torch.bfloat16), device)
            assert call.mask is not None
            keep = torch.arange(77, device=device) != 10
            call = call._replace(mask=call.mask & Mask.key_padding(keep))

            def with_key(value: float, call: Call = call) -> Call:
                k, v = (call.tensors[n].clone() for n in "kv")
                k[:, :, 10], v[:, :, 10] = value, value
                return call._replace(tensors=call.tensors | {"k": k, "v": v})

            clean = [run(with_key(0.0), "reference", dtype) for dtype in (torch.float64, None)]
            rows = compare(run(with_key(math.nan), backend), *clean)
            found += [row._replace(name=f"{row.name}, {mask}, D {D}") for row in rows]
    return found


def graph() -> list[Row]:
    """A CUDA graph of forward and backward: nothing in a call waits for the device."""
    case = replace(REAL, name="graph", dtype=torch.bfloat16, mask="ranges", gate="head")
    call = draw(case, "cuda")
    leaves = {n: t.clone().requires_grad_() for n, t in call.tensors.items()}

    def step() -> tuple[torch.Tensor, ...]:
        y = cross_attention(**leaves, mask=call.mask)
        return y, *torch.autograd.grad(y, list(leaves.values()), call.dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # on which the inputs were drawn
    with torch.cuda.stream(side):
        eager = [t.detach() for t in step()]
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = step()
    captured.replay()
    torch.cuda.synchronize()
    return [Row(f"result {i}", float((a != b).sum().item()), 0.0) for i, (a, b) in enumerate(zip(results, eager))]


CASES = {str(c): c for c in cases()}


def models() -> list[Row]:
    """Models of transformers, where it is installed, before and after `apply`."""
    from tests.gpu_models import models

    return models()


CHECKS = dict(
    bitwise=bitwise,
    many_programs=many_programs,
    beyond_int32=beyond_int32,
    chunks=chunks,
    hidden_values=hidden_values,
    graph=graph,
    models=models,
)


def record(name: str) -> dict:
    """Result of one case or check, by its name; whatever goes wrong is part of it."""
    began = time.monotonic()
    try:
        if name in CHECKS:  # not poisoned: a graph cannot be captured while fresh memory is being filled
            rows, failure = CHECKS[name](), None
        else:
            with poisoned(strict=False):
                rows, failure = check(CASES[name], "triton", "cuda"), None
    except Exception:
        rows, failure = [], traceback.format_exc(limit=-3)[-2000:]
    ok = failure is None and all(r.ok for r in rows)
    if not ok:
        over = {r.name: f"{r.error:.2e} > {r.budget:.2e}" for r in rows if not r.ok}
        print("FAILED", name, failure or over, flush=True)
    results = {r.name: [r.error, r.budget] for r in rows}
    return dict(case=name, ok=ok, failure=failure, seconds=round(time.monotonic() - began, 1), results=results)


def work(names: Sequence[str], states: MutableSequence[int], deadlines: Sequence[float], lines: Path) -> None:
    """Do what is pending and not late; returns early when the device no longer answers: a new process goes on."""
    quiet()
    for i, name in enumerate(names):
        if states[i] != PENDING:
            continue
        if time.monotonic() > deadlines[i]:
            states[i] = LEFT_OUT
            continue
        append(lines, record(name))
        states[i] = DONE
        if not answers("cuda"):
            return
        torch.cuda.empty_cache()  # other processes need memory too


def append(lines: Path, outcome: dict) -> None:
    """At once on disk: a run that is cut off keeps what it has."""
    with lines.open("a") as file:
        file.write(json.dumps(outcome) + "\n")


def records(names: list[str], workers: int, lines: Path, budget: float) -> list[dict]:
    """Outcomes of what was done within the budget, by several processes: nearly all of the time is compilation."""
    deadline = time.monotonic() + budget
    lines.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text("")

    def died(name: str, why: str) -> None:
        append(lines, dict(case=name, ok=False, failure=why, results={}))

    def share(worker: int) -> None:
        mine = names[worker::workers]
        supervise(work, mine, [deadline] * len(mine), (lines,), died, patience=PATIENCE)

    threads = [threading.Thread(target=share, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(read(lines))


def read(lines: Path) -> Iterator[dict]:
    """What was written; a line that a process left unfinished is no outcome, so that its case counts as left out."""
    for line in lines.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def quiet() -> None:
    warnings.filterwarnings("ignore", message=".*deterministic")  # of the reference, not of the kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", help="only cases whose name contains this")
    parser.add_argument("--commit", help="what is tested, if the tree has no .git")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the report")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="no case is begun after it")
    # two cores are left to what the compilers start
    workers = max(1, min(14, (os.cpu_count() or 1) - 2))
    parser.add_argument("--workers", type=int, default=workers, help="processes that compile and run")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU that this torch can use; there is none")
        return 2
    began, gpu = time.time(), torch.cuda.get_device_name()
    names = [name for name in (*CHECKS, *CASES) if args.k in name]
    # a part does not take the place of the whole
    path = path_of(args.out, f"{gpu}-parity {args.k}").with_suffix(".json")
    lines = path.with_suffix(".jsonl")
    done = records(names, args.workers, lines, args.budget)
    bad, left = sum(not r["ok"] for r in done), sorted(set(names) - {r["case"] for r in done})
    example = torch.zeros(1, 1, 16, 64, device="cuda", dtype=torch.bfloat16)
    report = dict(
        gpu=gpu, capability=torch.cuda.get_device_capability(), torch=torch.__version__, triton=triton.__version__,
        commit=args.commit or _commit(), date=datetime.date.today().isoformat(), seconds=round(time.time() - began, 1),
        default_backend=explain(example, example, example).backend, passed=len(done) - bad, failed=bad, left_out=left,
        cases=sorted(done, key=lambda r: r["case"]),
    )  # fmt: skip
    path.write_text(json.dumps(report, indent=1) + "\n")
    lines.unlink()
    late = f", {len(left)} left out, {args.budget:.0f} s were over" if left else ""
    print(f"{len(done) - bad} passed, {bad} failed{late} in {report['seconds']} s on {gpu}: {path}")
    return 1 if bad or left or not done else 0


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
