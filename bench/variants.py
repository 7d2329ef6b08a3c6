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
from crossattn_kernels.kernels.scores import scores
from crossattn_kernels.kernels.softmax import Softmax, kept, softmax_step
from crossattn_kernels.kernels.tiles import column, dot, key_tile


@triton.jit
def in_order(state, q_tile, k, v, logits, drop, scale, b, h, hk, rows, first, last, M, N, C: tl.constexpr):
    """`forward.whole_tiles` with both products of a tile in one turn of the loop."""
    heads, rows, cols = column(h), rows[:, None], tl.arange(0, C.BLOCK_N)[None, :]
    m, l, acc = state.m, state.l, state.acc
    for key in tl.range(first, last, C.BLOCK_N):
        qk = dot(q_tile, key_tile(k, b, hk, key, N, C.D, C.BLOCK_D, True, C).T, None, C.TF32)
        s = scores(qk, logits, scale, b, heads, rows, key + cols, M, N, True)
        m, l, p, alpha = softmax_step(m, l, s)
        p = kept(p, drop, b, heads, rows, key + cols).to(q_tile.dtype)
        v_tile = key_tile(v, b, hk, key, N, C.DV, C.BLOCK_DV, True, C)
        acc = dot(p, v_tile, acc * alpha[:, None], C.TF32)
    return Softmax(m, l, acc)


SHIPPED = importlib.import_module("crossattn_kernels.kernels.forward")  # whose name in the package is a function
VARIANTS = {"in order": in_order}


@contextmanager
def forward_by(variant: str) -> Iterator[None]:
    """Within it, the forward folds in whole tiles in one of these ways; "" is the way that ships."""
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
        module.whole_tiles = VARIANTS[variant]
        with mock.patch.object(kernels, "forward_here", module.forward):
            try:
                yield
            finally:
                launch.LAUNCHERS.clear()
                launch.LAUNCHERS.update(before)
