"""The two blocks of which BERT's descendants are made, with its parameter names: Q-Former and LXMERT use them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from crossattn_kernels.functional import cross_attention
from crossattn_kernels.layers.heads import check_heads, merge_heads, split_heads
from crossattn_kernels.masks import Mask


class ProjectedAttention(nn.Module):
    """Attention of x to a context through three projections, `query`, `key` and `value`, without one behind it.

    x: (1|B, M, dim)   context: (1|B, N, context_dim)   result: (B, M, dim)
    mask and empty_rows: as `cross_attention` takes them.  dropout: share of the probabilities dropped in training.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, dropout: float = 0.0, **place: Any) -> None:
        super().__init__()
        check_heads("dim", dim, heads)
        self.dim, self.context_dim = dim, context_dim
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, dim, **place)
        self.key = nn.Linear(context_dim, dim, **place)
        self.value = nn.Linear(context_dim, dim, **place)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dropout={self.dropout}"

    def forward(self, x: Tensor, context: Tensor, mask: Mask | Tensor | None, empty_rows: str = "zero") -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in (self.query(x), self.key(context), self.value(context)))
        dropout_p = self.dropout if self.training else 0.0
        return merge_heads(cross_attention(q, k, v, mask, dropout_p=dropout_p, empty_rows=empty_rows))


class AddAndNorm(nn.Module):
    """LayerNorm(residual + dropout(dense(x))).

    x: (B, M, hidden_dim)   residual: (1|B, M, dim)   result: (B, M, dim)
    """

    def __init__(self, hidden_dim: int, dim: int, dropout: float = 0.0, eps: float = 1e-12, **place: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_dim, dim, **place)
        self.LayerNorm = nn.LayerNorm(dim, eps=eps, **place)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


def reset_bert(module: nn.Module) -> None:
    """Weights drawn from N(0, 0.02²), biases 0, normalisations the identity: BERT's initialisation."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
