"""Contenders: who computes the attention of a workload.

A provider binds a call once, outside the clock (dense masks are built here), and gives its forward.  One that cannot
serve a call raises `Refused` with its reasons.  A gate is a multiplication of its own for everybody but ours.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from crossattn_kernels import cross_attention, explain
from crossattn_kernels.testing import Call

Forward = Callable[[], Tensor]
MOST_SCORES = 2**31  # numbers in an M x N matrix that a quadratic contender is still asked for: 4 GiB in bf16


class Refused(Exception):
    """A contender that cannot serve a call, and why."""


def ours(call: Call, backend: str | None = None) -> Forward:
    """`cross_attention`."""
    return lambda: cross_attention(**call.tensors, mask=call.mask, **call.options, backend=backend)


def sdpa(call: Call, compact: bool = False) -> Forward:
    """`F.scaled_dot_product_attention`; a mask becomes the equivalent dense bool mask.

    compact: one row of the mask for all queries where they see the same keys, as a careful user would pass it.
    """
    q, k, v = _qkv(call)
    dense, group = _dense(call, compact), q.shape[1] != k.shape[1]
    return _gated(call, lambda: F.scaled_dot_product_attention(q, k, v, dense, enable_gqa=group))


def quadratic(bind: Callable[[Call], Forward], call: Call) -> Forward:
    """A contender that stores M x N scores, where they are not too many."""
    q, k, _ = _qkv(call)
    scores = q.shape[:3].numel() * k.shape[2]
    if scores >= MOST_SCORES:
        raise Refused(f"not asked: its scores would take {scores * q.element_size() / 2**30:.0f} GiB")
    return bind(call)


def eager(call: Call) -> Forward:
    """Two products and a softmax: what a model without a fused kernel does; grouped heads are repeated."""
    q, k, v = _qkv(call)
    dense, scale, group = _dense(call), q.shape[3] ** -0.5, q.shape[1] // k.shape[1]
    hidden = None if dense is None else ~dense

    def forward() -> Tensor:
        keys, values = (k, v) if group == 1 else (t.repeat_interleave(group, 1) for t in (k, v))
        s = (q @ keys.mT) * scale
        return (s if hidden is None else s.masked_fill(hidden, -torch.inf)).softmax(-1) @ values

    return _gated(call, forward)


@cache
def compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`flex_attention` and `create_block_mask`, compiled for each shape anew."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # one shape after the other, all in one process
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 10_000
    functorch.donated_buffer = False  # a backward that is timed alone keeps its graph
    compiled_attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return compiled_attention, torch.compile(create_block_mask, dynamic=False)


def flex(call: Call, mask_each_time: bool = False) -> Forward:
    """FlexAttention, compiled; its block mask is made once, or in each call."""
    (q, k, v), (attend, create) = _qkv(call), compiled()
    sizes = dict(B=q.shape[0], H=None, Q_LEN=q.shape[2], KV_LEN=k.shape[2], device=q.device.type)
    if mask_each_time and call.mask is None:
        raise Refused("no mask to make")
    if q.requires_grad and not q.is_cuda:
        raise Refused("no backward on a CPU")
    sees = None if call.mask is None else _mask_mod(call)

    def block_mask() -> Any:
        return None if sees is None else create(sees, **sizes)

    kept, group = None if mask_each_time else block_mask(), q.shape[1] != k.shape[1]
    return _gated(call, lambda: attend(q, k, v, block_mask=kept or block_mask(), enable_gqa=group))


def xformers(call: Call) -> Forward:
    """`memory_efficient_attention`, (B, sequence, H, D)."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        raise Refused("xformers is not installed") from None
    q, k, v = _qkv(call)
    if call.mask is not None or q.shape[1] != k.shape[1]:
        raise Refused("not asked: this benchmark gives it neither masks nor grouped heads")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _gated(call, lambda: memory_efficient_attention(q, k, v).transpose(1, 2))


def flash_attn(call: Call) -> Forward:
    """The flash-attn package, (B, sequence, H, D)."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        raise Refused("flash-attn is not installed") from None
    if call.mask is not None:
        raise Refused("it takes no mask")
    q, k, v = (t.transpose(1, 2) for t in _qkv(call))
    return _gated(call, lambda: flash_attn_func(q, k, v).transpose(1, 2))


SDPA = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
compact = partial(sdpa, compact=True)
PROVIDERS: dict[str, Callable[[Call], Forward]] = {
    "ours": ours,
    "sdpa": sdpa,
    "sdpa auto": compact,
    **dict.fromkeys(SDPA, compact),
    "sdpa math": partial(quadratic, compact),
    "eager": partial(quadratic, eager),
    "flex": flex,
    "flex + block mask": partial(flex, mask_each_time=True),
    "xformers": xformers,
    "flash-attn": flash_attn,
}
MODES = ("forward", "forward+backward")


def scope(provider: str) -> contextlib.AbstractContextManager[Any]:
    """What must be in force while a provider is bound and run: the backend of SDPA, where one is named."""
    return sdpa_kernel(SDPA[provider]) if provider in SDPA else contextlib.nullcontext()


def chosen(provider: str, call: Call) -> str:
    """Which implementation runs behind a provider that chooses by itself; "" for the others."""
    q, k, v = _qkv(call)
    if provider == "ours":
        return explain(**call.tensors, mask=call.mask, **call.options).backend
    if provider not in ("sdpa", "sdpa auto"):
        return ""
    dense = _dense(call, provider == "sdpa auto")
    return SDPBackend(
        torch._fused_sdp_choice(q, k, v, dense, 0.0, False, enable_gqa=q.shape[1] != k.shape[1])
    ).name.lower()


def why_not(provider: str, call: Call) -> str:
    """What PyTorch says against a backend of SDPA that was asked for by name."""
    cuda = torch.backends.cuda
    asks = {
        "sdpa cudnn": cuda.can_use_cudnn_attention,
        "sdpa flash": cuda.can_use_flash_attention,
        "sdpa efficient": cuda.can_use_efficient_attention,
    }
    q, k, v = _qkv(call)
    if provider not in asks or not q.is_cuda:
        return ""
    parameters = cuda.SDPAParams(q, k, v, _dense(call, True), 0.0, False, q.shape[1] != k.shape[1])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        asks[provider](parameters, True)
    return "; ".join(str(w.message).partition(" (Triggered")[0] for w in said)


def bind(provider: str, call: Call, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: forward without a graph, backward alone, or both; results are new each time.

    Gradients are those of q, k, v and, where there is one, the gate.
    """
    inputs = list(call.tensors.values())
    for t in inputs:
        t.requires_grad_(mode != "forward")  # FlexAttention asks for it, not for the grad mode
    forward, dy = PROVIDERS[provider](call), call.dy
    y = forward() if mode == "backward" else None

    def forward_only() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (forward(),)

    def backward_only() -> tuple[Tensor, ...]:
        assert y is not None
        return torch.autograd.grad(y, inputs, dy, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        y = forward()
        return (y, *torch.autograd.grad(y, inputs, dy))

    return {"forward": forward_only, "backward": backward_only, "forward+backward": both}[mode]


def _qkv(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return call.tensors["q"], call.tensors["k"], call.tensors["v"]


def _gated(call: Call, forward: Forward) -> Forward:
    gate = call.tensors.get("gate")
    if gate is None:
        return forward
    by_head = gate.view(-1, 1, 1) if gate.ndim < 2 else gate[:, None]
    return lambda: torch.tanh(by_head) * forward()


def _dense(call: Call, compact: bool = False) -> Tensor | None:
    """Bool (1|B, 1|Hq, M, N): one mask for all entries and heads that share it; if compact, one row for all queries."""
    if call.mask is None:
        return None
    M, N = call.tensors["q"].shape[2], call.tensors["k"].shape[2]
    by_row = [x for x in (call.mask.start, call.mask.end, call.mask.visible) if x is not None]
    same = compact and call.mask.visible is None and all(x.shape[2] == 1 for x in by_row)
    return call.mask.as_dense(*call.mask.lead(), 1 if same else M, N)


def _mask_mod(call: Call) -> Callable[..., Tensor]:
    """The ranges of a mask as FlexAttention asks for them; the named workloads have no other fields."""
    mask, q, k = call.mask, call.tensors["q"], call.tensors["k"]
    assert mask is not None and mask.keys is None and mask.visible is None
    shape = (q.shape[0], q.shape[2])

    def rows(x: Tensor | None, missing: int) -> Tensor:
        x = torch.tensor([[[missing]]], device=q.device) if x is None else x
        return x[:, 0].expand(shape).to(torch.int32).contiguous()  # (B, M)

    start, end = rows(mask.start, 0), rows(mask.end, k.shape[2])

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j >= start[b, i]) & (j < end[b, i])

    return sees
