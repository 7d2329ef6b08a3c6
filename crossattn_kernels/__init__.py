"""Fused, tiled, memory-efficient cross-attention for PyTorch: one call, `cross_attention`, forward and backward."""

from crossattn_kernels.chunked import cross_attention_chunked
from crossattn_kernels.functional import cross_attention, explain
from crossattn_kernels.masks import Mask

__version__ = "0.1.0"
__all__ = ["Mask", "cross_attention", "cross_attention_chunked", "explain"]
