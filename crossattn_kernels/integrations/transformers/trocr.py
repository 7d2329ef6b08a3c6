"""TrOCR, https://arxiv.org/abs/2109.10282: the decoder attends to the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.trocr import modeling_trocr as upstream

from crossattn_kernels.integrations.transformers.attending import attend, cached
from crossattn_kernels.layers.heads import split_heads


class TrOCRAttention(upstream.TrOCRAttention):
    """`TrOCRDecoderLayer.encoder_attn`: hidden_states (B, M, C), key_value_states (B, N, Ck), mask (B, 1, M, N)."""

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        def project() -> tuple[Tensor, Tensor]:
            k, v = self.k_proj(key_value_states), self.v_proj(key_value_states)
            return split_heads(k, self.num_heads), split_heads(v, self.num_heads)

        q = split_heads(self.q_proj(hidden_states), self.num_heads)
        k, v = cached(past_key_values, self.layer_idx, project)
        dropout = float(self.dropout) if self.training else 0.0
        y, weights = attend(q, k, v, attention_mask, scale=self.scaling, dropout=dropout, weights=output_attentions)
        return self.out_proj(y), weights
