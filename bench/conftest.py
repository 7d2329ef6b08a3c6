"""The set-up of `make bench`: two threads, interleaved contenders, tables at the end, results as JSON."""

from __future__ import annotations

import io
import json
import platform
import subprocess
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from bench.measure import Quantiles, rounds_for, seconds

THREADS = 2
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / f"cpu-{THREADS}-threads.json"
ROWS = pytest.StashKey[list[dict[str, Any]]]()
WARMUP = 3

Record = Callable[..., None]
Race = Callable[..., float]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # the tables below say more


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Record:
    """Keep one row of a table: what was measured, whether it reached its target."""

    def keep(table: str, name: str, target: str, met: bool, **values: Any) -> None:
        benchmark.extra_info.update(values, target=target, met=met)
        row = dict(table=table, name=name, **values, target=target, met=met)
        request.config.stash[ROWS].append(row)

    return keep


@pytest.fixture
def race(benchmark: Any, record: Record) -> Race:
    """Time the first contender against the second, turn by turn; the ratio is that of the two times of one turn."""

    def run(
        table: str, name: str, contenders: dict[str, Callable[[], object]], target: float | None, **values: Any
    ) -> float:
        (ours, theirs), times = contenders, {who: [] for who in contenders}
        rounds = rounds_for(list(contenders.values()))
        benchmark.pedantic(
            lambda: times[ours].append(seconds(contenders[ours])),
            setup=lambda: times[theirs].append(seconds(contenders[theirs])),
            rounds=rounds,
            warmup_rounds=WARMUP,
        )
        kept = {who: sample[-rounds:] for who, sample in times.items()}
        ratio = Quantiles.of([b / a for a, b in zip(kept[ours], kept[theirs])])
        in_ms = {f"{who} ms": Quantiles.of([1e3 * t for t in sample]) for who, sample in kept.items()}
        met = target is None or ratio.p50 >= target
        record(table, name, "" if target is None else f">= {target}", met, **values, **in_ms, ratio=ratio)
        return ratio.p50

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    for name in dict.fromkeys(row["table"] for row in rows):
        terminalreporter.write_line("")
        terminalreporter.write(_table(name, [row for row in rows if row["table"] == name]))


def _table(name: str, rows: list[dict[str, Any]]) -> str:
    columns = [c for c in dict.fromkeys(c for row in rows for c in row) if c not in ("table", "met")]
    quantiles = "   (p20 / p50 / p80)" if any(isinstance(x, Quantiles) for row in rows for x in row.values()) else ""
    table = Table(title=name + quantiles, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    table.add_column("")
    for row in rows:
        cells = ["" if row.get(c) is None else str(row[c]) for c in columns]
        verdict = "" if not row["target"] else "ok" if row["met"] else "MISSED"
        table.add_row(*cells, verdict, style=None if row["met"] else "bold red")
    console = Console(width=180, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Rows of this run replace those of the same name in the file; the others stay."""
    rows = session.config.stash[ROWS]
    if not rows:
        return
    made = dict(
        date=date.today().isoformat(), commit=_commit(), torch=torch.__version__, python=platform.python_version()
    )
    made |= dict(threads=torch.get_num_threads(), capability=torch.backends.cpu.get_cpu_capability())
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    new = {(row["table"], row["name"]): row for row in old} | {
        (row["table"], row["name"]): {k: _plain(v) for k, v in (row | made | row).items()} for row in rows
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in new.values()) + "\n]\n")


def _plain(value: Any) -> Any:
    return {k: float(f"{v:.4g}") for k, v in value._asdict().items()} if isinstance(value, Quantiles) else value


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "crossattn_kernels") else "")
