"""The definition: what cross-attention is, in plain PyTorch, differentiable by autograd, any dtype up to fp64.

s = softcap(scale * q kᵀ) + bias, hidden entries -inf      p = softmax(s)      o = p v      y = tanh(gate) * o

Everything else in this package is right when it agrees with this file.  Memory grows as M x N.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crossattn_kernels import dropout
from crossattn_kernels.problem import Inputs, Options


def attend(x: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """(y, lse): y is (B, Hq, M, Dv) in q's dtype, laid out as (B, M, Hq, Dv); lse is (B, Hq, M), fp32 or wider."""
    p, lse, unused = probabilities(x, options)
    if options.dropout_p:
        p = p * _dropout(x, options)
    o = p @ x.v.repeat_interleave(x.group, 1).masked_fill(unused, 0)  # (B, Hq, M, Dv)
    y = o if x.gate is None else torch.tanh(x.gate.to(o.dtype)) * o
    return y.transpose(1, 2).contiguous().transpose(1, 2), lse


def probabilities(x: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(p, lse, unused): p is (B, Hq, M, N) before dropout; unused, (B, 1, N, 1), is a key that no query sees."""
    B, Hq, M, N = x.sizes
    seen = options.mask(x).as_dense(B, Hq, M, N).to(x.q.device)
    nobody = ~seen.any(-1, keepdim=True)  # (B, Hq, M, 1)
    if options.empty_rows != "zero":
        seen = seen | nobody

    # a key that no query sees takes no part, whatever is stored in it
    unused = ~seen.flatten(1, 2).any(1)[:, None, :, None]  # (B, 1, N, 1)
    k = x.k.repeat_interleave(x.group, 1).masked_fill(unused, 0)

    scale = options.scale if x.scale is None else x.scale[..., None, None].to(x.q.dtype)
    s = (x.q @ k.mT) * scale  # (B, Hq, M, N)
    if options.softcap:
        s = options.softcap * torch.tanh(s / options.softcap)
    if x.bias is not None:
        s = s + x.bias.to(s.dtype)
    if options.empty_rows == "uniform":
        s = s.masked_fill(nobody, 0)
    s = s.masked_fill(~seen, -math.inf)

    hidden = (s == -math.inf).all(-1, keepdim=True)  # by the mask or by a bias of -inf
    safe = s.masked_fill(hidden, 0)
    lse = safe.to(torch.promote_types(s.dtype, torch.float32)).logsumexp(-1).masked_fill(hidden[..., 0], -math.inf)
    return safe.softmax(-1).masked_fill(s == -math.inf, 0), lse, unused


def _dropout(x: Inputs, options: Options) -> Tensor:
    """0 where dropped, 1 / (1 - p) where kept: (B, Hq, M, N)."""
    assert x.seed is not None
    (B, Hq, M, N), first = x.sizes, options.first_key
    keep = dropout.keep(x.seed, options.dropout_p, slice(0, B), Hq, slice(0, M), slice(first, first + N))
    return keep.to(x.q.dtype) / (1 - options.dropout_p)
