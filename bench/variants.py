"""Other ways to write what the kernels do, for `bench.experiments` to time beside them; nothing else runs these."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton
import triton.language as tl

from crossattn_kernels import kernels
from crossattn_kernels.kernels import launch
from crossattn_kernels.kernels.forward import store_result
from crossattn_kernels.kernels.scores import head_scale, later, scores, upward
from crossattn_kernels.kernels.softmax import Softmax, kept, softmax_init, softmax_step
from crossattn_kernels.kernels.tiles import column, descriptor, dot, key_tile, program


@triton.jit
def whole_tiles(state, q_tile, k, v, logits, drop, scale, b, h, hk, rows, first, last, M, N, C: tl.constexpr):
    """Both products of a tile in one turn of the loop."""
    heads, rows, cols = column(h), rows[:, None], tl.arange(0, C.BLOCK_N)[None, :]
    m, l, acc = state.m, state.l, state.acc
    factor = later(logits, scale)
    for key in tl.range(first, last, C.BLOCK_N):
        qk = dot(q_tile, key_tile(k, b, hk, key, N, C.D, C.BLOCK_D, True, C.BLOCK_N, C).T, None, C.TF32)
        s = scores(qk, logits, column(scale), b, heads, rows, key + cols, M, N, C, True, True)
        m, l, p, alpha = softmax_step(m, l, s, factor, C.BASE)
        p = kept(p, drop, b, heads, rows, key + cols).to(q_tile.dtype)
        v_tile = key_tile(v, b, hk, key, N, C.DV, C.BLOCK_DV, True, C.BLOCK_N, C)
        acc = dot(p, v_tile, acc * alpha[:, None], C.TF32)
    return Softmax(m, l, acc)


@triton.jit
def forward_kernel(q, k, v, result, partial, logits, drop, splits, B, Hq, M, N, C: tl.constexpr):
    """Warps that load tiles of keys beside warps that compute, which Triton makes of a plain loop over descriptors.

    It takes calls without masks, dropout, packed heads or splits, whose keys fill whole tiles, and launches of 4 warps:
    each of two warpgroups gets half of the queries, and one warp loads.
    """
    tl.static_assert(partial is None and drop is None and C.TMA and C.EDGE_STAGES == 0 and not C.PACKED)
    tile, b, h = program(tl.cdiv(M, C.BLOCK_M), Hq)
    hk, rows = h // C.GROUP, tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    cols = tl.arange(0, C.BLOCK_N)[None, :]
    k = descriptor(k, b, hk, N, C.D, C.BLOCK_N, C.BLOCK_D)
    v = descriptor(v, b, hk, N, C.DV, C.BLOCK_N, C.BLOCK_DV)
    # from pointers the compiler refuses it
    q_tile = descriptor(q, b, h, M, C.D, C.BLOCK_M, C.BLOCK_D).load([tile * C.BLOCK_M, 0])
    q_tile, scale = upward(q_tile, head_scale(logits, b, h), logits)
    state = softmax_init(C.BLOCK_M, C.BLOCK_DV)
    m, l, acc = state.m, state.l, state.acc
    for key in tl.range(0, N, C.BLOCK_N, warp_specialize=True):
        qk = dot(q_tile, k.load([key, 0]).T, None, C.TF32)
        s = scores(qk, logits, scale, b, h, rows[:, None], key + cols, M, N, C, True, True)
        m, l, p, alpha = softmax_step(m, l, s, later(logits, scale), C.BASE)
        acc = dot(p.to(q_tile.dtype), v.load([key, 0]), acc * alpha[:, None], C.TF32)
    store_result(result, Softmax(m, l, acc), b, h, rows, M, C)


SHIPPED = importlib.import_module("crossattn_kernels.kernels.forward")  # whose name in the package is a function
# each takes the place of what has its name there
VARIANTS = {"in order": whole_tiles, "specialised": forward_kernel}


@contextmanager
def forward_by(variant: str) -> Iterator[None]:
    """Within it, the forward runs in one of these ways; "" is the way that ships."""
    if not variant:
        yield
        return
    # a kernel finds what it calls in its module when it is compiled, and is compiled once: so in a module of its own
    name = f"{SHIPPED.__name__}_{variant.replace(' ', '_')}"
    spec = importlib.util.spec_from_file_location(name, SHIPPED.__file__)
    assert spec and spec.loader and SHIPPED.__file__
    module: Any = importlib.util.module_from_spec(spec)
    before = dict(launch.LAUNCHERS)
    launch.LAUNCHERS.clear()  # which know kernels by name
    with mock.patch.dict(sys.modules, {name: module}):
        spec.loader.exec_module(module)
        setattr(module, VARIANTS[variant].__name__, VARIANTS[variant])
        with mock.patch.object(kernels, "forward_here", module.forward):
            try:
                yield
            finally:
                launch.LAUNCHERS.clear()
                launch.LAUNCHERS.update(before)
