"""A backend for diffusers' attention dispatcher, whose tensors are (B, N, H, D)."""

from __future__ import annotations

from typing import Any

from diffusers.models import attention_dispatch
from torch import Tensor

from crossattn_kernels.integrations.reports import HERE
from crossattn_kernels.integrations.sdpa import scaled_dot_product_attention


def register() -> Any:
    """The member of `AttentionBackendName` that is this package; it is made on the first call.

    diffusers has no way for others to name a backend: the enumeration is closed and the registry private.  Both are
    touched here and in `active`, nowhere else.
    """
    names: Any = attention_dispatch.AttentionBackendName
    if HERE not in names._value2member_map_:
        member = str.__new__(names, HERE)
        member._name_, member._value_ = HERE.upper(), HERE
        names._member_names_.append(member._name_)
        names._member_map_[member._name_] = names._value2member_map_[HERE] = member
        # it does not refuse context parallelism, because calls of that kind go on to a backend that has it
        attention_dispatch._AttentionBackendRegistry.register(member, supports_context_parallel=True)(attention)
    return names(HERE)


def active() -> str:
    """The backend of processors that have none of their own."""
    return attention_dispatch._AttentionBackendRegistry._active_backend.value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """query: (B, M, H, D)   key, value: (B, N, H, D) -> (B, M, H, D); the arguments of diffusers' own backends."""
    if query.shape[1] == key.shape[1] or is_causal or return_lse or _parallel_config is not None:
        native: Any = attention_dispatch._native_attention
        return native(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, _parallel_config
        )
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    y = scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, scale=scale, enable_gqa=enable_gqa)
    return y.transpose(1, 2)
