"""Contenders: who computes the attention of a workload.

A provider binds a call once, outside the clock (dense masks are built here), and gives its forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from crossattn_kernels import cross_attention
from crossattn_kernels.testing import Call

Forward = Callable[[], Tensor]


def ours(call: Call, backend: str = "torch") -> Forward:
    """`cross_attention`."""
    return lambda: cross_attention(**call.tensors, mask=call.mask, **call.options, backend=backend)


def sdpa(call: Call) -> Forward:
    """`F.scaled_dot_product_attention`; a mask becomes the equivalent dense bool mask."""
    q, k, v = (call.tensors[n] for n in "qkv")
    dense, group = _dense(call), q.shape[1] != k.shape[1]
    return lambda: F.scaled_dot_product_attention(q, k, v, dense, enable_gqa=group)


def eager(call: Call) -> Forward:
    """Two products and a softmax: what a model without a fused kernel does."""
    q, k, v = (call.tensors[n] for n in "qkv")
    dense, scale = _dense(call), q.shape[3] ** -0.5

    def forward() -> Tensor:
        s = (q @ k.mT) * scale
        return (s if dense is None else s.masked_fill(~dense, -torch.inf)).softmax(-1) @ v

    return forward


PROVIDERS: dict[str, Callable[[Call], Forward]] = {"ours": ours, "sdpa": sdpa, "eager": eager}
MODES = ("forward", "forward+backward")


def bind(provider: str, call: Call, mode: str) -> Callable[[], None]:
    """What is timed: forward without a graph, or forward and the gradients of q, k and v; results are new each time."""
    inputs = [call.tensors[n] for n in "qkv"]
    for t in inputs:
        t.requires_grad_()
    forward, dy = PROVIDERS[provider](call), call.dy

    def forward_only() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        torch.autograd.grad(forward(), inputs, dy)

    return forward_only if mode == "forward" else both


def _dense(call: Call) -> Tensor | None:
    """Bool (1|B, 1|Hq, M, N): one mask for all entries and heads that share it."""
    if call.mask is None:
        return None
    (_, _, M, _), (_, _, N, _) = call.tensors["q"].shape, call.tensors["k"].shape
    return call.mask.as_dense(*call.mask.lead(), M, N)
