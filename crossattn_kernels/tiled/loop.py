"""The loop over tiles of keys: the whole contract, on any device, `reference.py` with an online softmax.

Letters as in the package; b, m, n are sizes of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from crossattn_kernels import dropout
from crossattn_kernels.problem import Gradients
from crossattn_kernels.tiled.parts import KEYS, Call, Part, add, finite, keys, of, of_bias, queries, visible, wide


class Tile(NamedTuple):
    """Logits (b, Hq, m, n): s with hidden entries -inf; slope = ds/d(scale qkᵀ), None without a softcap."""

    part: Part
    s: Tensor
    slope: Tensor | None
    k: Tensor
    v: Tensor


def _tiles(call: Call, part: Part, q: Tensor, sloped: bool = False) -> Iterator[Tile]:
    x, options, filled, device = call.x, call.options, call.filled, call.x.q.device.type
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
        if filled is not None and options.empty_rows == "uniform":
            rows = of(filled, part.batch, part.rows)[..., None]
            s, seen = s.masked_fill_(rows, 0), None if seen is None else seen | rows
        if seen is not None:
            # a value that is not finite reaches the queries that see it through their logits, and nobody else
            if device != "cpu" or not (finite(k) and finite(v)):  # elsewhere to ask would wait
                s += (v * 0).sum(-1)[:, :, None].repeat_interleave(s.shape[1] // v.shape[1], 1)
                k, v = (torch.where(t.isfinite(), t, 0) for t in (k, v))
            hidden = ~seen
            s = s.masked_fill_(hidden, -math.inf)
            slope = None if slope is None else slope.masked_fill_(hidden, 0)
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
    options, seed = call.options, call.x.seed
    if not options.dropout_p:
        return None
    assert seed is not None
    keys = slice(at.keys.start + options.first_key, at.keys.stop + options.first_key)
    return dropout.keep(seed, options.dropout_p, at.batch, p.shape[1], at.rows, keys)


def _dropped(call: Call, kept: Tensor | None, p: Tensor) -> Tensor:
    """p, 0 where dropped and times 1 / (1 - dropout_p) where kept."""
    return p if kept is None else torch.where(kept, p / (1 - call.options.dropout_p), 0)


def forward(call: Call, part: Part, o: Tensor, lse: Tensor, state: Tensor) -> None:
    """Writes a part of o and lse, and for a chunk of its state."""
    at = (part.batch, slice(None), part.rows)
    q = queries(call.x.q, part).to(lse.dtype)
    if 0 < part.keys.stop - part.keys.start <= KEYS:
        tile = next(_tiles(call, part, q))
        high, p = tile.s.amax(-1, keepdim=True), tile.s.softmax(-1)
        empty = high == -math.inf
        inverse = p.amax(-1, keepdim=True).masked_fill_(empty, 1)
        p = p.masked_fill_(empty, 0)
        o[at] = _product(_dropped(call, _kept(call, part, p), p), tile.v).to(o.dtype)
        lse[at] = (high - inverse.log())[..., 0]
        if call.options.chunk:
            state[part.batch, :, :, part.rows] = torch.stack((high, inverse), 1)[..., 0]
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
    if call.options.chunk:
        state[part.batch, :, :, part.rows] = torch.stack((high, 1 / total), 1)


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


def backward(
    call: Call, part: Part, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, state: Tensor, grads: Gradients
) -> None:
    at, heads = (part.batch, slice(None), part.rows), call.x.k.shape[1]
    q, do = queries(call.x.q, part).to(lse.dtype), do[at].to(lse.dtype)
    # keys that fit one tile give p and delta afresh, which is exact where a row sees a single key
    alone = part.keys.stop - part.keys.start <= KEYS and not call.options.chunk
    pivot, inverse = lse[at][..., None], torch.ones((), dtype=lse.dtype, device=q.device)
    if call.options.chunk:
        pivot, inverse = state[part.batch, :, :, part.rows, None].unbind(1)
    elif not alone and call.x.bias is not None:
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
        add(grads.v, tile.part, tile.part.keys, _transposed_product(_dropped(call, kept, p), do, heads))
        if call.filled is not None and call.options.empty_rows == "uniform":
            ds = ds.masked_fill_(of(call.filled, part.batch, part.rows)[..., None], 0)
        if grads.bias is not None:
            total = of_bias(grads.bias, tile.part)
            total += ds.sum_to_size(total.shape)
        if tile.slope is not None:
            ds = ds.mul_(tile.slope)
        dq += _product(ds, tile.k)  # without the scale
        add(grads.k, tile.part, tile.part.keys, _transposed_product(ds.mul_(scale), q, heads))
    if grads.scale is not None:
        grads.scale[at] += (dq.double() * q).sum(-1)
    add(grads.q, part, part.rows, dq * scale)
