"""Channels to heads and back: views, so that attention reads projections where they lie."""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, M, heads * D) -> (B, heads, M, D), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, M, D) -> (B, M, H * D), a view of what `cross_attention` returns."""
    return x.transpose(1, 2).flatten(2)
