"""Who sees what, cut into parts that are worth a call of their own: the schedule of this backend.

A part is a batch slice and a run of queries with the keys that hold all they see, so hidden ranges cost no time and no
mask is larger than two tiles.

Letters: B batch, Hq query heads, Hk key heads, M queries, N keys, D head size; b, m, n those of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossattn_kernels.problem import Inputs, Options

TILE = 2**20  # logits in one tile, all heads together
KEYS = 1024  # keys in one tile
# PyTorch's flash kernel, as measured
PART = 2**16  # logits that take it as long as a call takes besides
ROWS, BLOCK = 128, 256  # queries from which on it is fast, forward and backward

Rows = NDArray[np.integer[Any]]  # one number a query


def finite(t: Tensor) -> bool:
    """A sum is finite only if all its terms are; the converse may fail, which costs time and nothing else."""
    return math.isfinite(t.sum(dtype=wide(t)).item())


def wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class Call:
    """One call: its tensors, its options and the rows that the mask leaves empty and `empty_rows` fills."""

    x: Inputs
    options: Options
    filled: Tensor | None  # bool (1|B, 1|Hq, M)

    @cached_property
    def finite(self) -> bool:
        """True only if all of q, k and v is finite."""
        return finite(self.x.q) and finite(self.x.k) and finite(self.x.v)

    @property
    def by_range(self) -> bool:
        """True if nothing but ranges hides keys."""
        return self.x.keys is None and self.x.visible is None and self.x.bias is None


class Part(NamedTuple):
    """Queries `rows` of batch entries `batch`, and `keys`, which hold all that they see.

    kind: "whole", each query sees each key; "causal", the i-th query sees the first i keys; "masked", the mask knows.
    """

    batch: slice
    rows: slice
    keys: slice
    kind: str


def parts(call: Call, backward: bool = False) -> Iterator[Part]:
    """Parts that cover every query; in the backward, entries that share a tensor stay apart and sum its gradient."""
    x = call.x
    B, Hq, M, N = x.sizes
    if not B * Hq * M:
        return
    apart = backward and 1 in (x.q.shape[0], x.k.shape[0])
    if x.start is x.end is None or x.q.device.type != "cpu":  # elsewhere, to read the ranges would wait for the device
        kind = "whole" if call.by_range and x.start is x.end is None else "masked"
        for batch in steps(slice(0, B), 1 if apart else B):
            yield from _bounded(x, Part(batch, slice(0, M), slice(0, N), kind))
        return
    varies = any(t is not None and t.shape[0] > 1 for t in (x.start, x.end, call.filled))
    # entries too small to be worth a part of their own stay together
    for batch in steps(slice(0, B), 1 if apart else max(1, PART // (Hq * M * max(1, N))) if varies else B):
        start, end, agree = _ranges(call, batch)
        heads, alike = Hq * (batch.stop - batch.start), call.by_range and agree
        # PyTorch's kernel multiplies the -inf of a causal part by the scale; 16-bit gradients are exact in short parts
        # only, see `flash.exact`
        causal = alike and np.float32(call.options.scale) > 0 and not (backward and x.q.dtype.itemsize == 2)
        stairs = _stairs(start, end) if causal else []
        first = 0
        for top, bottom in (*stairs, (M, M)):
            if first < top:
                for run in _runs(start[first:top], end[first:top], heads, alike, BLOCK if backward else ROWS):
                    rows = slice(first + run.rows.start, first + run.rows.stop)
                    yield from _bounded(x, run._replace(batch=batch, rows=rows))
            if top < bottom:
                yield Part(batch, slice(top, bottom), slice(int(start[top]), int(end[bottom - 1])), "causal")
            first = bottom


def trimmed(x: Inputs) -> Inputs:
    """What `keys` hides before the first key that an entry sees, and after the last, is hidden by ranges instead.

    Without holes between them that is all, and `keys` is done with.
    """
    if x.keys is None or x.keys.device.type != "cpu":  # elsewhere, to read them would wait for the device
        return x
    seen, N = x.keys.numpy(), x.sizes[3]
    if not seen.size:
        return x
    count = seen.sum(1)  # (1|B,)
    bounds = np.stack((np.where(count, seen.argmax(1), N), np.where(count, N - seen[:, ::-1].argmax(1), 0)))
    holes = not np.array_equal(count, (bounds[1] - bounds[0]).clip(0))
    if (bounds == bounds[:, :1]).all():
        bounds = bounds[:, :1]  # entries with one range stay together
    start, end = torch.from_numpy(bounds.astype(np.int32))[..., None, None]
    return x._replace(
        start=start if x.start is None else torch.maximum(x.start, start),
        end=end if x.end is None else torch.minimum(x.end, end),
        keys=x.keys if holes else None,
    )


def _ranges(call: Call, batch: slice) -> tuple[Rows, Rows, bool]:
    """(first, last + 1) key of every query, (M,), over all heads of these entries; True if heads and entries agree."""
    x = call.x
    _, _, M, N = x.sizes
    start = np.zeros((1, 1, 1), np.int32) if x.start is None else of(x.start, batch).numpy().clip(0)
    end = np.full((1, 1, 1), N, np.int32) if x.end is None else of(x.end, batch).numpy().clip(None, N)
    empty = start >= end
    start, end = np.where(empty, N, start), np.where(empty, 0, end)
    if call.filled is not None:
        filled = of(call.filled, batch).numpy()
        start, end = np.where(filled, 0, start), np.where(filled, N, end)
    agree = start.shape[:2] == (1, 1)
    return np.broadcast_to(start.min((0, 1)), M), np.broadcast_to(end.max((0, 1)), M), agree


def _stairs(start: Rows, end: Rows) -> list[tuple[int, int]]:
    """(first, last + 1) of long stretches of queries that see one key, then two, and so on."""
    first, last = _stretches((np.diff(start) != 0) | (np.diff(end) != 1))
    long = (last - first >= ROWS) & (end[first] == start[first] + 1)
    return list(zip(first[long].tolist(), last[long].tolist()))


def _stretches(change: NDArray[np.bool_]) -> tuple[Rows, Rows]:
    """(first, last + 1) of the stretches of queries between changes; change: (M - 1,), True before a new one."""
    bounds = np.concatenate(([0], change.nonzero()[0] + 1, [change.size + 1]))
    return bounds[:-1], bounds[1:]


def _runs(start: Rows, end: Rows, heads: int, alike: bool, rows: int, step: int = 16) -> Iterator[Part]:
    """Neighbouring queries, joined while little of what they and their keys span is hidden, or they are few.

    start, end: (M,), M > 0; heads: of all entries; alike: all of them have the same ranges and nothing else is hidden;
    rows: from how many on they are not few; step: so many that each change their range are looked at together.
    """
    (first, last, low, high, seen), *others = _groups(start, end, step)

    def plain() -> bool:
        return alike and seen == (last - first) * max(0, high - low)

    def run() -> Part:
        return Part(slice(0), slice(first, last), slice(low, max(low, high)), "whole" if plain() else "masked")

    for row, stop, row_low, row_high, own in others:
        joint_low, joint_high = min(low, row_low), max(high, row_high)
        hidden = (stop - first) * max(0, joint_high - joint_low) - seen - own
        allowed = max(PART if stop - first > rows else 8 * PART, (seen + own) * heads // 8)
        long = alike and max(stop - row, last - first if plain() else 0) >= ROWS
        if hidden and (long or hidden * heads > allowed):
            yield run()
            first, low, high, seen = row, row_low, row_high, own
        else:
            low, high, seen = joint_low, joint_high, seen + own
        last = stop
    yield run()


def _groups(start: Rows, end: Rows, step: int) -> list[tuple[int, int, int, int, int]]:
    """(first, last + 1, least start, largest end, keys seen by all of them) of neighbours with one range.

    Ranges that fewer than `step` queries share are taken together with others of the same `step` queries.
    """
    first, last = _stretches((np.diff(start) != 0) | (np.diff(end) != 0))
    start, end, length, block = start[first], end[first], last - first, first // step
    long = length >= step
    at, _ = _stretches(long[1:] | long[:-1] | (np.diff(block) != 0))
    seen = np.add.reduceat(length * (end - start).clip(0), at)
    first = first[at]
    last = np.append(first[1:], last[-1])
    columns = first, last, np.minimum.reduceat(start, at), np.maximum.reduceat(end, at), seen
    return list(zip(*(column.tolist() for column in columns)))


def by_keys(call: Call, work: list[Part]) -> list[Part]:
    """Parts of the backward, those whose ranges move on from query to query cut along the keys instead.

    Gradients add up whichever way the logits are cut, and with few keys and many queries the flash kernel is faster
    and fewer sums are written.
    """
    x, found = call.x, list[Part]()
    for (batch, kind), same in groupby(work, lambda part: (part.batch, part.kind)):
        run = list(same)
        rows = slice(run[0].rows.start, run[-1].rows.stop)
        cut = _across(call, batch, rows) if kind == "masked" else []
        found += [piece for part in cut for piece in _bounded(x, part)] or run
    return found


def _across(call: Call, batch: slice, rows: slice) -> list[Part]:
    """Runs of keys with the queries `rows` that see them; none where that is not known to be as good."""
    x = call.x
    if not call.by_range or x.q.dtype.itemsize == 2 or not call.finite:
        return []
    start, end, agree = _ranges(call, batch)
    start, end = start[rows], end[rows]
    highest, empty = np.maximum.accumulate(end), start >= end
    start, end = np.where(empty, highest, start), np.where(empty, highest, end)  # no keys, but where others see some
    if not agree or (np.diff(start) < 0).any() or (np.diff(end) < 0).any():
        return []
    # in steps of what `_bounded` rounds to
    low = np.arange(start[0] // 16 * 16, end[-1], 16)
    first, last = np.searchsorted(end, low, "right"), np.searchsorted(start, low + 15, "right")
    heads = x.sizes[1] * (batch.stop - batch.start)
    return [
        Part(
            batch,
            slice(rows.start + run.keys.start, rows.start + run.keys.stop),
            slice(int(low[0]) + 16 * run.rows.start, min(int(end[-1]), int(low[0]) + 16 * run.rows.stop)),
            "masked",
        )
        for run in _runs(first, last, 16 * heads, False, ROWS // 16, step=1)
    ]


def steps(whole: slice, step: int) -> Iterator[slice]:
    for first in range(whole.start, whole.stop, step):
        yield slice(first, min(first + step, whole.stop))


def pieces(part: Part, entries: int, rows: int) -> Iterator[Part]:
    for batch in steps(part.batch, entries):
        for some in steps(part.rows, rows):
            yield part._replace(batch=batch, rows=some)


def size(part: Part) -> tuple[int, int, int]:
    """(b, m, n)."""
    return (part.batch.stop - part.batch.start, part.rows.stop - part.rows.start, part.keys.stop - part.keys.start)


def _bounded(x: Inputs, part: Part) -> Iterator[Part]:
    """A part cut so that its mask is at most two tiles."""
    b, m, n = size(part)
    by_row = [t for t in (x.start, x.end, x.visible, x.bias) if t is not None]
    if part.kind == "masked" and by_row and n:
        low, high = part.keys.start // 16 * 16, -(-part.keys.stop // 16) * 16  # matrix products like multiples of 16
        part = part._replace(keys=slice(low, min(high, x.sizes[3])))
        entries = max(t.shape[0] for t in (*by_row, x.keys) if t is not None)
        masks = min(b, entries) * max(t.shape[1] for t in by_row)
        m = max(1, min(m, 2 * TILE // (masks * size(part)[2])))
    yield from pieces(part, b, m)


def small(x: Inputs, part: Part) -> Iterator[Part]:
    """A part cut into pieces whose logits fill one tile."""
    b, _, n = size(part)
    row = x.sizes[1] * min(KEYS, max(1, n))
    entries = min(b, max(1, TILE // (16 * row)))
    yield from pieces(part, entries, max(16, TILE // (row * entries)))


def filled_rows(x: Inputs, options: Options) -> Tensor | None:
    """Bool (1|B, 1|Hq, M): rows that the mask leaves empty, if `empty_rows` asks to fill them."""
    if options.empty_rows == "zero" or options.mask(x).is_trivial():
        return None
    call = Call(x, options, None)
    _, _, M, N = x.sizes
    batch, heads = options.mask(x).lead()
    seen = torch.zeros(batch, heads, M, dtype=torch.bool, device=x.q.device)
    for rows in steps(slice(0, M), max(1, TILE // max(1, batch * heads * min(N, KEYS)))):
        for keys in steps(slice(0, N), KEYS):
            tile = visible(call, Part(slice(0, batch), rows, keys, "masked"))
            assert tile is not None
            seen[:, :, rows] |= tile.any(-1)
    return ~seen


def few_rows(call: Call, part: Part, least: int) -> list[Part]:
    """Those of a part's queries that see some keys, but fewer than `least`, with what lies closely between them."""
    x, (_, m, n) = call.x, size(part)
    if part.kind == "whole":
        return []
    if call.by_range:
        zero = torch.zeros(1, 1, 1, dtype=torch.int32, device="cpu")
        start = zero if x.start is None else of(x.start, part.batch, part.rows)
        end = torch.full_like(start, x.sizes[3]) if x.end is None else of(x.end, part.batch, part.rows)
        start, end = start.clamp(min=0), end.clamp(max=x.sizes[3])
        count = (end - start).expand(-1, -1, m)
    else:
        seen = visible(call, part)
        if x.bias is not None:
            shown = of_bias(x.bias, part) > -math.inf
            seen = shown if seen is None else seen & shown
        assert seen is not None
        count = seen.expand(*seen.shape[:3], n).sum(-1).expand(-1, -1, m)
    stretches: list[slice] = []
    for row in ((count > 0) & (count < least)).flatten(0, 1).any(0).nonzero().flatten().tolist():
        near = bool(stretches) and row - stretches[-1].stop < ROWS
        stretches.append(slice(stretches.pop().start if near else row, row + 1))

    def keys_of(rows: slice) -> slice:
        if not call.by_range or call.filled is not None:
            return part.keys
        some = count[:, :, rows] > 0
        low, high = (t.expand(-1, -1, m)[:, :, rows].expand_as(some)[some] for t in (start, end))
        return slice(max(part.keys.start, int(low.min())), min(part.keys.stop, int(high.max())))

    at = part.rows.start
    return [Part(part.batch, slice(at + s.start, at + s.stop), keys_of(s), "masked") for s in stretches]


def visible(call: Call, part: Part) -> Tensor | None:
    """Bool, broadcastable to (b, Hq, m, n); None when everything is visible."""
    x, device = call.x, call.x.q.device
    key = torch.arange(part.keys.start, part.keys.stop, device=device)
    terms = []
    if x.start is not None:
        terms.append(key >= of(x.start, part.batch, part.rows)[..., None])
    if x.end is not None:
        terms.append(key < of(x.end, part.batch, part.rows)[..., None])
    if x.keys is not None:
        terms.append(of(x.keys, part.batch)[:, part.keys][:, None, None])
    if x.visible is not None:
        bits = of(x.visible, part.batch)
        row = torch.arange(part.rows.start, part.rows.stop, device=device)
        bits = bits[:, :, row // call.options.query_group] if bits.shape[2] > 1 else bits
        terms.append(bits[..., key // call.options.key_group] if bits.shape[3] > 1 else bits)
    if not terms:
        return None
    seen = terms[0]
    for term in terms[1:]:
        seen = seen & term
    return seen if call.filled is None else seen | of(call.filled, part.batch, part.rows)[..., None]


def ranged(x: Inputs, part: Part, dtype: torch.dtype) -> Tensor:
    """What the ranges hide, as a mask to add, (1|b, 1|Hq, 1|m, n); keys that all see are not compared."""
    (_, _, n), low = size(part), part.keys.start
    start, end = (None if t is None else of(t, part.batch, part.rows)[..., None] for t in (x.start, x.end))
    shape = np.broadcast_shapes(*(t.shape for t in (start, end) if t is not None))
    mask = torch.zeros(*shape[:3], n, dtype=dtype, device="cpu")
    key = torch.arange(low, part.keys.stop, dtype=torch.int32, device="cpu")
    if start is not None:
        some = slice(0, max(0, int(start.max()) - low))
        mask[..., some].masked_fill_(key[some] < start, -math.inf)
    if end is not None:
        some = slice(max(0, int(end.min()) - low), n)
        mask[..., some].masked_fill_(key[some] >= end, -math.inf)
    return mask


def of(t: Tensor, batch: slice, rows: slice = slice(None)) -> Tensor:
    """A part of a tensor whose batch (and, from three dimensions on, its third) may be broadcast."""
    t = t[batch] if t.shape[0] > 1 else t
    return t[:, :, rows] if t.ndim > 2 and t.shape[2] > 1 else t


def of_bias(bias: Tensor, part: Part) -> Tensor:
    bias = of(bias, part.batch, part.rows)
    return bias[..., part.keys] if bias.shape[3] > 1 else bias


def queries(t: Tensor, part: Part) -> Tensor:
    """(b, Hq, m, D)."""
    t = of(t, part.batch)[:, :, part.rows]
    return t.expand(part.batch.stop - part.batch.start, -1, -1, -1)


def keys(t: Tensor, part: Part) -> Tensor:
    """(1|b, Hk, n, D)."""
    return of(t, part.batch)[:, :, part.keys]


def add(total: Tensor | None, part: Part, rows: slice, term: Tensor) -> None:
    """Add a part's gradient; an entry shared by the batch takes the sum."""
    if total is None:
        return
    total = total[:, :, rows]
    if total.shape[0] == 1:
        total += term if term.shape[0] == 1 else term.sum(0, keepdim=True, dtype=total.dtype)
    else:
        total[part.batch] += term
