"""LXMERT, https://arxiv.org/abs/1908.07490: one module attends from text to image and from image to text."""

from __future__ import annotations

from torch import Tensor
from transformers.models.lxmert import modeling_lxmert as upstream

from crossattn_kernels.integrations.transformers.attending import attend
from crossattn_kernels.layers.heads import split_heads


class LxmertAttention(upstream.LxmertAttention):
    """`LxmertCrossAttentionLayer.att`: hidden_states (B, M, C), context (B, N, C), float mask (B, 1, 1, N)."""

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        q, k, v = (
            split_heads(x, self.num_attention_heads)
            for x in (self.query(hidden_states), self.key(context), self.value(context))
        )
        y, weights = attend(q, k, v, attention_mask, dropout=self.dropout, weights=output_attentions)
        return (y,) if weights is None else (y, weights)
