"""OneFormer, https://arxiv.org/abs/2211.06220: the masked decoder of Mask2Former."""

from __future__ import annotations

from transformers.models.oneformer import modeling_oneformer as upstream

from crossattn_kernels.integrations.transformers.attending import telling


class OneFormerTransformerDecoderLayer(upstream.OneFormerTransformerDecoderLayer):
    """The owner of `cross_attn.multihead_attn`."""

    forward = telling(upstream.OneFormerTransformerDecoderLayer.forward)
