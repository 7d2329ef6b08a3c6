"""What transformers calls: the attention function and the mask function behind `attn_implementation="crossattn"`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.output_capturing import _active_collector

from crossattn_kernels.functional import cross_attention
from crossattn_kernels.integrations.reports import HERE
from crossattn_kernels.integrations.transformers.kinds import kind_of_class
from crossattn_kernels.maps import attention_weights
from crossattn_kernels.masks import Mask


def register() -> None:
    """Both registries: a name without a mask function would drop every mask."""
    AttentionInterface.register(HERE, attention)
    AttentionMaskInterface.register(HERE, mask)


class Redirected:
    """The configuration of one module, which names this package instead of what the rest of the model runs on."""

    _attn_implementation = HERE

    def __init__(self, original: Any) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        if name == "original":  # not yet set: pickle and copy ask for other names first
            raise AttributeError(name)
        return getattr(self.original, name)


# ---- attention ----


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Mask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """(output, weights) of one call: cross-attention here, anything else where the module ran before.

    query: (1|B, Hq, M, D)   key: (1|B, Hk, N, D)   value: (1|B, Hk, N, Dv)   output: (B, M, Hq, Dv), contiguous
    attention_mask: bool (True may attend) or float (added), broadcastable to (B, Hq, M, N); (B, N) as for flash
        attention; or a `Mask`.
    weights: (B, Hq, M, N) before dropout if `output_attentions` asks for them, else None.
    """
    if not _is_served(module, query, key, attention_mask, is_causal, rest):
        return _previous(module)(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            position_bias=position_bias, softcap=softcap, **rest,
        )  # fmt: skip
    arguments: dict[str, Any] = dict(scale=scaling, softcap=softcap)
    if position_bias is not None:
        if getattr(module, "has_relative_attention_bias", True):
            # without relative positions, as in T5's cross-attention, it is zeros of size M x N
            arguments["bias"] = position_bias
        if attention_mask is not None:
            # beside a bias upstream hides keys by a finite number: a row without keys is the mean of all, and upstream
            # a gradient flows through it, which here does not
            arguments["empty_rows"] = "uniform"
    attention_mask = _compact(attention_mask)
    y = cross_attention(query, key, value, attention_mask, dropout_p=dropout, **arguments)
    weights = attention_weights(query, key, attention_mask, **arguments) if _asks_for_weights(module, rest) else None
    return y.transpose(1, 2), weights


def _is_served(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: object,
    is_causal: bool | None,
    rest: dict[str, Any],
) -> bool:
    if any(rest.get(name) is not None for name in ("cache", "sliding_window", "s_aux")):
        return False
    if not isinstance(attention_mask, (Tensor, Mask, type(None))):
        return False
    if is_causal and attention_mask is None:
        return False
    kind = getattr(module, "crossattn_kind", None) or kind_of_class(module)
    if kind is None:  # a class that serves both, in a model that `apply` has not seen
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return not causal and query.shape[2] != key.shape[2]
    return kind == "cross"


def _asks_for_weights(module: nn.Module, rest: dict[str, Any]) -> bool:
    if rest.get("output_attentions") or getattr(module.config, "output_attentions", False):
        return True
    # some layers do not pass the question on; what the model is about to record answers it, except to the compiler
    recorded = None if torch.compiler.is_compiling() else _active_collector.get()
    return any("attentions" in name for name in recorded or ())


def _previous(module: nn.Module) -> Any:
    """The function that served a module before: "sdpa", unless its configuration is redirected."""
    config: Any = module.config
    name = config.original._attn_implementation if isinstance(config, Redirected) else "sdpa"
    eager = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def _compact(attention_mask: Tensor | Mask | None) -> Tensor | Mask | None:
    """Padding of keys without a copy per query, however it comes."""
    if not isinstance(attention_mask, Tensor):
        return attention_mask
    if attention_mask.ndim == 2:
        return Mask.key_padding(attention_mask.bool())
    return attention_mask[:, :, :1] if attention_mask.stride(2) == 0 else attention_mask


# ---- masks ----


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    config: Any = None,
    **rest: Any,
) -> Tensor | None:
    """`sdpa_mask`'s mask, bool (B, 1, M, N), True may attend; key padding is one row, expanded without memory."""
    if not getattr(MODEL_MAPPING.get(type(config), None), "_supports_sdpa", True):
        # these may not say which of their modules are causal, nor expect bool masks: they get eager's
        return eager_mask(batch_size, q_length, kv_length, mask_function=mask_function, **rest)
    is_padding = mask_function is bidirectional_mask_function
    rows = 1 if is_padding else q_length
    seen = sdpa_mask(batch_size, rows, kv_length, mask_function=mask_function, **rest)
    return seen.expand(-1, -1, q_length, -1) if is_padding and seen is not None else seen
