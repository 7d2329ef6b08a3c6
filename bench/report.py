"""`python -m bench.report`: the tables of a results file as Markdown, and its plots as PNG beside it.

    python -m bench.report                          every CSV file of bench/results
    python -m bench.report nvidia-h200.csv --plots docs/images

A row that lost is shown like a row that won, and who gave no time is named with the reason.  On a GPU times are device
times with a cold L2 cache; on a CPU they are wall times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.floors import MODES
from bench.rows import FOLDER, Row, read

NOT_COMPARED = ("batch", "memory", "host")  # parts with tables or plots of their own


class Duel(NamedTuple):
    """Ours beside the fastest peer on one workload and mode."""

    ours: Row
    peer: Row
    waited: Row  # the fastest peer for a caller who waits for each result

    @property
    def ratio(self) -> float:
        """The peer's time over ours: above 1, ours is faster."""
        return time_us(self.peer) / time_us(self.ours)

    @property
    def wall_ratio(self) -> float:
        return self.waited["wall_p50_us"] / self.ours["wall_p50_us"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: all of bench/results")
    parser.add_argument("--plots", type=Path, help="folder of the PNG files; default: beside the CSV file")
    args = parser.parse_args(argv)
    files = args.files or sorted(FOLDER.glob("*.csv"))
    missing = [str(f) for f in files if not f.exists()]
    if missing or not files:
        parser.error(f"no results in {', '.join(missing) or FOLDER}; `python -m bench.run` writes them")
    for file in files:
        results = read(file)
        print(markdown(results))
        try:
            from bench.plots import draw_all
        except ImportError:
            print("plots need matplotlib: pip install '.[bench]'")
            continue
        for path in draw_all(results, (args.plots or file.parent) / file.stem):
            print(f"drawn: {path}")
    return 0


def time_us(row: Row) -> float:
    return row["cold_p50_us"] or row["wall_p50_us"]


def timed(rows: Iterable[Row], *parts: str) -> list[Row]:
    """Rows with times; of the parts, or of those that compare all contenders."""
    return [r for r in rows if r["status"] == "ok" and (r["part"] in parts if parts else r["part"] not in NOT_COMPARED)]


def duels(rows: Iterable[Row]) -> dict[tuple[str, str], Duel]:
    """By (workload, mode), in the order of the file: where both ours and some peer have times."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["workload"], row["mode"]), []).append(row)
    found = {}
    for key, group in grouped.items():
        ours = [r for r in group if r["provider"] == "ours"]
        peers = [r for r in group if r["provider"] != "ours"]
        if ours and peers:
            found[key] = Duel(ours[-1], min(peers, key=time_us), min(peers, key=lambda r: r["wall_p50_us"]))
    return found


def markdown(rows: list[Row]) -> str:
    if not rows:
        return "no rows"
    parts = [_heading(rows), _compared(duels(timed(rows)))]
    sections = {"Batch sweep": "batch", "Memory over N": "memory"}
    found = {name: duels(timed(rows, part)) for name, part in sections.items()}
    parts += [f"### {name}\n\n{_compared(duel)}" for name, duel in found.items() if duel]
    parts += [_host(timed(rows, "host")), _choices(timed(rows)), _without_times(rows)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _heading(rows: list[Row]) -> str:
    last = next((r for r in reversed(rows) if r["rate_tflops"]), rows[-1])
    made = sorted({f"{r['commit']} of {r['date']}" for r in rows})
    versions = ", ".join(f"{n} {last[n]}" for n in ("torch", "triton", "cuda", "cudnn", "driver") if last[n])
    rates = f"{last['rate_tflops']} TFLOP/s, {last['rate_gbps']} GB/s, {last['rate_gexps']} Gexp/s"
    clock = "device time, cold L2" if any(r["cold_p50_us"] for r in rows) else "wall time"
    return (
        f"## {last['device']}\n\n{versions}; commit {', '.join(made)}. Rates measured in the last run: {rates}. "
        f"Times are medians in microseconds ({clock}); a ratio above 1 means that ours is faster; a gate is a "
        "multiplication of its own for every peer."
    )


def _compared(found: dict[tuple[str, str], Duel]) -> str:
    head = ["workload", "B x Hq / Hk x M x N x D", "mode", "ours", "fastest peer", "its time", "ratio", "wall ratio",
            "ours / floor", "peer / floor", "MiB ours", "MiB peer", "same bits ours", "same bits peer"]  # fmt: skip
    body = []
    for (workload, mode), duel in found.items():
        ours, peer, _ = duel
        who = peer["provider"] + (f" ({peer['runs']})" if peer["runs"] else "")
        body.append([
            workload, sizes(ours), mode, _number(time_us(ours)), who, _number(time_us(peer)), f"{duel.ratio:.2f}",
            f"{duel.wall_ratio:.2f}", *(_number(r["over_floor"]) for r in (ours, peer)),
            *(_number(r["peak_mib"]) for r in (ours, peer)), *(_yes(r["same_bits"]) for r in (ours, peer)),
        ])  # fmt: skip
    return table(head, body)


def _host(rows: list[Row]) -> str:
    """From the call until its last launch, with a full queue."""
    rows = [r for r in rows if r["host_p50_us"] is not None]
    if not rows:
        return ""
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    cells = {(r["workload"], r["mode"], r["provider"]): r for r in rows}
    keys = list(dict.fromkeys((r["workload"], r["mode"]) for r in rows))
    found = [(key, [cells.get((*key, p)) for p in providers]) for key in keys]
    body = [[*key, *(_quantiles(r, "host") if r else "" for r in row)] for key, row in found]
    head = ["workload", "mode", *providers]
    return f"### Host microseconds from the call to its last launch (p20 / p50 / p80)\n\n{table(head, body)}"


def _choices(rows: list[Row]) -> str:
    """What stood behind those who choose by themselves."""
    chosen: dict[tuple[str, ...], list[Row]] = {}
    for r in rows:
        if r["runs"]:
            chosen.setdefault((r["provider"], r["runs"]), []).append(r)
    body = [[*what, where(of)] for what, of in chosen.items()]
    shown = table(["contender", "ran", "where"], body)
    return f"### What ran behind an automatic choice\n\n{shown}" if body else ""


def _without_times(rows: list[Row]) -> str:
    """Who gave no time, why, and where: the same reason once."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for r in rows:
        if r["status"] != "ok":
            found.setdefault((r["provider"], r["status"], r["detail"] or ""), []).append(r)
    if not found:
        return ""
    body = [[*what, where(of)] for what, of in found.items()]
    return f"### Without times\n\n{table(['contender', 'status', 'reason', 'where'], body)}"


def where(rows: list[Row]) -> str:
    """Workloads, each with its modes unless they are all."""
    modes: dict[str, list[str]] = {}
    for r in rows:
        modes.setdefault(r["workload"], []).append(r["mode"])
    return ", ".join(w if set(m) == set(MODES) else f"{w} ({', '.join(dict.fromkeys(m))})" for w, m in modes.items())


def sizes(row: Row) -> str:
    B, Hq, Hk, M, N, D = (int(row[n]) for n in ("B", "Hq", "Hk", "M", "N", "D"))
    return f"{B} x {Hq}{'' if Hq == Hk else f' / {Hk}'} x {M} x {N} x {D}"


def table(head: list[str], body: list[list[str]]) -> str:
    """Markdown; a bar inside a cell is written as a slash."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _quantiles(row: Row, clock: str) -> str:
    return " / ".join(_number(row[f"{clock}_{p}_us"]) for p in ("p20", "p50", "p80"))


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def _yes(text: str | None) -> str:
    return {"True": "yes", "False": "no"}.get(text or "", "")


if __name__ == "__main__":
    sys.exit(main())
