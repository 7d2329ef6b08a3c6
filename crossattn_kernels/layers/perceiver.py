"""Flamingo's Perceiver resampler: any number of visual features in, a fixed number of tokens out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crossattn_kernels.functional import cross_attention
from crossattn_kernels.layers.cross_attention import check_input
from crossattn_kernels.layers.gated import feed_forward, reset_linear
from crossattn_kernels.layers.heads import check_positive, merge_heads, split_heads
from crossattn_kernels.masks import check_integer
from crossattn_kernels.problem import check_dense


class PerceiverAttention(nn.Module):
    """Attention of normalised latents to media and to themselves, between projections without biases.

    x: (B, N, dim)   latents: (1|B, L, dim)   result: (B, L, dim)
    """

    def __init__(self, dim: int, dim_head: int, heads: int, **place: Any) -> None:
        super().__init__()
        check_positive(dim_head=dim_head, heads=heads)
        inner = dim_head * heads
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim, **place)
        self.norm_latents = nn.LayerNorm(dim, **place)
        self.to_q = nn.Linear(dim, inner, bias=False, **place)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False, **place)
        self.to_out = nn.Linear(inner, dim, bias=False, **place)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        context = torch.cat((self.norm_media(x), latents.expand(x.shape[0], -1, -1)), 1)  # (B, N + L, dim)
        k, v = self.to_kv(context).chunk(2, -1)
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(latents), k, v))
        return self.to_out(merge_heads(cross_attention(q, k, v)))


class PerceiverLayer(nn.ModuleList):
    """Attention, then the feed-forward, each added to the latents."""

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        attention, feed = self
        latents = attention(x, latents) + latents
        return feed(latents) + latents


class PerceiverResampler(nn.Module):
    """`num_latents` learned latents that look `depth` times at the features of each medium.

    dim: width of features and latents.  dim_head, heads: inner width is dim_head * heads.
    max_num_media: a learned embedding for each medium of a sequence; flamingo-pytorch's num_media_embeds.
    max_num_frames: a learned embedding for each frame of a medium.  A single embedding, of either, serves all.
    ff_mult: width inside the feed-forwards, in dim.

    Loads the state dicts of open_flamingo, whose parameter names it has, and of flamingo-pytorch, where
    `media_time_embs` is called `media_pos_emb`.
    Initialisation: latents and embeddings from N(0, 1), all else as PyTorch does.
    Source: Flamingo, https://arxiv.org/abs/2204.14198, section 2.1.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 6,
        *,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        ff_mult: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = dict(device=device, dtype=dtype)
        check_positive(dim=dim, num_latents=num_latents)
        check_integer("depth", depth, 0)
        self.latents = nn.Parameter(torch.empty(num_latents, dim, **place))
        self.frame_embs = nn.Parameter(torch.empty(max_num_frames, dim, **place)) if max_num_frames else None
        self.media_time_embs = nn.Parameter(torch.empty(max_num_media, 1, dim, **place)) if max_num_media else None
        self.layers = nn.ModuleList(
            PerceiverLayer([PerceiverAttention(dim, dim_head, heads, **place), feed_forward(dim, ff_mult, **place)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, **place)
        self.register_load_state_dict_pre_hook(_rename_media_embeddings)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_linear(self)
        for learned in self.parameters(recurse=False):
            nn.init.normal_(learned)

    def extra_repr(self) -> str:
        latents, dim = self.latents.shape
        media, frames = (None if t is None else len(t) for t in (self.media_time_embs, self.frame_embs))
        return f"dim={dim}, num_latents={latents}, max_num_media={media}, max_num_frames={frames}"

    def forward(self, x: Tensor) -> Tensor:
        """
        x: (B, T, F, n, dim), n features of each of the F frames of each of T media, as open_flamingo takes it;
            (B, T, n, dim), media of one frame, and (B, n, dim), one medium, as flamingo-pytorch takes them.

        Returns (B, T, num_latents, dim).  Raises ValueError if x has other dimensions, or more media or frames than
        there are embeddings for.
        """
        check_dense(x=x)
        if not 3 <= x.ndim <= 5:
            raise ValueError(f"x must be (B, n, dim), (B, T, n, dim) or (B, T, F, n, dim), got {tuple(x.shape)}")
        check_input("x", x, (*"BTF"[: x.ndim - 2], "n", self.latents.shape[1]))
        B, T, F = (*x.shape[:-2], 1, 1)[:3]
        for what, embeddings, count in (("media", self.media_time_embs, T), ("frames", self.frame_embs, F)):
            if embeddings is not None and count > len(embeddings) > 1:
                most = f"max_num_{what}={len(embeddings)}"
                raise ValueError(f"x {tuple(x.shape)} holds {count} {what}, more than {most}")
        x = x.reshape(B, T, F, *x.shape[-2:])
        if self.frame_embs is not None:
            x = x + self.frame_embs[:F, None]
        x = x.flatten(2, 3)  # (B, T, F * n, dim)
        if self.media_time_embs is not None:
            x = x + self.media_time_embs[:T]
        x, latents = x.flatten(0, 1), self.latents[None]
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm(latents).unflatten(0, (B, T))


def _rename_media_embeddings(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
) -> None:
    """flamingo-pytorch's name of the media embeddings becomes open_flamingo's."""
    theirs, ours = f"{prefix}media_pos_emb", f"{prefix}media_time_embs"
    if module.media_time_embs is not None and theirs in state and ours not in state:
        state[ours] = state.pop(theirs)
