"""Backend "torch": the same answer in bounded memory, on any device, forward and explicit backward.

The work is cut into parts: a batch slice and a run of queries with the range of keys that they share.  On the CPU a part
is one call of PyTorch's own flash kernel where that can do it, so hidden ranges cost no time; everything else goes
through the tile loop below, which is `reference.py` with an online softmax.  Memory: O(M + N) plus one tile.

Letters: B batch, Hq query heads, Hk key heads, M queries, N keys, D and Dv head sizes; m, n a tile of queries, of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from crossattn_kernels import dropout
from crossattn_kernels.problem import Inputs, Options

TILE = 2**20  # logits in one tile, all heads together
KEYS = 1024  # keys in one tile
FEW = 16  # fewer keys go backward through the tile loop, which is more exact there
FAR = -1e6  # an lse below this has lost digits that p needs
LONG_RUN = 16  # queries that share a range from this many on are a part of their own

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Gradients(NamedTuple):
    """One entry an input; None where it was not asked for."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None
    scale: Tensor | None = None


class Part(NamedTuple):
    """Queries `rows` of batch entries `batch` against `keys`; with `whole` every one of them sees every one of those."""

    batch: slice
    rows: slice
    keys: slice
    whole: bool


def forward(x: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, o, lse, state, free), as `ops.forward_op` documents; o is kept with any gate, state is not needed."""
    B, Hq, M, _ = x.sizes
    o = x.q.new_empty(B, M, Hq, x.v.shape[3]).transpose(1, 2)
    lse = x.q.new_empty(B, Hq, M, dtype=_wide(x.q))
    free = free_rows(x, options)
    for part in parts(x, options, free, copy_o=True):
        if _flash_can(x, options, free, part):
            _flash_forward(x, options, free, part, o, lse)
        else:
            for piece in _small(x, part):
                _tile_forward(x, options, free, piece, o, lse)
    none = x.q.new_empty(0)
    state, filled = lse.new_empty(0), none.bool() if free is None else free
    if x.gate is None:
        return o, none, lse, state, filled
    y = torch.empty_like(o).copy_(torch.tanh(x.gate.to(lse.dtype)) * o)
    return y, o, lse, state, filled


def backward(
    dy: Tensor,
    dlse: Tensor | None,
    x: Inputs,
    options: Options,
    o: Tensor,
    lse: Tensor,
    state: Tensor,
    free: Tensor | None,
    wanted: Gradients,
) -> Gradients:
    """Gradients of the inputs for which `wanted` holds something true; o is the ungated output."""
    wide, do, dgate = lse.dtype, dy, None
    if x.gate is not None:
        t = torch.tanh(x.gate.to(wide))
        do = (t * dy).to(dy.dtype)
        if wanted.gate:
            dgate = ((1 - t * t) * (dy.to(wide) * o).double().sum_to_size(t.shape)).to(x.gate.dtype)
    grads = Gradients(
        *(
            torch.zeros(t.shape, dtype=wide, device=t.device) if w else None
            for t, w in zip((x.q, x.k, x.v, x.bias), wanted)
        )
    )._replace(scale=torch.zeros(x.sizes[:3], dtype=wide, device=x.q.device) if wanted.scale else None)
    # flash makes p from lse, which cannot hold log N beside a bias of finfo.min
    by_flash = dlse is None and (
        x.bias is None or x.q.device.type != "cpu" or not (lse < FAR).logical_and(lse.isfinite()).any()
    )
    alone = next(iter(parts(x, options, free)), None) if by_flash else None
    if alone and _is_everything(alone, x) and _flash_can(x, options, free, alone, backward=True, wanted=wanted):
        dq, dk, dv = _flash_backward(x, options, free, alone, do, o, lse)
        return Gradients(dq, dk, dv, gate=dgate)
    for part in parts(x, options, free, apart=1 in (x.q.shape[0], x.k.shape[0])):
        if by_flash and _flash_can(x, options, free, part, backward=True, wanted=wanted):
            dq, dk, dv = _flash_backward(x, options, free, part, do, o, lse)
            _add(grads.q, part, part.rows, dq)
            _add(grads.k, part, part.keys, dk)
            _add(grads.v, part, part.keys, dv)
        else:
            for piece in _small(x, part):
                _tile_backward(x, options, free, piece, do, dlse, o, lse, grads)
    dscale = None if grads.scale is None else grads.scale.sum(2, dtype=torch.float64).sum_to_size(x.scale.shape)  # type: ignore[union-attr]
    given = Gradients(x.q, x.k, x.v, x.bias, x.gate, x.scale)
    grads = grads._replace(gate=dgate, scale=dscale)
    return Gradients(*(g if g is None else g.to(t.dtype) for g, t in zip(grads, given)))  # type: ignore[union-attr]


# ---- parts: who sees what ----


def parts(
    x: Inputs, options: Options, free: Tensor | None, apart: bool = False, copy_o: bool = False
) -> Iterator[Part]:
    """Parts that cover every query; `apart` keeps batch entries apart (so that shared tensors sum their gradients in place)."""
    B, Hq, M, N = x.sizes
    if not B * Hq * M:
        return
    ranged = x.start is not None or x.end is not None
    whole = x.keys is None and x.visible is None and x.bias is None
    if not ranged or x.q.device.type != "cpu":  # reading the ranges elsewhere would wait for the device
        for batch in _batches(x, apart):
            step = _rows_per_part(x, batch, whole and not ranged, copy_o)
            for first in range(0, M, step):
                yield Part(batch, slice(first, min(first + step, M)), slice(0, N), whole and not ranged)
        return
    varies = any(t is not None and t.shape[0] > 1 for t in (x.start, x.end, free))
    for batch in _batches(x, apart or varies):
        step = _rows_per_part(x, batch, False, copy_o)
        for rows, keys, shared in _runs(*_row_ranges(x, batch, free), step, whole):
            yield Part(batch, rows, keys, whole and shared)


def _is_everything(part: Part, x: Inputs) -> bool:
    B, _, M, N = x.sizes
    both = x.q.shape[0] == x.k.shape[0]
    return both and part.batch == slice(0, B) and part.rows == slice(0, M) and part.keys == slice(0, N)


def _batches(x: Inputs, apart: bool) -> Iterator[slice]:
    step = 1 if apart else x.sizes[0]
    for first in range(0, x.sizes[0], step):
        yield slice(first, min(first + step, x.sizes[0]))


def _rows_per_part(x: Inputs, batch: slice, whole: bool, copy_o: bool) -> int:
    """All queries at once, unless their mask would be large or their output has to be copied into its layout."""
    _, Hq, M, N = x.sizes
    b = batch.stop - batch.start
    by_row = [t for t in (x.start, x.end, x.visible, x.bias) if t is not None]
    if whole or not by_row:
        laid_out = x.q.stride(1) <= x.q.stride(2)  # then flash's own output has our layout
        return max(1, M if laid_out or not copy_o else max(256, 2**19 // max(1, b * Hq * x.v.shape[3])))
    masks = min(b, max(t.shape[0] for t in by_row)) * max(t.shape[1] for t in by_row)
    return max(1, min(M, 4 * TILE // max(1, masks * N)))


def _small(x: Inputs, part: Part) -> Iterator[Part]:
    """A part cut into pieces whose logits fill one tile."""
    heads, n = x.sizes[1], min(KEYS, max(1, part.keys.stop - part.keys.start))
    entries = max(1, TILE // (heads * 16 * n))
    for first in range(part.batch.start, part.batch.stop, entries):
        batch = slice(first, min(first + entries, part.batch.stop))
        rows = max(16, TILE // (heads * n * (batch.stop - batch.start)))
        for row in range(part.rows.start, part.rows.stop, rows):
            yield part._replace(batch=batch, rows=slice(row, min(row + rows, part.rows.stop)))


def _row_ranges(x: Inputs, batch: slice, free: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    """(first, last + 1) key of every query of this part's batch, over all heads; True if all heads and entries agree."""
    B, Hq, M, N = x.sizes
    start = torch.zeros(1, 1, 1, dtype=torch.int32) if x.start is None else _of(x.start, batch)
    end = torch.full((1, 1, 1), N, dtype=torch.int32) if x.end is None else _of(x.end, batch).clamp(max=N)
    start, end = torch.broadcast_tensors(start, end)
    empty = start >= end
    start, end = start.masked_fill(empty, N), end.masked_fill(empty, 0)
    if free is not None:
        start, end = start.masked_fill(_of(free, batch), 0), end.masked_fill(_of(free, batch), N)
    agree = start.shape[:2] == (1, 1)
    return start.amin((0, 1)).expand(M), end.amax((0, 1)).expand(M), agree


def _runs(start: Tensor, end: Tensor, agree: bool, step: int, whole: bool) -> Iterator[tuple[slice, slice, bool]]:
    """(queries, keys, shared): long runs of one range stand alone, short ones are gathered into tiles of `step`."""
    ranges, lengths = torch.unique_consecutive(torch.stack((start, end), 1), dim=0, return_counts=True)
    pending: tuple[int, int, int, int] | None = None  # first query, last + 1, first key, last + 1
    row = 0
    for (lo, hi), length in zip(ranges.tolist(), lengths.tolist()):
        if length >= LONG_RUN:
            if pending:
                yield _gathered(pending)
                pending = None
            for first in range(row, row + length, length if whole and agree else step):
                last = min(first + (length if whole and agree else step), row + length)
                yield slice(first, last), slice(lo, max(lo, hi)), agree
        else:
            if pending and row + length - pending[0] > step:
                yield _gathered(pending)
                pending = None
            first, _, low, high = pending or (row, row, lo, hi)
            pending = (first, row + length, min(low, lo), max(high, hi))
        row += length
    if pending:
        yield _gathered(pending)


def _gathered(pending: tuple[int, int, int, int]) -> tuple[slice, slice, bool]:
    first, last, lo, hi = pending
    return slice(first, last), slice(lo, max(lo, hi)), False


def free_rows(x: Inputs, options: Options) -> Tensor | None:
    """Bool (1|B, 1|Hq, M): rows that the mask leaves empty, if `empty_rows` asks to fill them."""
    if options.empty_rows == "zero" or options.mask(x).is_trivial():
        return None
    _, _, M, N = x.sizes
    lead = options.mask(x).lead()
    seen = torch.zeros(lead[0], lead[1], M, dtype=torch.bool, device=x.q.device)
    rows = max(1, TILE // max(1, lead[0] * lead[1] * min(N, KEYS)))
    for first in range(0, M, rows):
        for low in range(0, N, KEYS):
            part = Part(slice(0, lead[0]), slice(first, min(first + rows, M)), slice(low, min(low + KEYS, N)), False)
            tile = _visible(x, options, None, part)
            assert tile is not None
            seen[:, :, part.rows] |= tile.any(-1)
    return ~seen


def _visible(x: Inputs, options: Options, free: Tensor | None, part: Part) -> Tensor | None:
    """Bool, broadcastable to (b, Hq, m, n); None when everything is visible."""
    device = x.q.device
    key = torch.arange(part.keys.start, part.keys.stop, device=device)
    row = torch.arange(part.rows.start, part.rows.stop, device=device)
    terms = []
    if x.start is not None:
        terms.append(key >= _of(x.start, part.batch, part.rows)[..., None])
    if x.end is not None:
        terms.append(key < _of(x.end, part.batch, part.rows)[..., None])
    if x.keys is not None:
        terms.append(_of(x.keys, part.batch)[:, part.keys][:, None, None])
    if x.visible is not None:
        bits = _of(x.visible, part.batch)
        bits = bits[:, :, row // options.query_group] if bits.shape[2] > 1 else bits
        terms.append(bits[..., key // options.key_group] if bits.shape[3] > 1 else bits)
    if not terms:
        return None
    seen = terms[0]
    for term in terms[1:]:
        seen = seen & term
    return seen if free is None else seen | _of(free, part.batch, part.rows)[..., None]


def _of(t: Tensor, batch: slice, rows: slice = slice(None)) -> Tensor:
    """A part of a tensor whose batch (and, from three dimensions on, its third) may be broadcast."""
    t = t[batch] if t.shape[0] > 1 else t
    return t[:, :, rows] if t.ndim > 2 and t.shape[2] > 1 else t


def _of_bias(bias: Tensor, part: Part) -> Tensor:
    bias = _of(bias, part.batch, part.rows)
    return bias[..., part.keys] if bias.shape[3] > 1 else bias


def _add(total: Tensor | None, part: Part, rows: slice, term: Tensor) -> None:
    """Add a part's gradient; an entry shared by the batch takes the sum."""
    if total is None:
        return
    total = total[:, :, rows]
    if total.shape[0] == 1:
        total += term.sum(0, keepdim=True, dtype=total.dtype)
    else:
        total[part.batch] += term


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


# ---- PyTorch's CPU flash kernel ----


def _flash_can(
    x: Inputs,
    options: Options,
    free: Tensor | None,
    part: Part,
    backward: bool = False,
    wanted: Gradients | None = None,
) -> bool:
    if (
        x.q.device.type != "cpu"
        or x.q.shape[3] != x.v.shape[3]
        or options.softcap
        or options.dropout_p
        or x.scale is not None
    ):
        return False
    if part.keys.stop - part.keys.start < (FEW if backward else 1) or (backward and wanted is not None and wanted.bias):
        return False
    if free is not None and options.empty_rows == "uniform" and bool(_of(free, part.batch, part.rows).any()):
        return False
    # the flash kernel multiplies hidden values by 0, which a NaN survives
    return part.whole or bool(torch.isfinite(_keys(x.k, part)).all() and torch.isfinite(_keys(x.v, part)).all())


def _flash_operands(x: Inputs, part: Part) -> list[Tensor]:
    n = part.batch.stop - part.batch.start
    tensors = (_of(x.q, part.batch)[:, :, part.rows], _keys(x.k, part), _keys(x.v, part))
    return [(t if t.stride(3) == 1 else t.contiguous()).expand(n, -1, -1, -1) for t in tensors]


def _keys(t: Tensor, part: Part) -> Tensor:
    return _of(t, part.batch)[:, :, part.keys]


def _flash_mask(x: Inputs, options: Options, free: Tensor | None, part: Part) -> Tensor | None:
    """The additive mask of a part, broadcastable to (b, Hq, m, n); the kernel takes it in q's dtype or in fp32."""
    if part.whole:
        return None
    seen = _visible(x, options, free, part)
    dtype = torch.float32 if x.q.dtype.itemsize == 2 else x.q.dtype
    shown = torch.zeros((), dtype=dtype) if x.bias is None else _of_bias(x.bias, part).to(dtype)
    return shown if seen is None else torch.where(seen, shown, -math.inf)


def _flash_forward(x: Inputs, options: Options, free: Tensor | None, part: Part, o: Tensor, lse: Tensor) -> None:
    mask = _flash_mask(x, options, free, part)
    o_part, lse_part = flash(*_flash_operands(x, part), attn_mask=mask, scale=options.scale)
    o[part.batch, :, part.rows] = o_part
    if mask is not None:
        lse_part = lse_part.masked_fill((mask == -math.inf).all(-1), -math.inf)
    lse[part.batch, :, part.rows] = lse_part


def _flash_backward(
    x: Inputs, options: Options, free: Tensor | None, part: Part, do: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    at = (part.batch, slice(None), part.rows)
    lse = lse[at].masked_fill(lse[at] == -math.inf, 0)
    mask = _flash_mask(x, options, free, part)
    return flash_backward(
        do[at], *_flash_operands(x, part), o[at], lse, 0.0, False, attn_mask=mask, scale=options.scale
    )


# ---- the tile loop ----


class Tile(NamedTuple):
    """One tile of logits: s with hidden entries -inf; slope = ds/d(scale qkᵀ), None without a softcap; (b, Hq, m, n)."""

    part: Part
    s: Tensor
    slope: Tensor | None
    k: Tensor
    v: Tensor


def _tiles(x: Inputs, options: Options, free: Tensor | None, part: Part, q: Tensor) -> Iterator[Tile]:
    for first in range(part.keys.start, part.keys.stop, KEYS):
        at = part._replace(keys=slice(first, min(first + KEYS, part.keys.stop)))
        k, v = (_keys(t, at).to(q.dtype) for t in (x.k, x.v))
        s, slope = _product(q, k.mT) * _scale(x, options, part.batch), None
        if options.softcap:
            s = torch.tanh(s / options.softcap)
            slope, s = 1 - s * s, options.softcap * s
        bias = None if x.bias is None else _of_bias(x.bias, at).to(s.dtype)
        seen = None if part.whole else _visible(x, options, free, at)
        if bias is not None:
            s = s + bias
            seen = (bias > -math.inf) if seen is None else seen & (bias != -math.inf)
        if seen is not None:
            # a value that is not finite reaches the queries that see it through their logits, and nobody else
            s = s + (v * 0).sum(-1)[:, :, None].repeat_interleave(s.shape[1] // v.shape[1], 1)
            k, v = (torch.where(t.isfinite(), t, 0) for t in (k, v))
            s = torch.where(seen, s, -math.inf)
        if free is not None and options.empty_rows == "uniform":
            s = torch.where(_of(free, part.batch, part.rows)[..., None], 0.0, s)
        yield Tile(at, s, slope, k, v)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(b, Hq, m, r) x (b, Hk, r, n), the heads of a group sharing their right side: (b, Hq, m, n)."""
    heads = b.shape[1]
    packed = a.unflatten(1, (heads, -1)).flatten(2, 3) if heads else a
    return (packed @ b).unflatten(2, (-1, a.shape[2])).flatten(1, 2)


def _transposed_product(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """Sum over queries and over the heads of a group: (b, Hq, m, n)ᵀ x (b, Hq, m, r) -> (b, Hk, n, r)."""
    a, b = (t.unflatten(1, (heads, -1)).flatten(2, 3) for t in (a, b))
    return a.mT @ b


def _scale(x: Inputs, options: Options, batch: slice) -> float | Tensor:
    return options.scale if x.scale is None else _of(x.scale, batch)[..., None, None].to(_wide(x.q))


def _dropped(x: Inputs, options: Options, at: Part, p: Tensor) -> Tensor:
    """p with its dropped entries 0 and the kept ones raised by 1 / (1 - dropout_p)."""
    if not options.dropout_p:
        return p
    assert x.seed is not None
    device = p.device
    batch, rows, keys = (torch.arange(s.start, s.stop, device=device) for s in (at.batch, at.rows, at.keys))
    head = torch.arange(p.shape[1], device=device)
    index = batch[:, None, None, None], head[:, None, None], rows[:, None], keys + options.first_key
    return torch.where(dropout.keep(x.seed, options.dropout_p, *index), p / (1 - options.dropout_p), 0)


def _tile_forward(x: Inputs, options: Options, free: Tensor | None, part: Part, o: Tensor, lse: Tensor) -> None:
    at = (part.batch, slice(None), part.rows)
    wide = lse.dtype
    q = _of(x.q, part.batch)[:, :, part.rows].to(wide).expand(part.batch.stop - part.batch.start, -1, -1, -1)
    if 0 < part.keys.stop - part.keys.start <= KEYS:
        tile = next(_tiles(x, options, free, part, q))
        p = tile.s.softmax(-1).masked_fill(tile.s == -math.inf, 0)
        o[at] = _product(_dropped(x, options, part, p), tile.v).to(o.dtype)
        lse[at] = tile.s.logsumexp(-1)
        return
    high = torch.full(lse[at].shape, -math.inf, dtype=wide, device=q.device)
    total, acc = torch.zeros_like(high), torch.zeros(o[at].shape, dtype=wide, device=q.device)
    for tile in _tiles(x, options, free, part, q):
        new = torch.maximum(high, tile.s.amax(-1))
        pivot = new.masked_fill(new == -math.inf, 0)
        alpha = torch.exp(high - pivot)
        p = torch.exp(tile.s - pivot[..., None])
        total = total * alpha + p.sum(-1)
        acc = acc * alpha[..., None] + _product(_dropped(x, options, tile.part, p), tile.v)
        high = new
    total = total.masked_fill(total == 0, 1)
    o[at] = (acc / total[..., None]).to(o.dtype)
    lse[at] = high + torch.log(total)


def _row_state(x: Inputs, options: Options, free: Tensor | None, part: Part, q: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum of the logits, 1 / sum of exp(s - maximum)), (b, Hq, m, 1): holds what lse rounds away."""
    high = torch.full((*q.shape[:3], 1), -math.inf, dtype=q.dtype, device=q.device)
    total = torch.zeros_like(high)
    for tile in _tiles(x, options, free, part, q):
        new = torch.maximum(high, tile.s.amax(-1, keepdim=True))
        pivot = new.masked_fill(new == -math.inf, 0)
        total = total * torch.exp(high - pivot) + torch.exp(tile.s - pivot).sum(-1, keepdim=True)
        high = new
    return high, 1 / total.masked_fill(total == 0, 1)


def _tile_backward(
    x: Inputs,
    options: Options,
    free: Tensor | None,
    part: Part,
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    grads: Gradients,
) -> None:
    at = (part.batch, slice(None), part.rows)
    wide, heads = lse.dtype, x.k.shape[1]
    q = _of(x.q, part.batch)[:, :, part.rows].to(wide).expand(part.batch.stop - part.batch.start, -1, -1, -1)
    do = do[at].to(wide)
    # keys that fit one tile give p and delta afresh, which is exact where a row sees a single key
    alone = part.keys.stop - part.keys.start <= KEYS and not options.chunk
    pivot, inverse = lse[at][..., None], 1
    if not alone and x.bias is not None and not options.chunk:
        pivot, inverse = _row_state(x, options, free, part, q)
    pivot = pivot.masked_fill(pivot == -math.inf, 0)
    scale = _scale(x, options, part.batch)
    dq = torch.zeros_like(q)
    for tile in _tiles(x, options, free, part, q):
        hidden = tile.s == -math.inf
        p = tile.s.softmax(-1) if alone else torch.exp(tile.s - pivot) * inverse
        p = p.masked_fill(hidden, 0)
        kept = _dropped(x, options, tile.part, p)
        dp = _dropped(x, options, tile.part, _product(do, tile.v.mT)).masked_fill(hidden, 0)
        delta = (p * dp if alone else do.double() * o[at]).sum(-1, keepdim=True).to(wide)
        ds = dp - delta  # 0 to the bit where a row sees a single key
        ds = (p * (ds if dlse is None else ds + dlse[at][..., None])).masked_fill(hidden, 0)
        _add(grads.v, tile.part, tile.part.keys, _transposed_product(kept, do, heads))
        if free is not None and options.empty_rows == "uniform":
            ds = ds.masked_fill(_of(free, part.batch, part.rows)[..., None], 0)
        if grads.bias is not None:
            total = _of_bias(grads.bias, tile.part)
            total += ds.sum_to_size(total.shape)
        if tile.slope is not None:
            ds = ds * tile.slope
        dq += _product(ds, tile.k)  # without the scale
        _add(grads.k, tile.part, tile.part.keys, _transposed_product(ds * scale, q, heads))
    if grads.scale is not None:
        grads.scale[at] += (dq * q).sum(-1)
    _add(grads.q, part, part.rows, dq * scale)
