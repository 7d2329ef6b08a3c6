"""The attention call as the swapped modules make it: merged heads, weights for those who ask, keys from a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.utils.output_capturing import CompileableContextVar

from crossattn_kernels.functional import cross_attention
from crossattn_kernels.layers.heads import merge_heads
from crossattn_kernels.maps import attention_weights
from crossattn_kernels.masks import Mask

_WANTED = CompileableContextVar("crossattn_weights_wanted")


@contextmanager
def weights_wanted(wanted: bool | None) -> Iterator[None]:
    """What a caller wants, told to modules further down which the library always asks for weights; None: nothing."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def are_weights_wanted(module: nn.Module) -> bool:
    """Whether a module that is asked for weights has to compute them: not if the caller above wants none.

    A forward hook on the module sees what it returns, so for a hook they are computed.
    """
    return said_above(_WANTED, None) is not False or bool(module._forward_hooks)


def said_above(variable: CompileableContextVar, unknown: Any) -> Any:
    """What a caller has set; `unknown` in code that was compiled without that caller, which cannot see it."""
    return unknown if torch.compiler.is_compiling() and not variable.compiling else variable.get()


def telling(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a layer that is told `output_attentions` and asks its children for weights all the same."""

    @wraps(forward)
    def told(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # where it is not said by name the children answer as they are asked: weights too many, never too few
        with weights_wanted(kwargs.get("output_attentions")):
            return forward(self, *args, **kwargs)

    return told


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: nn.Dropout | float = 0.0,
    weights: bool | None = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, weights): q (B, H, M, D), k (B, H, N, D), v (B, H, N, Dv) -> (B, M, H * Dv) and (B, H, M, N) or None.

    mask: as in `cross_attention`.  The float masks of transformers are added as they are: their finfo.min is a number,
    so a row of nothing else attends uniformly, as it does there.
    dropout: a module, which has its own mode, or a share for this call.
    weights: the exact weights on demand, before dropout.
    """
    p = dropout if isinstance(dropout, float) else dropout.p if dropout.training else 0.0
    mask = _absorbing(mask) if isinstance(mask, Tensor) and mask.dtype == torch.float16 else mask
    y = merge_heads(cross_attention(q, k, v, mask, scale=scale, dropout_p=p))
    return y, attention_weights(q, k, mask, scale=scale) if weights else None


def _absorbing(mask: Tensor) -> Tensor:
    """An fp16 mask in fp32: the library adds in fp16, where the least value absorbs every logit; so must it here."""
    least = torch.finfo(torch.float16).min
    return mask.float().masked_fill(mask <= least, torch.finfo(torch.float32).min)


def cached(past: Any, layer: int, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Keys and values of a cross-attention: projected once, then read from the cache of the generation, if any."""
    if past is None:
        return project()
    if not isinstance(past, EncoderDecoderCache):
        return past.update(*project(), layer)
    if past.is_updated.get(layer):
        held = past.cross_attention_cache.layers[layer]
        return held.keys, held.values
    keys, values = past.cross_attention_cache.update(*project(), layer)
    past.is_updated[layer] = True
    return keys, values
