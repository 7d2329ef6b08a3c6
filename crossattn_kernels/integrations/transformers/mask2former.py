"""Mask2Former, https://arxiv.org/abs/2112.01527: queries attend to the pixels of the mask that they predicted."""

from __future__ import annotations

from transformers.models.mask2former import modeling_mask2former as upstream

from crossattn_kernels.integrations.transformers.attending import telling


class Mask2FormerMaskedAttentionDecoderLayer(upstream.Mask2FormerMaskedAttentionDecoderLayer):
    """The owner of `cross_attn`.  A query whose mask is empty attends everywhere: the decoder resets it before."""

    forward = telling(upstream.Mask2FormerMaskedAttentionDecoderLayer.forward)
