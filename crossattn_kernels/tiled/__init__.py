"""Backend "torch": the same answer in bounded memory, on any device, forward and explicit backward.

The work is cut into parts: a batch slice and a run of queries with the range of keys that they share.  On the CPU a
part is one call of PyTorch's own flash kernel where that can do it (`flash.py`), so hidden ranges cost no time;
everything else goes through a loop over tiles (`loop.py`), which is `reference.py` with an online softmax.
Memory: O(M + N) plus one tile.

Letters: B batch, Hq query heads, Hk key heads, M queries, N keys, D and Dv head sizes; b, m, n those of a part.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from crossattn_kernels.problem import Gradients, Inputs, Options
from crossattn_kernels.tiled import flash, loop
from crossattn_kernels.tiled.parts import (
    Call,
    Part,
    add,
    by_keys,
    few_rows,
    filled_rows,
    parts,
    size,
    small,
    trimmed,
    wide,
)

READS = 1024  # times that a key is read for which to copy it first is no loss
FAR = 1e3  # an lse farther from 0 has lost digits that p needs


def forward(x: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, o, lse, state, filled), as `ops.forward_op` documents; o is kept with any gate, state for chunks."""
    call = Call(trimmed(x), options, filled_rows(x, options))
    o, lse, state = _attend(call)
    none = x.q.new_empty(0)
    filled = none.bool() if call.filled is None else call.filled
    if x.gate is None:
        return o, none, lse, state, filled
    y = torch.empty_like(o).copy_(torch.tanh(x.gate.to(lse.dtype)) * o)
    return y, o, lse, state, filled


def _attend(call: Call, may_flash: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(o, lse, state): (B, Hq, M, Dv) laid out as (B, M, Hq, Dv), (B, Hq, M), and (B, 2, Hq, M) for a chunk."""
    work = list(parts(call))
    call = replace(call, x=_by_head(call.x, work))
    x, (B, Hq, M, _) = call.x, call.x.sizes
    laid_out = x.q.stride(0) >= x.q.stride(2) >= x.q.stride(1)  # the kernel lays o out as q
    whole = len(work) == 1 and not call.options.chunk
    if whole and (laid_out or len(list(flash.cached(x, work[0]))) == 1) and flash.can(call, work[0]):
        o, lse = flash.forward(call, work[0])
        # a copy made now costs less than one into memory set aside before
        return o.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous(), lse.new_empty(0)
    o = x.q.new_empty(B, M, Hq, x.v.shape[3]).transpose(1, 2)
    lse = x.q.new_empty(B, Hq, M, dtype=wide(x.q))
    state = lse.new_ones((B, 2, Hq, M) if call.options.chunk else 0)
    for part in work:
        if may_flash and flash.can(call, part):
            for piece in flash.cached(x, part):
                at = (piece.batch, slice(None), piece.rows)
                o[at], lse[at] = flash.forward(call, piece)
                if call.options.chunk:
                    state[piece.batch, 0, :, piece.rows] = lse[at]
        else:
            for piece in small(x, part):
                loop.forward(call, piece, o, lse, state)
    if may_flash and call.options.chunk and _absorbed(lse):
        return _attend(call, may_flash=False)
    return o, lse, state


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
    filled: Tensor | None,
    wanted: Gradients,
) -> Gradients:
    """Gradients of the inputs for which `wanted` holds something true; o is the ungated output."""
    x = trimmed(x)
    call, do, dgate = Call(x, options, filled), dy, None
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
        found = flash.backward(call, by_flash[0], do, o, quiet)
        grads = Gradients(*((g.to(lse.dtype) if by_tiles else g) if w else None for g, w in zip(found, wanted)))
    else:
        grads = Gradients(*(_zeros(t, lse.dtype) if w else None for t, w in zip((x.q, x.k, x.v), wanted)))
        for part in by_flash:
            dq, dk, dv = flash.backward(call, part, do, o, quiet)
            add(grads.q, part, part.rows, dq)
            add(grads.k, part, part.keys, dk)
            add(grads.v, part, part.keys, dv)
    if wanted.bias:
        grads = grads._replace(bias=torch.zeros_like(x.bias, dtype=lse.dtype))  # type: ignore[arg-type]
    if wanted.scale:
        grads = grads._replace(scale=torch.zeros(x.sizes[:3], dtype=torch.float64, device=x.q.device))
    for part in by_tiles:
        for piece in small(x, part):
            loop.backward(call, piece, do, dlse, o, lse, state, grads)
    dscale = None if grads.scale is None else grads.scale.sum(2).sum_to_size(x.scale.shape)  # type: ignore[union-attr]
    given = Gradients(x.q, x.k, x.v, x.bias, x.gate, x.scale)
    grads = grads._replace(gate=dgate, scale=dscale)
    return Gradients(*(g if g is None else g.to(t.dtype) for g, t in zip(grads, given)))  # type: ignore[union-attr]


def _shared_out(call: Call, lse: Tensor, may_flash: bool) -> tuple[list[Part], list[Part]]:
    """The parts of the backward that the flash kernel does, and those that the tile loop does."""
    may_flash = may_flash and not _absorbed(lse)
    by_flash: list[Part] = []
    by_tiles: list[Part] = []
    for part in parts(call, backward=True):
        if may_flash and flash.can(call, part, flash.FEW):
            by_flash += flash.exact(call.x, part)
            by_tiles += few_rows(call, part, flash.FEW)
        else:
            by_tiles.append(part)
    return by_keys(call, by_flash), by_tiles


def _absorbed(lse: Tensor) -> bool:
    """True if some lse is too large to hold the log of its sum; the flash kernel knows only lse."""
    return lse.device.type == "cpu" and bool(((lse.abs() > FAR) & lse.isfinite()).any())


def _zeros(t: Tensor, dtype: torch.dtype) -> Tensor:
    """To sum a gradient in, laid out as the flash kernel's, (B, S, H, D)."""
    return torch.zeros_like(t.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)
