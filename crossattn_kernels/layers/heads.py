"""Channels to heads and back: views, so that attention reads projections where they lie."""

from __future__ import annotations

from torch import Tensor

from crossattn_kernels.masks import check_integer


def check_positive(**sizes: int) -> None:
    for name, n in sizes.items():
        check_integer(name, n, 1)


def check_heads(name: str, width: int, heads: int, name_of_heads: str = "heads") -> None:
    check_positive(**{name: width, name_of_heads: heads})
    if width % heads:
        got = f"{name}={width} and {name_of_heads}={heads}"
        raise ValueError(f"{name} must be a multiple of {name_of_heads}, got {got}")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, M, heads * D) -> (B, heads, M, D), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, M, D) -> (B, M, H * D), a view of what `cross_attention` returns."""
    return x.transpose(1, 2).flatten(2)
