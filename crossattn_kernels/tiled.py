"""Backend "torch": the same answer in bounded memory, on any device, forward and explicit backward.

The work is cut into parts: a batch slice and a run of queries with the range of keys that they share.  On the CPU a
part is one call of PyTorch's own flash kernel where that can do it, so hidden ranges cost no time; everything else goes
through the tile loop below, which is `reference.py` with an online softmax.  Memory: O(M + N) plus one tile.

Letters: B batch, Hq query heads, Hk key heads, M queries, N keys, D and Dv head sizes; b, m, n those of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crossattn_kernels import dropout
from crossattn_kernels.parts import (
    BLOCK,
    KEYS,
    Call,
    Part,
    by_keys,
    few_rows,
    finite,
    free_rows,
    keys,
    of,
    of_bias,
    parts,
    pieces,
    queries,
    ranged,
    size,
    small,
    steps,
    visible,
    wide,
)
from crossattn_kernels.problem import Inputs, Options

FEW = 16  # the flash kernel's gradients of a query that sees fewer keys are less exact than those of the tile loop
RESULT = 2**21  # elements of a result that is still in the cache when it is copied
READS = 1024  # times that a key is read for which to copy it first is no loss
FAR = -1e6  # an lse below this has lost digits that p needs

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


def forward(x: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, o, lse, state, free), as `ops.forward_op` documents; o is kept with any gate, state is not needed."""
    call = Call(x, options, free_rows(x, options))
    o, lse = _attend(call)
    none, state = x.q.new_empty(0), lse.new_empty(0)
    free = none.bool() if call.free is None else call.free
    if x.gate is None:
        return o, none, lse, state, free
    y = torch.empty_like(o).copy_(torch.tanh(x.gate.to(lse.dtype)) * o)
    return y, o, lse, state, free


def _attend(call: Call) -> tuple[Tensor, Tensor]:
    """(o, lse): (B, Hq, M, Dv) laid out as (B, M, Hq, Dv), and (B, Hq, M)."""
    work = list(parts(call))
    call = replace(call, x=_by_head(call.x, work))
    x, (B, Hq, M, _) = call.x, call.x.sizes
    laid_out = x.q.stride(0) >= x.q.stride(2) >= x.q.stride(1)  # the kernel lays o out as q
    if len(work) == 1 and (laid_out or len(list(_cached(x, work[0]))) == 1) and _flash_can(call, work[0]):
        o, lse = _flash_forward(call, work[0])
        # a copy made now costs less than one into memory set aside before
        return o.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    o = x.q.new_empty(B, M, Hq, x.v.shape[3]).transpose(1, 2)
    lse = x.q.new_empty(B, Hq, M, dtype=wide(x.q))
    for part in work:
        if _flash_can(call, part):
            for piece in _cached(x, part):
                at = (piece.batch, slice(None), piece.rows)
                o[at], lse[at] = _flash_forward(call, piece)
        else:
            for piece in small(x, part):
                _tile_forward(call, piece, o, lse)
    return o, lse


def _by_head(x: Inputs, work: list[Part]) -> Inputs:
    """Keys and values of one head lie together, as the flash kernel likes them, if enough queries read each of them."""
    reads = sum(math.prod(size(part)) for part in work)
    if x.q.device.type != "cpu" or reads <= READS * x.sizes[0] * x.sizes[3]:
        return x
    return x._replace(k=x.k.contiguous(), v=x.v.contiguous())


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
    call, do, dgate = Call(x, options, free), dy, None
    if x.gate is not None:
        t = torch.tanh(x.gate.to(lse.dtype))
        do = (t * dy).to(dy.dtype)
        if wanted.gate:
            slope = 1 - torch.tanh(x.gate.double()) ** 2
            dgate = (slope * (dy.to(lse.dtype) * o).double().sum_to_size(t.shape)).to(x.gate.dtype)
    by_flash, by_tiles = _shared_out(call, lse, dlse is None and not wanted.bias)
    quiet = lse
    if by_flash and by_tiles:  # to the flash kernel, queries that the tile loop does have no p
        quiet = lse.clone()
        for part in by_tiles:
            quiet[part.batch, :, part.rows] = math.inf
    B, _, M, N = x.sizes
    if len(by_flash) == 1 and size(by_flash[0]) == (B, M, N):
        found = _flash_backward(call, by_flash[0], do, o, quiet)
        grads = Gradients(*((g.to(lse.dtype) if by_tiles else g) if w else None for g, w in zip(found, wanted)))
    else:
        grads = Gradients(*(_zeros(t, lse.dtype) if w else None for t, w in zip((x.q, x.k, x.v), wanted)))
        for part in by_flash:
            dq, dk, dv = _flash_backward(call, part, do, o, quiet)
            _add(grads.q, part, part.rows, dq)
            _add(grads.k, part, part.keys, dk)
            _add(grads.v, part, part.keys, dv)
    if wanted.bias:
        grads = grads._replace(bias=torch.zeros_like(x.bias, dtype=lse.dtype))  # type: ignore[arg-type]
    if wanted.scale:
        grads = grads._replace(scale=torch.zeros(x.sizes[:3], dtype=torch.float64, device=x.q.device))
    for part in by_tiles:
        for piece in small(x, part):
            _tile_backward(call, piece, do, dlse, o, lse, grads)
    dscale = None if grads.scale is None else grads.scale.sum(2).sum_to_size(x.scale.shape)  # type: ignore[union-attr]
    given = Gradients(x.q, x.k, x.v, x.bias, x.gate, x.scale)
    grads = grads._replace(gate=dgate, scale=dscale)
    return Gradients(*(g if g is None else g.to(t.dtype) for g, t in zip(grads, given)))  # type: ignore[union-attr]


def _shared_out(call: Call, lse: Tensor, may_flash: bool) -> tuple[list[Part], list[Part]]:
    """The parts of the backward that the flash kernel does, and those that the tile loop does."""
    may_flash = may_flash and not _absorbed(call.x, lse)
    by_flash: list[Part] = []
    by_tiles: list[Part] = []
    for part in parts(call, backward=True):
        if may_flash and _flash_can(call, part, FEW):
            by_flash += _exact(call.x, part)
            by_tiles += few_rows(call, part, FEW)
        else:
            by_tiles.append(part)
    return by_keys(call, by_flash), by_tiles


def _absorbed(x: Inputs, lse: Tensor) -> bool:
    """True if some lse cannot hold the log of its sum beside a bias of finfo.min; the flash kernel makes p from lse."""
    return x.bias is not None and lse.device.type == "cpu" and bool(((lse < FAR) & lse.isfinite()).any())


def _zeros(t: Tensor, dtype: torch.dtype) -> Tensor:
    """To sum a gradient in, laid out as the flash kernel's, (B, S, H, D)."""
    return torch.zeros_like(t.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def _add(total: Tensor | None, part: Part, rows: slice, term: Tensor) -> None:
    """Add a part's gradient; an entry shared by the batch takes the sum."""
    if total is None:
        return
    total = total[:, :, rows]
    if total.shape[0] == 1:
        total += term if term.shape[0] == 1 else term.sum(0, keepdim=True, dtype=total.dtype)
    else:
        total[part.batch] += term


# ---- PyTorch's CPU flash kernel ----


def _flash_can(call: Call, part: Part, least: int = 1) -> bool:
    """True if the flash kernel computes this part; `least`: so many keys it must have."""
    x, options = call.x, call.options
    if x.q.device.type != "cpu" or x.q.shape[3] != x.v.shape[3] or x.scale is not None:
        return False
    if options.softcap or options.dropout_p or size(part)[2] < least:
        return False
    if call.free is not None and options.empty_rows == "uniform" and of(call.free, part.batch, part.rows).any():
        return False
    # the kernel multiplies hidden values by 0, which a NaN survives
    return part.kind == "whole" or call.finite or (finite(keys(x.k, part)) and finite(keys(x.v, part)))


def _cached(x: Inputs, part: Part) -> Iterator[Part]:
    """A part cut into pieces whose output still lies in the cache when it is copied to where it belongs."""
    (_, m, _), width = size(part), x.q.shape[1] * x.v.shape[3]
    blocks = -(-m // (BLOCK * -(-width * m // RESULT)))
    yield from pieces(part, max(1, RESULT // (width * m)), m if part.kind == "causal" else BLOCK * max(3, blocks))


def _exact(x: Inputs, part: Part) -> Iterator[Part]:
    """A part cut so that 16-bit gradients, which the kernel sums in 16 bits from block to block, have few blocks."""
    if x.q.dtype.itemsize > 2:
        yield part
        return
    for piece in pieces(part, part.batch.stop, max(BLOCK, 8 * BLOCK * x.k.shape[1] // x.q.shape[1])):
        for some in steps(part.keys, 16 * BLOCK):
            yield piece._replace(keys=some)


def _flash_operands(call: Call, part: Part) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q (b, Hq, m, D), k and v (b, Hk, n, D) and the additive mask, broadcastable to (b, Hq, m, n)."""
    x, (b, _, _) = call.x, size(part)

    def apart(t: Tensor) -> bool:
        return all(n == 1 or s == 0 or s >= t.shape[3] for n, s in zip(t.shape[:3], t.stride()))

    tensors = (queries(x.q, part), keys(x.k, part), keys(x.v, part))
    # of rows that overlap, as `unfold` makes them, the kernel confuses the axes of o, and refuses some of 16 bits
    q, k, v = ((t if t.stride(3) == 1 and apart(t) else t.contiguous()).expand(b, -1, -1, -1) for t in tensors)
    if part.kind != "masked":
        return q, k, v, None
    # the kernel takes a mask in q's dtype or in fp32
    dtype = torch.float32 if x.q.dtype.itemsize == 2 else x.q.dtype
    if call.by_range and call.free is None:
        return q, k, v, ranged(x, part, dtype)
    seen = visible(call, part)
    shown = torch.zeros((), dtype=dtype) if x.bias is None else of_bias(x.bias, part).to(dtype)
    return q, k, v, shown if seen is None else torch.where(seen, shown, -math.inf)


def _flash_forward(call: Call, part: Part) -> tuple[Tensor, Tensor]:
    """(o, lse) of a part: (b, Hq, m, Dv), (b, Hq, m)."""
    (_, m, n), (q, k, v, mask) = size(part), _flash_operands(call, part)
    if part.kind == "whole" and n % 16 > 8 and n < min(m, 2 * BLOCK):
        # past the last multiple of 16 the kernel's exponentials are scalar, and hidden keys are cheaper
        k, v = (F.pad(t, (0, 0, 0, -n % 16)) for t in (k, v))
        mask = F.pad(q.new_zeros(1, 1, 1, n), (0, -n % 16), value=-math.inf)
    o, lse = flash(q, k, v, 0.0, part.kind == "causal", attn_mask=mask, scale=call.options.scale)
    if part.kind == "masked" and (lse == 0).any():  # what the kernel says of a row that sees nothing
        lse = lse.masked_fill((mask == -math.inf).all(-1), -math.inf)  # type: ignore[union-attr]
    return o, lse


def _flash_backward(call: Call, part: Part, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a part, laid out as (b, m, Hq, D) and (b, n, Hk, D)."""
    (q, k, v, mask), causal = _flash_operands(call, part), part.kind == "causal"
    at, group = (part.batch, slice(None), part.rows), q.shape[1] // k.shape[1]
    lse = lse[at].masked_fill(lse[at] == -math.inf, 0)
    by_query = (do[at], q, o[at], lse, mask)
    # over the heads of a group the kernel goes on adding to one sum, which loses digits of fp32: there one at a time
    steps = group if q.dtype == torch.float32 else 1

    def of_heads(first: int) -> tuple[Tensor, Tensor, Tensor]:
        some = [t if steps == 1 or t is None or t.shape[1] == 1 else t[:, first::steps] for t in by_query]
        do, q, o, lse, mask = some
        return flash_backward(do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=call.options.scale)

    dq, dk, dv = of_heads(0)
    if steps > 1:
        every = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        every[:, ::steps] = dq
        for first in range(1, steps):
            every[:, first::steps], dk_part, dv_part = of_heads(first)
            dk, dv = dk.add_(dk_part), dv.add_(dv_part)
        dq = every
    return dq, dk, dv


# ---- the tile loop ----


class Tile(NamedTuple):
    """Logits (b, Hq, m, n): s with hidden entries -inf; slope = ds/d(scale qkᵀ), None without a softcap."""

    part: Part
    s: Tensor
    slope: Tensor | None
    k: Tensor
    v: Tensor


def _tiles(call: Call, part: Part, q: Tensor, sloped: bool = False) -> Iterator[Tile]:
    x, options, free, device = call.x, call.options, call.free, call.x.q.device.type
    for first in range(part.keys.start, part.keys.stop, KEYS):
        at = part._replace(keys=slice(first, min(first + KEYS, part.keys.stop)))
        k, v = (keys(t, at).to(q.dtype) for t in (x.k, x.v))
        s, slope = _product(q, k.mT).mul_(_scale(call, part.batch)), None
        if options.softcap:
            s = s.div_(options.softcap).tanh_()
            slope, s = (s * s).neg_().add_(1) if sloped else None, s.mul_(options.softcap)
        bias = None if x.bias is None else of_bias(x.bias, at).to(s.dtype)
        seen = None if part.kind == "whole" else visible(call, at)
        if bias is not None:
            s += bias
            shown = bias != -math.inf  # NaN is shown
            seen = shown if seen is None else seen & shown
        if seen is not None:
            # a value that is not finite reaches the queries that see it through their logits, and nobody else
            if device != "cpu" or not (finite(k) and finite(v)):  # elsewhere to ask would wait
                s += (v * 0).sum(-1)[:, :, None].repeat_interleave(s.shape[1] // v.shape[1], 1)
                k, v = (torch.where(t.isfinite(), t, 0) for t in (k, v))
            hidden = ~seen
            s = s.masked_fill_(hidden, -math.inf)
            slope = None if slope is None else slope.masked_fill_(hidden, 0)
        if free is not None and options.empty_rows == "uniform":
            s = s.masked_fill_(of(free, part.batch, part.rows)[..., None], 0)
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


def _scale(call: Call, batch: slice) -> float | Tensor:
    scale = call.x.scale
    return call.options.scale if scale is None else of(scale, batch)[..., None, None].to(wide(call.x.q))


def _kept(call: Call, at: Part, p: Tensor) -> Tensor | None:
    """Bool, True where dropout keeps one of p, (b, Hq, m, n); None without dropout."""
    options, seed, device = call.options, call.x.seed, call.x.q.device
    if not options.dropout_p:
        return None
    assert seed is not None
    batch, rows, keys = (torch.arange(s.start, s.stop, device=device) for s in (at.batch, at.rows, at.keys))
    head = torch.arange(p.shape[1], device=device)
    return dropout.keep(seed, options.dropout_p, batch, head, rows, keys + options.first_key)


def _dropped(call: Call, kept: Tensor | None, p: Tensor) -> Tensor:
    """p, 0 where dropped and raised by 1 / (1 - dropout_p) where kept."""
    return p if kept is None else torch.where(kept, p / (1 - call.options.dropout_p), 0)


def _tile_forward(call: Call, part: Part, o: Tensor, lse: Tensor) -> None:
    at = (part.batch, slice(None), part.rows)
    q = queries(call.x.q, part).to(lse.dtype)
    if 0 < part.keys.stop - part.keys.start <= KEYS:
        tile = next(_tiles(call, part, q))
        high, p = tile.s.amax(-1, keepdim=True), tile.s.softmax(-1)
        empty = high == -math.inf
        lse[at] = (high - p.amax(-1, keepdim=True).log()).masked_fill_(empty, -math.inf)[..., 0]
        p = p.masked_fill_(empty, 0)
        o[at] = _product(_dropped(call, _kept(call, part, p), p), tile.v).to(o.dtype)
        return
    high = torch.full(lse[at].shape, -math.inf, dtype=lse.dtype, device=q.device)
    total, acc = torch.zeros_like(high), torch.zeros(o[at].shape, dtype=lse.dtype, device=q.device)
    for tile in _tiles(call, part, q):
        new = torch.maximum(high, tile.s.amax(-1))
        pivot = new.masked_fill(new == -math.inf, 0)
        alpha = torch.exp(high - pivot)
        p = tile.s.sub_(pivot[..., None]).exp_()
        total = total * alpha + p.sum(-1)
        acc = acc.mul_(alpha[..., None]).add_(_product(_dropped(call, _kept(call, tile.part, p), p), tile.v))
        high = new
    total = total.masked_fill(total == 0, 1)
    o[at] = (acc / total[..., None]).to(o.dtype)
    lse[at] = high + torch.log(total)


def _row_state(call: Call, part: Part, q: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum of the logits, 1 / sum of exp(s - maximum)), (b, Hq, m, 1): holds what lse rounds away."""
    high = torch.full((*q.shape[:3], 1), -math.inf, dtype=q.dtype, device=q.device)
    total = torch.zeros_like(high)
    for tile in _tiles(call, part, q):
        new = torch.maximum(high, tile.s.amax(-1, keepdim=True))
        pivot = new.masked_fill(new == -math.inf, 0)
        total = total * torch.exp(high - pivot) + tile.s.sub_(pivot).exp_().sum(-1, keepdim=True)
        high = new
    return high, 1 / total.masked_fill(total == 0, 1)


def _tile_backward(
    call: Call, part: Part, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, grads: Gradients
) -> None:
    at, heads = (part.batch, slice(None), part.rows), call.x.k.shape[1]
    q, do = queries(call.x.q, part).to(lse.dtype), do[at].to(lse.dtype)
    # keys that fit one tile give p and delta afresh, which is exact where a row sees a single key
    alone = part.keys.stop - part.keys.start <= KEYS and not call.options.chunk
    pivot, inverse = lse[at][..., None], torch.ones((), dtype=lse.dtype, device=q.device)
    if not alone and call.x.bias is not None and not call.options.chunk:
        pivot, inverse = _row_state(call, part, q)
    pivot = pivot.masked_fill(pivot == -math.inf, 0)
    scale = _scale(call, part.batch)
    dq = torch.zeros_like(q)
    for tile in _tiles(call, part, q, sloped=True):
        hidden = tile.s == -math.inf
        p = tile.s.softmax(-1) if alone else tile.s.sub_(pivot).exp_().mul_(inverse)
        p = p.masked_fill_(hidden, 0)
        kept = _kept(call, tile.part, p)
        dp = _dropped(call, kept, _product(do, tile.v.mT)).masked_fill_(hidden, 0)
        delta = (p * dp if alone else do.double() * o[at]).sum(-1, keepdim=True).to(lse.dtype)
        ds = dp.sub_(delta)  # 0 to the bit where a row sees a single key
        ds = (ds if dlse is None else ds.add_(dlse[at][..., None])).mul_(p).masked_fill_(hidden, 0)
        _add(grads.v, tile.part, tile.part.keys, _transposed_product(_dropped(call, kept, p), do, heads))
        if call.free is not None and call.options.empty_rows == "uniform":
            ds = ds.masked_fill_(of(call.free, part.batch, part.rows)[..., None], 0)
        if grads.bias is not None:
            total = of_bias(grads.bias, tile.part)
            total += ds.sum_to_size(total.shape)
        if tile.slope is not None:
            ds = ds.mul_(tile.slope)
        dq += _product(ds, tile.k)  # without the scale
        _add(grads.k, tile.part, tile.part.keys, _transposed_product(ds.mul_(scale), q, heads))
    if grads.scale is not None:
        grads.scale[at] += (dq.double() * q).sum(-1)
    _add(grads.q, part, part.rows, dq * scale)
