"""Rows of results: one a workload, contender and mode, appended to one CSV file a machine; and how they are read."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.clocks import Times
from bench.measure import Quantiles

FOLDER = Path(__file__).parent / "results"
WHAT = ("part", "workload", "B", "Hq", "Hk", "M", "N", "D", "dtype", "gate", "provider", "mode")
# status: ok; refused, the contender cannot serve the call; wrong, over the error budget; error, it raised; died, and
# its process with it.  runs: what SDPA or ours chose.  visible: share of the pairs that the mask leaves
OUTCOME = ("visible", "status", "detail", "runs", "same_bits", "error_over_budget")
CLOCKS = tuple(f"{clock}_{p}_us" for clock in Times._fields for p in Quantiles._fields)
DERIVED = ("peak_mib", "tflops", "gbps", "floor_us", "floor_limit", "over_floor")
MACHINE = ("rate_tflops", "rate_gbps", "rate_gexps", "device", "driver", "torch", "triton", "cuda", "cudnn",
           "python", "commit", "date", "source")  # fmt: skip
COLUMNS = (*WHAT, *OUTCOME, *CLOCKS, *DERIVED, *MACHINE)

Row = dict[str, Any]


def path_of(folder: Path, device: str) -> Path:
    """`nvidia-h200.csv`: each device has a file of its own."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.csv"


def check_columns(path: Path) -> None:
    """ValueError if the file holds rows of another kind; asked before anything is measured."""
    if path.exists():
        with path.open(newline="") as file:
            found = next(csv.reader(file), list(COLUMNS))
        if found != list(COLUMNS):
            raise ValueError(f"{path} has other columns than this version writes; move it away or choose another --out")


def append(path: Path, row: Row) -> None:
    """At once on disk: a run that is cut off keeps what it has measured."""
    unknown = row.keys() - set(COLUMNS)
    assert not unknown, unknown
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({n: _short(x) for n, x in row.items()})


def read(path: Path) -> list[Row]:
    """The last row of each workload (with its sizes), contender and mode; numbers as floats, "" as None."""
    with path.open(newline="") as file:
        rows = [{n: _parsed(n, x) for n, x in row.items()} for row in csv.DictReader(file)]
    return list({tuple(row[n] for n in WHAT): row for row in rows}.values())


def times_columns(times: Times) -> Row:
    """cold_p20_us, ...: microseconds."""
    return {
        f"{clock}_{p}_us": 1e6 * value
        for clock, quantiles in times._asdict().items() if quantiles is not None
        for p, value in quantiles._asdict().items()
    }  # fmt: skip


def machine(device: str, commit: str | None = None) -> Row:
    """Versions, commit and date.  commit: for a copy of the tree that has no .git."""
    cuda = torch.cuda.is_available()
    try:
        import triton
    except ImportError:
        triton = None
    return dict(
        device=device, driver=_driver() if cuda else "", torch=torch.__version__,
        triton=getattr(triton, "__version__", ""), cuda=torch.version.cuda or "",
        cudnn=torch.backends.cudnn.version() if cuda else "", python=platform.python_version(),
        commit=commit or _commit(), date=datetime.date.today().isoformat(),
    )  # fmt: skip


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def _commit() -> str:
    at = ("git", "-C", str(FOLDER.parent))
    head = _output(*at, "rev-parse", "--short", "HEAD")
    changed = _output(*at, "status", "--porcelain", "--", "../crossattn_kernels", "../bench/*.py")
    return (head or "unknown") + ("+" if changed else "")


def _output(*command: str) -> str:
    """Of a program that may be missing or fail: then nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


NUMBERS = {*WHAT[2:8], "visible", "error_over_budget", *CLOCKS, *DERIVED} - {"floor_limit"}


def _parsed(name: str, text: str | None) -> Any:
    if not text:
        return None
    return float(text) if name in NUMBERS else text
