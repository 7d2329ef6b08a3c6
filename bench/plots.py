"""The plots of a results file; everything they show is in its rows.  Imported only where matplotlib is.

<device>-ratio.png     the fastest peer's time over ours, by workload and mode
<device>-floor.png     time over floor of every contender, by workload
<device>-batch.png     time per batch entry over the batch, for what a batch of 1 leaves idle
<device>-memory.png    peak memory over N
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench.floors import MODES
from bench.report import duels, sizes, time_us, timed
from bench.rows import Row

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
}
# Okabe and Ito's colours, told apart by colour-blind readers; ours is the dark one
OURS, OTHERS = "#000000", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
MARKS = "sD^vP<>X"
MODE_MARKS = dict(zip(MODES, (("o", "#0072B2"), ("s", "#D55E00"), ("D", "#009E73"))))


def draw_all(rows: list[Row], stem: Path) -> list[Path]:
    """Every plot for which the rows hold something."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    plots = dict(ratio=ratio, floor=over_floor, batch=batch, memory=memory)
    drawn = []
    with rc_context(STYLE):
        for name, plot in plots.items():
            figure = plot(rows)
            if figure is not None:
                drawn.append(stem.with_name(f"{stem.name}-{name}.png"))
                figure.savefig(drawn[-1])
    return drawn


def ratio(rows: list[Row]) -> Figure | None:
    found = duels(timed(rows))
    if not found:
        return None
    labels = {workload: sizes(duel.ours) for (workload, _), duel in found.items()}
    figure, axes = _tall(len(labels))
    axes.axvline(1, color="black", linewidth=1)
    for mode, (mark, colour) in MODE_MARKS.items():
        at = [(duel.ratio, i) for i, w in enumerate(labels) if (duel := found.get((w, mode)))]
        if at:
            axes.plot(*zip(*at), mark, color=colour, markersize=6, label=mode, alpha=0.85)
    ratios = [d.ratio for d in found.values()]
    _log_times(axes, min([0.5, *ratios]) / 1.1, max([2, *ratios]) * 1.1)
    _workloads(axes, labels)
    axes.set_xlabel(f"time of the fastest peer / time of ours ({_clock(rows)}); right of 1, ours is faster")
    axes.set_title(f"Ours against the fastest peer, {rows[-1]['device']}", loc="left")
    _legend(axes)
    return figure


def over_floor(rows: list[Row]) -> Figure | None:
    kept = timed(rows)
    modes = [m for m in MODES[:2] if any(r["mode"] == m for r in kept)]
    if not modes:
        return None
    labels = {r["workload"]: sizes(r) for r in kept}
    figure = Figure(figsize=(10.5, 1.8 + 0.27 * len(labels)))
    panels = figure.subplots(1, len(modes), sharey=True, sharex=True, squeeze=False)[0]
    places = {w: i for i, w in enumerate(labels)}
    for axes, mode in zip(panels, modes):
        for name, style in _styles(kept).items():
            at = [(r["over_floor"], places[r["workload"]]) for r in kept if (r["provider"], r["mode"]) == (name, mode)]
            if at:
                axes.plot(*zip(*at), linestyle="none", label=name, **style)
        axes.set_title(mode, loc="left")
        axes.set_xlabel("time / floor (1 = the floor)")
        axes.axvline(1, color="black", linewidth=1)
    every = [r["over_floor"] for r in kept if r["mode"] in modes]
    _log_times(panels[0], min([0.9, *every]) / 1.1, max([4, *every]) * 1.15)
    _workloads(panels[0], labels)
    handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels())}
    title = f"Time over the floor set by rates of the same run ({_clock(rows)}), {rows[-1]['device']}"
    figure.suptitle(title, x=0.02, ha="left")
    figure.tight_layout()
    figure.legend(handles.values(), handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(len(handles), 6))
    return figure


def batch(rows: list[Row]) -> Figure | None:
    """Time per entry: flat once the device is full."""
    kept = timed(rows, "batch")
    return _sweep(
        kept, "B", lambda r: time_us(r) / r["B"], lambda r: r["floor_us"] / r["B"], "batch B",
        "microseconds per batch entry", f"Batch sweep ({_clock(rows)})",
    )  # fmt: skip


def memory(rows: list[Row]) -> Figure | None:
    kept = [r for r in timed(rows, "memory") if r["peak_mib"]]
    label = "MiB beyond the inputs"
    return _sweep(kept, "N", lambda r: r["peak_mib"], None, "keys N", label, "Peak memory over N")


def _sweep(
    kept: list[Row],
    along: str,
    value: Callable[[Row], float],
    floor: Callable[[Row], float] | None,
    xlabel: str,
    ylabel: str,
    title: str,
) -> Figure | None:
    """One panel a mode: value(row) over row[along], a line a contender, and the floor."""
    modes = [m for m in MODES if any(r["mode"] == m for r in kept)]
    if not modes:
        return None
    figure = Figure(figsize=(5.0 * len(modes) + 1.4, 4.2))
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes):
        of_mode = sorted((r for r in kept if r["mode"] == mode), key=lambda r: r[along])
        for name, style in _styles(kept).items():
            at = [(r[along], value(r)) for r in of_mode if r["provider"] == name]
            if at:
                axes.plot(*zip(*at), label=name, linewidth=1.3, **style)
        if floor:
            least = sorted({r[along]: floor(r) for r in of_mode}.items())
            axes.plot(*zip(*least), "--", color="#555555", linewidth=1.2, label="floor")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({r[along] for r in of_mode})))
        axes.xaxis.set_major_formatter(FuncFormatter(_power))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(xlabel)
        axes.set_title(mode, loc="left")
    panels[0].set_ylabel(ylabel)
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    one = kept[0]
    fixed = " x ".join(n if n == along else f"{int(one[n])}" for n in ("B", "Hq", "M", "N", "D"))
    figure.suptitle(f"{title}, {fixed} (B x H x M x N x D), {one['device']}", x=0.02, ha="left")
    figure.tight_layout()
    return figure


def _tall(entries: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.5, 1.8 + 0.27 * entries))
    return figure, figure.subplots()


def _workloads(axes: Axes, labels: dict[str, str]) -> None:
    """One line a workload, the first at the top: its name and sizes."""
    axes.set_yticks(range(len(labels)), [f"{name}   {of}" for name, of in labels.items()], fontsize=8.5)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    head = "workload   B x Hq / Hk x M x N x D  "
    axes.text(0, 1.005, head, transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5, style="italic")


def _log_times(axes: Axes, low: float, high: float) -> None:
    """A logarithmic x axis with ticks that read as factors."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    steps = (1,) if high / low > 1000 else (1, 2, 5) if high / low > 8 else (1, 1.5, 2, 3, 5, 7)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _styles(rows: Sequence[Row]) -> dict[str, dict]:
    """Colour and mark of each contender; ours last, so that it lies on top, and small, so that it hides nobody."""
    peers = [p for p in dict.fromkeys(r["provider"] for r in rows) if p != "ours"]
    styles = {
        p: dict(marker=MARKS[i % len(MARKS)], color=OTHERS[i % len(OTHERS)], markersize=7, alpha=0.75)
        for i, p in enumerate(peers)
    }
    return styles | {"ours": dict(marker="o", color=OURS, markersize=5.5)}


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _clock(rows: Sequence[Row]) -> str:
    return "device time, cold L2" if any(r["cold_p50_us"] for r in rows) else "wall time"


def _power(x: float, _: object) -> str:
    """65536 as 64k."""
    return f"{x / 2**20:g}M" if x >= 2**20 else f"{x / 2**10:g}k" if x >= 2**10 else f"{x:g}"
