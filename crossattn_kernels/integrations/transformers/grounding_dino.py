"""GroundingDINO, https://arxiv.org/abs/2303.05499, and MM-GroundingDINO, https://arxiv.org/abs/2401.02361.

The library computes all weights in every call and drops them above unless `output_attentions` is set.  Here the module
that is told passes it on (`weights_wanted`), and weights that nobody asked for are None.
"""

from __future__ import annotations

from torch import Tensor
from transformers.models.grounding_dino import modeling_grounding_dino as upstream
from transformers.models.mm_grounding_dino import modeling_mm_grounding_dino as upstream_mm

from crossattn_kernels.integrations.transformers.attending import (
    are_weights_wanted,
    attend,
    telling,
)
from crossattn_kernels.layers.heads import split_heads
from crossattn_kernels.masks import Mask


class GroundingDinoBiMultiHeadAttention(upstream.GroundingDinoBiMultiHeadAttention):
    """Image to text and text to image: two softmaxes, along rows and along columns, of one matrix of scores.

    vision_features (B, M, C), text_features (B, N, C); masks bool (B, M) and (B, N), True is padding.  The library
    subtracts the largest score of the batch and clamps at 50000 before each softmax, which changes no weight.  Where
    one side is all padding the library returns NaN and this returns 0 before the output projection.
    """

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        vision, text, vision_values, text_values = (
            split_heads(x, self.num_heads)
            for x in (
                self.vision_proj(vision_features),
                self.text_proj(text_features),
                self.values_vision_proj(vision_features),
                self.values_text_proj(text_features),
            )
        )
        dropout = float(self.dropout) if self.training else 0.0
        wanted = are_weights_wanted(self)
        to_text, to_vision = (
            attend(q, k, v, _visible(padding), scale=self.scale, dropout=dropout, weights=wanted)
            for q, k, v, padding in (
                (vision, text, text_values, text_attention_mask),
                (text, vision, vision_values, vision_attention_mask),
            )
        )
        return (
            (self.out_vision_proj(to_text[0]), _by_head(to_text[1])),
            (self.out_text_proj(to_vision[0]), _by_head(to_vision[1])),
        )


def _visible(padding: Tensor | None) -> Mask | None:
    return None if padding is None else Mask.key_padding(~padding)


def _by_head(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.flatten(0, 1)  # (B * H, M, N)


class GroundingDinoMultiheadAttention(upstream.GroundingDinoMultiheadAttention):
    """`encoder_attn_text` of a decoder layer: queries (B, M, C), keys, values (B, N, C), float mask to (B, H, M, N)."""

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor] | tuple[Tensor, Tensor | None]:
        q, k, v = (
            split_heads(x, self.num_attention_heads) for x in (self.query(queries), self.key(keys), self.value(values))
        )
        wanted = output_attentions and are_weights_wanted(self)
        y, weights = attend(q, k, v, attention_mask, dropout=self.dropout, weights=wanted)
        y = self.out_proj(y)
        return (y, weights) if output_attentions else (y,)


class GroundingDinoEncoder(upstream.GroundingDinoEncoder):
    """Its layers ask for weights and are not told whether anybody wants them."""

    forward = telling(upstream.GroundingDinoEncoder.forward)


class GroundingDinoDecoderLayer(upstream.GroundingDinoDecoderLayer):
    """The owner of `encoder_attn_text`."""

    forward = telling(upstream.GroundingDinoDecoderLayer.forward)


# ---- MM-GroundingDINO: the same modules under other names ----


class MMGroundingDinoBiMultiHeadAttention(upstream_mm.MMGroundingDinoBiMultiHeadAttention):
    """See `GroundingDinoBiMultiHeadAttention`."""

    forward = GroundingDinoBiMultiHeadAttention.forward


class MMGroundingDinoMultiheadAttention(upstream_mm.MMGroundingDinoMultiheadAttention):
    """See `GroundingDinoMultiheadAttention`."""

    forward = GroundingDinoMultiheadAttention.forward


class MMGroundingDinoEncoder(upstream_mm.MMGroundingDinoEncoder):
    """See `GroundingDinoEncoder`."""

    forward = telling(upstream_mm.MMGroundingDinoEncoder.forward)


class MMGroundingDinoDecoderLayer(upstream_mm.MMGroundingDinoDecoderLayer):
    """The owner of `encoder_attn_text`."""

    forward = telling(upstream_mm.MMGroundingDinoDecoderLayer.forward)
