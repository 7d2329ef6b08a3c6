"""A layer of BLIP-2's Q-Former: learned queries that look at each other, then at the image."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from crossattn_kernels.layers.bert import AddAndNorm, ProjectedAttention, reset_bert
from crossattn_kernels.layers.cross_attention import check_input
from crossattn_kernels.layers.heads import check_positive
from crossattn_kernels.masks import Mask, check_integer


class QFormerAttention(nn.Module):
    """Attention, output projection, residual and normalisation: one of the two attentions of a `QFormerLayer`."""

    def __init__(
        self, dim: int, context_dim: int, heads: int, attention_dropout: float, dropout: float, eps: float, **place: Any
    ) -> None:
        super().__init__()
        self.attention = ProjectedAttention(dim, context_dim, heads, attention_dropout, **place)
        self.output = AddAndNorm(dim, dim, dropout, eps, **place)

    def forward(self, x: Tensor, context: Tensor, mask: Mask | Tensor | None) -> Tensor:
        return self.output(self.attention(x, context, mask), x)


class QFormerLayer(nn.Module):
    """Self-attention of queries and text, cross-attention of the queries to an image, feed-forward; post-normalised.

    dim, heads: width of queries and text, and its number of heads.
    context_dim: width of the image's features; default dim.
    hidden_dim: width inside the feed-forward; default 4 * dim.
    layer_idx, cross_attention_frequency: the layer has cross-attention if its index is a multiple of the frequency.
    text_feed_forward: whether there is a feed-forward for text, besides the one for queries.
    attention_dropout, dropout: shares dropped of the probabilities, and before each residual sum, in training.
    eps: of the normalisations.

    Parameters have the names of transformers' `Blip2QFormerLayer`.  Initialisation: weights from N(0, 0.02²), biases 0.
    Source: BLIP-2, https://arxiv.org/abs/2301.12597, section 3.1.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        context_dim: int | None = None,
        hidden_dim: int | None = None,
        *,
        layer_idx: int = 0,
        cross_attention_frequency: int = 2,
        text_feed_forward: bool = False,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(cross_attention_frequency=cross_attention_frequency)
        self.has_cross_attention = layer_idx % cross_attention_frequency == 0
        context_dim, hidden_dim = context_dim or dim, hidden_dim or 4 * dim
        check_positive(dim=dim, context_dim=context_dim, hidden_dim=hidden_dim)
        place: dict[str, Any] = dict(device=device, dtype=dtype)
        rest = (heads, attention_dropout, dropout, eps)
        self.attention = QFormerAttention(dim, dim, *rest, **place)
        if self.has_cross_attention:
            self.crossattention = QFormerAttention(dim, context_dim, *rest, **place)
        if text_feed_forward:
            self.intermediate, self.output = _feed_forward(dim, hidden_dim, dropout, eps, **place)
        self.intermediate_query, self.output_query = _feed_forward(dim, hidden_dim, dropout, eps, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_bert(self)

    def extra_repr(self) -> str:
        return f"cross_attention={self.has_cross_attention}, text_feed_forward={hasattr(self, 'intermediate')}"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Mask | Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Mask | Tensor | None = None,
        query_length: int | None = None,
    ) -> Tensor:
        """
        hidden_states: (B, M, dim), `query_length` queries and then text; queries alone may be (1, M, dim), for all
            entries of a batch of images.
        encoder_hidden_states: (B, N, context_dim), the image; a layer with cross-attention needs it for its queries.
        attention_mask, encoder_attention_mask: over hidden_states and over the image, a `Mask` or a tensor as
            `cross_attention` takes it; for padding, `Mask.key_padding(keep)` with keep bool (B, M) or (B, N).
            A row that may see nothing gets 0 from the attention, as under PyTorch's SDPA.
        query_length: how many of the M rows are queries, from 0 to M; default all.

        Returns (B, M, dim).  Raises ValueError if the image, or the feed-forward for text, is missing, or if
        query_length is out of range.
        """
        inner = self.attention.attention
        check_input("hidden_states", hidden_states, ("B", "M", inner.dim), inner.query)
        x = self.attention(hidden_states, hidden_states, attention_mask)
        count = x.shape[1] if query_length is None else query_length
        check_integer("query_length", count)
        if not 0 <= count <= x.shape[1]:
            raise ValueError(f"query_length must be from 0 to {x.shape[1]}, got {query_length}")
        queries, text = x[:, :count], x[:, count:]
        if text.shape[1] and not hasattr(self, "intermediate"):
            raise ValueError(
                f"hidden_states {tuple(x.shape)} has {text.shape[1]} rows of text after query_length={count} queries, "
                "but the layer was made with text_feed_forward=False"
            )
        if self.has_cross_attention and count:
            if encoder_hidden_states is None:
                raise ValueError("encoder_hidden_states must be given: this layer has cross-attention")
            inner = self.crossattention.attention
            check_input("encoder_hidden_states", encoder_hidden_states, ("B", "N", inner.context_dim), inner.key)
            queries = self.crossattention(queries, encoder_hidden_states, encoder_attention_mask)
        rows = []
        if count:
            rows.append(self.output_query(self.intermediate_query(queries), queries))
        if text.shape[1]:
            rows.append(self.output(self.intermediate(text), text))
        return torch.cat(rows, 1) if len(rows) > 1 else (rows or [x])[0]


def _feed_forward(
    dim: int, hidden_dim: int, dropout: float, eps: float, **place: Any
) -> tuple[nn.Sequential, AddAndNorm]:
    rise = OrderedDict(dense=nn.Linear(dim, hidden_dim, **place), activation=nn.GELU())
    return nn.Sequential(rise), AddAndNorm(hidden_dim, dim, dropout, eps, **place)
