"""BLIP, https://arxiv.org/abs/2201.12086: the text model attends to the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.blip import modeling_blip_text as upstream
from transformers.utils.output_capturing import _active_collector

from crossattn_kernels.integrations.transformers.attending import attend, cached, said_above
from crossattn_kernels.layers.heads import split_heads


class BlipTextSelfAttention(upstream.BlipTextSelfAttention):
    """`BlipTextLayer.crossattention.self`: hidden_states (B, M, C), encoder_hidden_states (B, N, Cv).

    The mask is `encoder_attention_mask`, as upstream; `BlipTextAttention` hands the mask of the image over under
    another name, so that neither the library nor this masks any image token.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        def project() -> tuple[Tensor, Tensor]:
            k, v = self.key(encoder_hidden_states), self.value(encoder_hidden_states)
            return split_heads(k, self.num_attention_heads), split_heads(v, self.num_attention_heads)

        q = split_heads(self.query(hidden_states), self.num_attention_heads)
        k, v = cached(past_key_values, self.layer_idx, project)
        # the library records what modules return, and tells none of them whether it does
        wanted = "cross_attentions" in (said_above(_active_collector, ("cross_attentions",)) or ())
        return attend(q, k, v, encoder_attention_mask, dropout=self.dropout, weights=wanted)
