"""The sweep as a table or as JSON, in an order that does not change."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import triton

from crossattn_kernels.aot import Call, Row, sweep
from crossattn_kernels.aot.machine_code import Figures
from crossattn_kernels.aot.target import standing_in
from crossattn_kernels.aot.workers import Failure, compile_all
from crossattn_kernels.tuning import Config

SCHEMA = 1
ALWAYS = ("registers", "stack", "shared")  # shown if they are 0
COLUMNS = ("kernel", "schedule", "call", "tiles", *Figures._fields, "seconds")
WIDTHS = dict(kernel=20, schedule=13, call=40, tiles=18)


def run(arch: str, only: str, every: bool, as_report: bool, jobs: int) -> int:
    """Compile the calls of the sweep with `only` in their names, print what they became; 1 if one did not compile.

    Raises ValueError for an unknown arch, and where kernels are bound to Triton's interpreter.
    """
    with standing_in(arch):  # what it refuses is refused before any process starts
        named = [call for call in sweep(every) if only in str(call)]
    table = sys.stderr if as_report else sys.stdout
    print(heading(), file=table)
    rows = []
    for call, found in zip(named, compile_all(arch, named, jobs)):
        for row in records(call, found):
            rows.append(row)
            print(as_line(row), file=table, flush=True)
    if as_report:
        print(as_json(arch, rows), end="")
    return int(any("failure" in row for row in rows))


def records(call: Call, found: list[Row] | Failure) -> Iterator[dict[str, Any]]:
    """One dict a kernel of a call; seconds are left out where reports are compared."""
    if isinstance(found, Failure):
        yield dict(call._asdict(), kernel=found.kernel, failure=found.reason)
        return
    for row in found:
        config = {name: n for name, n in row.config._asdict().items() if n != Config._field_defaults.get(name)}
        figures = {name: n for name, n in row.figures._asdict().items() if n or name in ALWAYS}
        yield dict(
            call._asdict(), kernel=row.kernel, schedule=row.schedule, config=config, **figures, seconds=row.seconds
        )


def as_json(arch: str, rows: Iterable[dict[str, Any]]) -> str:
    """One row a line, so that a diff shows the kernels that changed; what is 0 or not known is left out."""
    head = json.dumps(dict(schema=SCHEMA, arch=arch, triton=triton.__version__))
    lines = (json.dumps({name: value for name, value in row.items() if name != "seconds"}) for row in rows)
    return f'{head[:-1]}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def heading() -> str:
    return "  ".join(name.replace("_", " ").ljust(WIDTHS.get(name, len(name))) for name in COLUMNS)


def as_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    call = str(Call(*(row[name] for name in Call._fields)))
    if "failure" in row:
        return f"{row['kernel'].ljust(WIDTHS['kernel'])}  {call}: {row['failure']}"
    cells = row | dict(call=call, tiles=", ".join(map(str, Config(**row["config"])[:5])))
    cells["seconds"] = f"{row['seconds']:.1f}"
    return "  ".join(str(cells.get(name, "")).ljust(WIDTHS.get(name, len(name))) for name in COLUMNS)
