"""Perceiver IO, https://arxiv.org/abs/2107.14795: latents attend to inputs, output queries attend to latents."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.perceiver import modeling_perceiver as upstream

from crossattn_kernels.integrations.transformers.attending import attend
from crossattn_kernels.layers.heads import split_heads


class PerceiverSelfAttention(upstream.PerceiverSelfAttention):
    """hidden_states (B, M, Cq), inputs (B, N, Ckv), float inputs_mask (B, 1, 1, N); v may have other channels."""

    @staticmethod
    def crossattn_reason(module: nn.Module) -> str | None:
        # the constructor keeps no flag; only a cross-attention normalises its inputs
        return "self-attention" if isinstance(module.layernorm2, nn.Identity) else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inputs: Tensor | None = None,
        inputs_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        inputs = self.layernorm2(inputs)
        q, k, v = (
            split_heads(x, self.num_heads)
            for x in (self.query(self.layernorm1(hidden_states)), self.key(inputs), self.value(inputs))
        )
        y, weights = attend(q, k, v, inputs_mask, dropout=self.dropout, weights=output_attentions)
        return (y,) if weights is None else (y, weights)
