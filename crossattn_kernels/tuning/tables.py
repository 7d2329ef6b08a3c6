"""Configurations by architecture, as JSON in `tables/`; what a table does not know, the rule decides.

A file is {"schema": 1, "arch": "sm_90", "entries": [...]}.  An entry has what it is looked up by, which is the
"major.minor" of the Triton that it was chosen with, dtype ("half": 16 bit, "full": fp32), D (padded: 64, 128, 256),
kernel and kind (see `kind_of`); the fields of a `Config`; and source, which says how it was chosen.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from crossattn_kernels.problem import Problem
from crossattn_kernels.tuning.chips import Chip
from crossattn_kernels.tuning.rules import MOST_EXTRAS, Config, head_size, shared_bytes

SCHEMA = 1
FOLDER = Path(__file__).with_name("tables")
KEY = ("dtype", "D", "kernel", "kind")
# where a table has no entry of a kind, it is that of another
COARSER = {
    "ragged padded plain": "padded plain",
    "ragged plain": "plain",
    "padded plain": "plain",
    "padded ranges": "ranges",
    "several pairs": "several",
    "several scattered": "scattered",
    "scattered dropout": "dropout",
    **dict.fromkeys(("pairs", "scattered", "dropout", "several", "many"), "other"),
}
RAGGED = 64  # a plain call is ragged if its keys are no multiple of so many: one tile is not full, in a loop of its own
Key = tuple[str, int, str, str]
Version = tuple[int, ...]
Table = dict[Key, dict[Version, Config]]  # by KEY, then by Triton's version
SUPPOSED: dict[Key, Config] = {}  # stand in for those of any table


def lookup(chip: Chip, problem: Problem, kernel: str) -> Config | None:
    """The configuration of a table; None where there is none, or none that fits the chip, so that the rule decides.

    The table is that of the architecture, else of the newest one before it of the same vendor; the entry is that of the
    Triton that is installed, else of the newest one before it.
    """
    path, installed = _path_for(FOLDER, chip.arch), _triton()
    if path is None or installed is None:
        return None
    key = key_of(problem, kernel)
    if key in SUPPOSED:
        return SUPPOSED[key]
    table, kind, config = _read(path), key[-1], None
    while kind and config is None:
        found = table.get((*key[:-1], kind), {})
        config = found.get(max((version for version in found if version <= installed), default=()))
        kind = COARSER.get(kind, "")
    measured = path.stem == chip.arch  # with less shared memory than `shared_bytes` allows for
    return config if config and (measured or shared_bytes(kernel, config, problem) <= chip.shared) else None


def key_of(problem: Problem, kernel: str) -> Key:
    """What the configuration of a kernel is looked up by, as `KEY`."""
    return "full" if problem.dtype.itemsize == 4 else "half", head_size(problem), kernel, kind_of(problem)


def kind_of(problem: Problem) -> str:
    """What a call asks for besides q, k and v, as finely as the registers that it takes."""
    p = problem
    if p.plain:
        padded = "padded " if max(p.D, p.Dv) != head_size(p) else ""
        return padded + "ranges" if p.masked else ("ragged " if p.N % RAGGED else "") + padded + "plain"
    if p.extras > MOST_EXTRAS:
        return "many"
    if p.drops:
        return "scattered dropout" if p.scattered else "dropout"
    if p.scattered:
        return "several scattered" if p.extras > 1 else "scattered"
    if p.extras > 1:
        return "several pairs" if p.pairwise else "several"
    return "pairs" if p.pairwise else "other"


def save(path: Path, arch: str, entries: Iterable[dict[str, Any]]) -> None:
    """Write a table; whoever reads it meanwhile sees the old one or the new one."""
    head = json.dumps(dict(schema=SCHEMA, arch=arch))
    text = f'{head[:-1]}, "entries": [\n' + ",\n".join(map(json.dumps, entries)) + "\n]}\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(text)
            file.close()
            os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@lru_cache
def _path_for(folder: Path, arch: str) -> Path | None:
    def number(name: str) -> int:
        digits = name.lstrip("gfxsm_")
        return int(digits, 16) if digits else 0  # AMD counts in hexadecimal: gfx90a

    vendor = "sm_" if arch.startswith("sm_") else "gfx"
    known = [path for path in folder.glob(f"{vendor}*.json") if number(path.stem) <= number(arch)]
    return max(known, key=lambda path: number(path.stem), default=None)


@lru_cache
def _read(path: Path) -> Table:
    """Empty, with a warning, where the file is damaged or of another schema."""
    table: Table = {}
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r} instead of {SCHEMA}")
        for entry in content["entries"]:
            config = Config(**{name: entry[name] for name in Config._fields if name in entry})
            key = entry["dtype"], entry["D"], entry["kernel"], entry["kind"]
            table.setdefault(key, {})[_version(entry["triton"])] = config
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"the table {path} is left aside, {type(error).__name__}: {error}", stacklevel=2)
        return {}
    return table


@lru_cache
def _triton() -> Version | None:
    """(major, minor) of the Triton that is installed, which may be on a machine that cannot import it."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return _version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return None


def _version(text: str) -> Version:
    return tuple(map(int, text.split(".")[:2]))
