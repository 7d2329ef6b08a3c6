"""Users of `nn.MultiheadAttention`: pooling heads and masked decoders, which take its weights and rarely want them."""

from __future__ import annotations

from torch import Tensor

from crossattn_kernels.integrations.transformers.attending import are_weights_wanted
from crossattn_kernels.layers.multihead import MultiheadCrossAttention


class MultiheadAttention(MultiheadCrossAttention):
    """`nn.MultiheadAttention` below a layer that says whether weights are wanted (`weights_wanted`)."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        need_weights = need_weights and self._are_weights_wanted()
        return super().forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    def _are_weights_wanted(self) -> bool:
        return are_weights_wanted(self)


class OutputOnly(MultiheadAttention):
    """`nn.MultiheadAttention` whose owner drops the weights: only a forward hook could see them."""

    def _are_weights_wanted(self) -> bool:
        return bool(self._forward_hooks)
