"""The processor that computes the cross-attention of diffusers' `Attention`."""

from __future__ import annotations

from typing import Any

from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from crossattn_kernels.functional import cross_attention
from crossattn_kernels.layers.heads import merge_heads, split_heads


class CrossAttnProcessor:
    """Does what the processor that it replaces does, as the fields of the `Attention` say.

    former: the processor that it replaces.
    norm_heads: norm_q and norm_k see heads (..., D); False: all channels (..., H * D), before they are split.
    """

    def __init__(self, former: Any, norm_heads: bool = True) -> None:
        self.former = former
        self.norm_heads = norm_heads

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """hidden_states: (B, M, C), or an image (B, C, height, width)   encoder_hidden_states: (B, N, Cc), or itself.

        attention_mask: bool or float, (B, N), (B, 1|M, N) or, a head after another, (B * H, 1|M, N).
        """
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        if hidden_states.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        q = self._heads(attn, attn.to_q(x), attn.norm_q)
        k, v = attn.to_kv(context).chunk(2, -1) if attn.fused_projections else (attn.to_k(context), attn.to_v(context))
        k = self._heads(attn, k, attn.norm_k)
        if image_rotary_emb is not None:
            # of the image, in which text has no place
            q = apply_rotary_emb(q, image_rotary_emb)
        mask = attention_mask
        if mask is not None:
            batch = context.shape[0]
            mask = mask.reshape(batch, mask.shape[0] // batch, -1, mask.shape[-1])  # (B, 1|H, 1|M, N)
        y = merge_heads(cross_attention(q, k, split_heads(v, attn.heads), mask, scale=attn.scale))

        for layer in attn.to_out:
            y = layer(y)
        if hidden_states.ndim == 4:
            y = y.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            y = y + hidden_states
        return y / attn.rescale_output_factor

    def _heads(self, attn: Any, x: Tensor, norm: Any) -> Tensor:
        if norm is None:
            return split_heads(x, attn.heads)
        return norm(split_heads(x, attn.heads)) if self.norm_heads else split_heads(norm(x), attn.heads)
