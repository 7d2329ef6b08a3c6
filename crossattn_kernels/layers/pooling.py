"""Attention pooling: a few queries read all tokens.  The heads of CoCa, SigLIP and CLIP's ResNets, with their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from crossattn_kernels.functional import cross_attention
from crossattn_kernels.layers.cross_attention import check_input, reset
from crossattn_kernels.layers.heads import check_heads, check_positive, merge_heads, split_heads
from crossattn_kernels.layers.multihead import MultiheadCrossAttention
from crossattn_kernels.problem import typed


class AttentionPooling(nn.Module):
    """CoCa's AttentionalPooler: learned queries read a context; the batch shares them without a copy.

    d_model, context_dim: channels of the queries, which are those of the result, and of the context.
    n_head, n_queries: attention heads, and learned queries.
    norm_layer: called as norm_layer(channels, device=..., dtype=...) for the queries and for the context.

    Initialisation: queries from the standard normal distribution; `MultiheadCrossAttention`; norms their own.
    State dict, open_clip's: query (n_queries, d_model), attn (as `nn.MultiheadAttention`), ln_q, ln_k.
    Source: https://arxiv.org/abs/2205.01917, section 3.2.
    """

    def __init__(
        self,
        d_model: int,
        context_dim: int,
        n_head: int = 8,
        n_queries: int = 256,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = dict(device=device, dtype=dtype)
        check_positive(context_dim=context_dim, n_queries=n_queries)
        self.query = nn.Parameter(torch.empty(n_queries, d_model, **place))
        self.attn = MultiheadCrossAttention(
            d_model, n_head, kdim=context_dim, vdim=context_dim, batch_first=True, **place
        )
        self.ln_q = norm_layer(d_model, **place)
        self.ln_k = norm_layer(context_dim, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights, see "Initialisation"."""
        nn.init.normal_(self.query)
        reset(self.attn, self.ln_q, self.ln_k)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, context_dim) -> (B, n_queries, d_model).  key_padding_mask: (B, N), as `nn.MultiheadAttention`'s."""
        check_input("x", x, ("B", "N", self.attn.kdim))
        x = self.ln_k(x)
        query = self.ln_q(self.query)[None]
        output: Tensor = self.attn(query, x, x, key_padding_mask, need_weights=False)[0]
        return output

    def extra_repr(self) -> str:
        return f"n_queries={self.query.shape[0]}, d_model={self.query.shape[1]}"


class ProbePooling(nn.Module):
    """SigLIP's MultiheadAttentionPoolingHead: one learned query reads the tokens; an MLP with a residual follows.

    hidden_size, num_heads: channels, and attention heads; intermediate_size: channels within the MLP, None for 4 times
    hidden_size; layer_norm_eps: of the norm before the MLP, whose activation is GELU with the tanh approximation.

    Initialisation: probe from the standard normal distribution; `MultiheadCrossAttention`; norm and MLP as torch's.
    State dict, transformers': probe (1, 1, hidden_size), attention (as `nn.MultiheadAttention`), layernorm, mlp.fc1,
    mlp.fc2.
    Sources: SigLIP, https://arxiv.org/abs/2303.15343; the head, https://arxiv.org/abs/2106.04560.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int | None = None,
        layer_norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = dict(device=device, dtype=dtype)
        inner = intermediate_size or 4 * hidden_size
        check_positive(intermediate_size=inner)
        self.probe = nn.Parameter(torch.empty(1, 1, hidden_size, **place))
        self.attention = MultiheadCrossAttention(hidden_size, num_heads, batch_first=True, **place)
        self.layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps, **place)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(hidden_size, inner, **place))
        self.mlp.add_module("activation", nn.GELU("tanh"))
        self.mlp.add_module("fc2", nn.Linear(inner, hidden_size, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights, see "Initialisation"."""
        nn.init.normal_(self.probe)
        reset(self.attention, self.layernorm, *self.mlp)

    def forward(self, hidden_state: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, hidden_size) -> (B, hidden_size).  key_padding_mask: (B, N), as `nn.MultiheadAttention`'s."""
        check_input("hidden_state", hidden_state, ("B", "N", self.attention.kdim))
        y = self.attention(self.probe, hidden_state, hidden_state, key_padding_mask, need_weights=False)[0][:, 0]
        output: Tensor = y + self.mlp(self.layernorm(y))
        return output

    def extra_repr(self) -> str:
        return f"hidden_size={self.probe.shape[2]}"


class AttentionPooling2d(nn.Module):
    """CLIP's AttentionPool2d: the mean of a feature map reads the mean and every place of the map.

    spacial_dim: height and width of the map (CLIP spells it so); embed_dim: its channels; num_heads: attention heads;
    output_dim: channels of the result, None for embed_dim.

    Initialisation: positions normal with variance 1 / embed_dim; projections as nn.Linear.
    State dict, CLIP's and open_clip's: positional_embedding (spacial_dim ** 2 + 1, embed_dim), q_proj, k_proj, v_proj,
    c_proj.
    Source: https://arxiv.org/abs/2103.00020, section 2.4.
    """

    def __init__(
        self,
        spacial_dim: int,
        embed_dim: int,
        num_heads: int,
        output_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = dict(device=device, dtype=dtype)
        check_positive(spacial_dim=spacial_dim, output_dim=output_dim or embed_dim)
        check_heads("embed_dim", embed_dim, num_heads, "num_heads")
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.empty(spacial_dim**2 + 1, embed_dim, **place))
        self.k_proj = nn.Linear(embed_dim, embed_dim, **place)
        self.q_proj = nn.Linear(embed_dim, embed_dim, **place)
        self.v_proj = nn.Linear(embed_dim, embed_dim, **place)
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights, see "Initialisation"."""
        nn.init.normal_(self.positional_embedding, std=self.positional_embedding.shape[1] ** -0.5)
        reset(self.q_proj, self.k_proj, self.v_proj, self.c_proj)

    def forward(self, x: Tensor) -> Tensor:
        """(B, embed_dim, spacial_dim, spacial_dim) -> (B, output_dim)."""
        typed("x", x, "floats")
        places, channels = self.positional_embedding.shape
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] * x.shape[3] != places - 1:
            raise ValueError(f"x must be a map of {channels} channels and {places - 1} places, got {tuple(x.shape)}")
        x = x.flatten(2).mT  # (B, N, embed_dim)
        check_input("x", x, ("B", "N", channels), self.q_proj)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding.to(x.dtype)
        q, k, v = (
            split_heads(project(t), self.num_heads)
            for project, t in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        output: Tensor = self.c_proj(merge_heads(cross_attention(q, k, v))[:, 0])
        return output

    def extra_repr(self) -> str:
        places, channels = self.positional_embedding.shape
        return f"{places} positions, embed_dim={channels}, num_heads={self.num_heads}"
