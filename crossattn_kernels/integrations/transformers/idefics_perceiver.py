"""Idefics' Perceiver resampler (Flamingo, https://arxiv.org/abs/2204.14198, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.idefics import perceiver as upstream

from crossattn_kernels.integrations.transformers.attending import attend
from crossattn_kernels.layers.heads import split_heads


class IdeficsPerceiverAttention(upstream.IdeficsPerceiverAttention):
    """context (B, N, C), latents (B, M, C) -> (B, M, C): latents attend to the context and to themselves."""

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        latents = self.latents_layer_norm(latents)
        media = torch.cat([self.context_layer_norm(context), latents], dim=-2)  # (B, N + M, C)
        q, k, v = (split_heads(x, self.n_heads) for x in (self.q_proj(latents), self.k_proj(media), self.v_proj(media)))
        if self.qk_layer_norms:
            q, k = self.q_layer_norm(q), self.k_layer_norm(k)
        y, _ = attend(q, k, v, scale=self.qk_scale)
        return self.output_proj(y)
