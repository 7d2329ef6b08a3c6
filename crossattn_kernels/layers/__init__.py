"""Layers built on `cross_attention`: plain `nn.Module`s whose projections are called, never read."""

from crossattn_kernels.layers.bidirectional import BidirectionalCrossAttention, BiMultiheadAttention
from crossattn_kernels.layers.cross_attention import ContextCache, CrossAttention
from crossattn_kernels.layers.gated import GatedCrossAttentionBlock
from crossattn_kernels.layers.multihead import MultiheadCrossAttention
from crossattn_kernels.layers.perceiver import PerceiverResampler
from crossattn_kernels.layers.pooling import AttentionPooling, AttentionPooling2d, ProbePooling
from crossattn_kernels.layers.qformer import QFormerLayer

__all__ = [
    "AttentionPooling",
    "AttentionPooling2d",
    "BiMultiheadAttention",
    "BidirectionalCrossAttention",
    "ContextCache",
    "CrossAttention",
    "GatedCrossAttentionBlock",
    "MultiheadCrossAttention",
    "PerceiverResampler",
    "ProbePooling",
    "QFormerLayer",
]
