"""Flamingo's gated cross-attention: text looks at the media before it, and at first not at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crossattn_kernels.functional import cross_attention
from crossattn_kernels.layers.cross_attention import check_input
from crossattn_kernels.layers.heads import check_positive, merge_heads, split_heads
from crossattn_kernels.masks import Mask
from crossattn_kernels.problem import check_dense, fits


def feed_forward(dim: int, mult: int = 4, **place: Any) -> nn.Sequential:
    """LayerNorm, projection to mult * dim, GELU and back, without biases: (..., dim) -> (..., dim)."""
    inner = int(dim * mult)
    return nn.Sequential(
        nn.LayerNorm(dim, **place),
        nn.Linear(dim, inner, bias=False, **place),
        nn.GELU(),
        nn.Linear(inner, dim, bias=False, **place),
    )


def reset_linear(module: nn.Module) -> None:
    """PyTorch's own initialisation of every projection and normalisation inside."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.LayerNorm)):
            part.reset_parameters()


class MaskedCrossAttention(nn.Module):
    """tanh(gate) * attention of normalised text to media, between projections without biases.

    x: (B, M, dim)   media: (B, N, dim_visual)   result: (B, M, dim)
    mask: which keys each text token sees.   gate: as `cross_attention` takes it, the same for all heads and channels.
    looks: (B, M, 1); a query times 0 takes the mean over what it sees.
    """

    def __init__(self, dim: int, dim_visual: int, dim_head: int, heads: int, **place: Any) -> None:
        super().__init__()
        check_positive(dim=dim, dim_visual=dim_visual, dim_head=dim_head, heads=heads)
        inner = dim_head * heads
        self.dim, self.dim_visual, self.heads = dim, dim_visual, heads
        self.norm = nn.LayerNorm(dim, **place)
        self.to_q = nn.Linear(dim, inner, bias=False, **place)
        self.to_kv = nn.Linear(dim_visual, 2 * inner, bias=False, **place)
        self.to_out = nn.Linear(inner, dim, bias=False, **place)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"

    def forward(self, x: Tensor, media: Tensor, mask: Mask | None, gate: Tensor, looks: Tensor | None = None) -> Tensor:
        check_input("x", x, ("B", "M", self.dim), self.norm, self.to_q)
        check_input("media", media, ("B", "T * n", self.dim_visual), self.to_kv)
        q, (k, v) = self.to_q(self.norm(x)), self.to_kv(media).chunk(2, -1)
        if looks is not None:
            q = q * looks.to(q.dtype)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        # a gate of one number a token may stand before to_out, because that has no bias
        return self.to_out(merge_heads(cross_attention(q, k, v, mask, gate=gate)))


class GatedCrossAttentionBlock(nn.Module):
    """x + tanh(attn_gate) * attention(x, media), then x + tanh(ff_gate) * feed_forward(x).

    dim: width of text.  dim_visual: width of media; default dim.  dim_head, heads: inner width is dim_head * heads.
    ff_mult: width inside the feed-forward, in dim.
    only_attend_immediate_media: text sees the latest medium before it ("latest"); False: all media before it.

    Loads the state dicts of open_flamingo and of flamingo-pytorch, whose parameter names it has.
    Initialisation: both gates 0, so that the block is the identity; all else as PyTorch does.
    Source: Flamingo, https://arxiv.org/abs/2204.14198, sections 2.2 and 2.3.
    """

    def __init__(
        self,
        dim: int,
        dim_visual: int | None = None,
        *,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        only_attend_immediate_media: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = dict(device=device, dtype=dtype)
        self.only_attend_immediate_media = only_attend_immediate_media
        self.attn = MaskedCrossAttention(dim, dim_visual or dim, dim_head, heads, **place)
        self.attn_gate = nn.Parameter(torch.empty(1, **place))
        self.ff = feed_forward(dim, ff_mult, **place)
        self.ff_gate = nn.Parameter(torch.empty(1, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_linear(self)
        nn.init.zeros_(self.attn_gate)
        nn.init.zeros_(self.ff_gate)

    def extra_repr(self) -> str:
        return f"only_attend_immediate_media={self.only_attend_immediate_media}"

    def forward(
        self, x: Tensor, media: Tensor, media_locations: Tensor | None = None, use_cached_media: bool = False
    ) -> Tensor:
        """
        x: (B, M, dim), text   media: (B, T, n, dim_visual), T media of n tokens each
        media_locations: bool (B, M), True where a medium is mentioned; None: all text sees all media.
        use_cached_media: all of x comes after the whole prompt, whose media_locations, (B, any length), are given.

        Text after m mentions sees the m-th medium, or the first m.  As in both libraries, text before the first
        mention gets 0 where it would see the latest medium, and the mean over all media where it would see all before
        it; text after more mentions than media gets that mean too where it would see the latest.

        Returns (B, M, dim).  Raises ValueError for other shapes, and TypeError for other types.
        """
        check_dense(x=x, media=media)
        if x.ndim != 3 or media.ndim != 4:
            raise ValueError(
                f"x must be (B, M, dim) and media (B, T, n, dim_visual), got {tuple(x.shape)} and {tuple(media.shape)}"
            )
        mask, looks = None, None
        gate: Tensor = self.attn_gate
        if media_locations is not None:
            mentions = _mentions(media_locations, x, media, use_cached_media)
            mask, finds = _ranges(mentions, media.shape[1], media.shape[2], self.only_attend_immediate_media)
            looks = finds.transpose(1, 2)
            if self.only_attend_immediate_media:
                gate = gate * (mentions > 0)[..., None]
        elif use_cached_media:
            raise ValueError("use_cached_media needs media_locations, those of the whole prompt")
        x = x + self.attn(x, media.flatten(1, 2), mask, gate, looks)
        return x + self.ff(x) * self.ff_gate.tanh()


def _mentions(locations: Tensor, x: Tensor, media: Tensor, whole_prompt: bool) -> Tensor:
    """How many media were mentioned up to each token of x, this one included: (B, 1, M), or (B, 1, 1) for all."""
    check_dense(media_locations=locations)
    batch = media.shape[0] if x.shape[0] == 1 else x.shape[0]
    right = locations.ndim == 2 and fits(locations.shape[0], batch)
    if not right or (locations.shape[1] != x.shape[1] and not whole_prompt):
        sizes = f"x is {tuple(x.shape)}, media is {tuple(media.shape)}"
        raise ValueError(f"media_locations must be (B, M), got {tuple(locations.shape)}: {sizes}")
    locations = locations.bool()[:, None]
    return locations.sum(-1, keepdim=True) if whole_prompt else locations.cumsum(-1)


def _ranges(mentions: Tensor, count: int, tokens: int, latest: bool) -> tuple[Mask, Tensor]:
    """What text after so many mentions sees of `count` media of `tokens` keys each, and where it finds a medium.

    Text that finds none gets all keys, of which it is to take the mean; before the first mention the latest medium is
    shut by the gate instead, and any range will do.
    """
    end = mentions * tokens
    if not latest:
        finds = mentions > 0
        return Mask(end=torch.where(finds, end, count * tokens)), finds
    finds = mentions <= count
    start = torch.where(finds, (end - tokens).clamp(min=0), 0)
    return Mask(start=start, end=torch.where(finds, start + tokens, count * tokens)), finds
