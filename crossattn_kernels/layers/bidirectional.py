"""Two sequences that look at each other: LXMERT's shared attention and GroundingDINO's shared scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crossattn_kernels.functional import cross_attention
from crossattn_kernels.layers.bert import AddAndNorm, ProjectedAttention, reset_bert
from crossattn_kernels.layers.cross_attention import check_input
from crossattn_kernels.layers.heads import check_heads, check_positive, merge_heads, split_heads
from crossattn_kernels.masks import Mask
from crossattn_kernels.problem import check_dense

# what LXMERT's whole layer holds besides its cross-attention
LXMERT_REST = ("lang_self_att.", "visn_self_att.", "lang_inter.", "lang_output.", "visn_inter.", "visn_output.")


class BidirectionalCrossAttention(nn.Module):
    """One attention used both ways, language to vision and vision to language; post-normalised, with residuals.

    dim, heads: width of both sequences, and its number of heads.
    attention_dropout, dropout: shares dropped of the probabilities, and before the residual sums, in training.
    eps: of the normalisation.

    Loads the state dict of transformers' `LxmertCrossAttentionLayer`, and its part of that of `LxmertXLayer`.
    Initialisation: weights from N(0, 0.02²), biases 0.
    Source: LXMERT, https://arxiv.org/abs/1908.07490, section 2.2.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = dict(device=device, dtype=dtype)
        self.att = ProjectedAttention(dim, dim, heads, attention_dropout, **place)
        self.output = AddAndNorm(dim, dim, dropout, eps, **place)
        self.register_load_state_dict_pre_hook(_take_cross_attention)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_bert(self)

    def forward(
        self,
        language: Tensor,
        vision: Tensor,
        language_mask: Mask | Tensor | None = None,
        vision_mask: Mask | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        language: (B, M, dim)   vision: (B, N, dim)
        language_mask, vision_mask: which of that sequence's rows the other may see, a `Mask` or a tensor as
            `cross_attention` takes it; for padding, `Mask.key_padding(keep)` with keep bool (B, M) or (B, N).
            Who may see nothing gets the mean over everything, as in transformers; its additive mask, of finfo.min for
            padding, gives also the gradients that it has there.

        Returns (language, vision), of the shapes given.
        """
        check_input("language", language, ("B", "M", self.att.dim), self.att.query)
        check_input("vision", vision, ("B", "N", self.att.dim), self.att.query)
        return self._look(language, vision, vision_mask), self._look(vision, language, language_mask)

    def _look(self, x: Tensor, context: Tensor, mask: Mask | Tensor | None) -> Tensor:
        return self.output(self.att(x, context, mask, empty_rows="uniform"), x)


def _take_cross_attention(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
) -> None:
    """Of the state of LXMERT's whole layer, what lies under `visual_attention.`, and nothing else."""
    whole = f"{prefix}visual_attention."
    if not any(name.startswith(whole) for name in state):
        return
    for name in [name for name in state if name.startswith(prefix)]:
        if name.startswith(whole):
            state[prefix + name.removeprefix(whole)] = state.pop(name)
        elif name.startswith(tuple(prefix + part for part in LXMERT_REST)):
            del state[name]


class BiMultiheadAttention(nn.Module):
    """Vision to text and text to vision from one set of scores s = scale * vision_proj(vision) text_proj(text)ᵀ.

    Vision takes the softmax over text, text the softmax over vision, each of values of its own:
        vision' = out_vision(softmax(s) values_text(text)),   text' = out_text(softmax(sᵀ) values_vision(vision))

    vision_dim, text_dim: widths of the two.  embed_dim: width of all heads together.  heads: how many.
    dropout: share of the probabilities dropped in training, drawn for each direction.

    Parameters have the names of transformers' `GroundingDinoBiMultiHeadAttention`.
    Initialisation: weights Xavier uniform, biases 0.
    Source: Grounding DINO, https://arxiv.org/abs/2303.05499, its feature enhancer; GLIP, https://arxiv.org/abs/2112.03857.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        embed_dim: int,
        heads: int,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(vision_dim=vision_dim, text_dim=text_dim)
        check_heads("embed_dim", embed_dim, heads)
        self.vision_dim, self.text_dim = vision_dim, text_dim
        self.heads, self.dropout = heads, dropout
        place: dict[str, Any] = dict(device=device, dtype=dtype)
        self.vision_proj = nn.Linear(vision_dim, embed_dim, **place)
        self.text_proj = nn.Linear(text_dim, embed_dim, **place)
        self.values_vision_proj = nn.Linear(vision_dim, embed_dim, **place)
        self.values_text_proj = nn.Linear(text_dim, embed_dim, **place)
        self.out_vision_proj = nn.Linear(embed_dim, vision_dim, **place)
        self.out_text_proj = nn.Linear(embed_dim, text_dim, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in self.children():
            if isinstance(projection, nn.Linear):
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dropout={self.dropout}"

    def forward(
        self,
        vision: Tensor,
        text: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        vision: (B, M, vision_dim)   text: (B, N, text_dim)
        vision_attention_mask, text_attention_mask: bool (B, M) and (B, N), True for padding.  Who sees nothing but
            padding gets the bias of its output projection, where transformers' class returns NaN.

        Returns (vision, text), of the shapes given, without residuals.  Raises ValueError for other shapes and masks.
        """
        check_input("vision", vision, ("B", "M", self.vision_dim), self.vision_proj)
        check_input("text", text, ("B", "N", self.text_dim), self.text_proj)
        vision_seen = _seen("vision_attention_mask", vision_attention_mask, vision)
        text_seen = _seen("text_attention_mask", text_attention_mask, text)
        # they ask in one direction and are asked in the other
        vision_key, text_key = self._split(self.vision_proj(vision)), self._split(self.text_proj(text))
        vision_value = self._split(self.values_vision_proj(vision))
        text_value = self._split(self.values_text_proj(text))
        dropout_p = self.dropout if self.training else 0.0
        to_vision = cross_attention(vision_key, text_key, text_value, text_seen, dropout_p=dropout_p)
        to_text = cross_attention(text_key, vision_key, vision_value, vision_seen, dropout_p=dropout_p)
        return self.out_vision_proj(merge_heads(to_vision)), self.out_text_proj(merge_heads(to_text))

    def _split(self, x: Tensor) -> Tensor:
        return split_heads(x, self.heads)


def _seen(name: str, padding: Tensor | None, x: Tensor) -> Mask | None:
    if padding is None:
        return None
    check_dense(**{name: padding})
    if padding.dtype != torch.bool or padding.ndim != 2 or padding.shape[1] != x.shape[1]:
        wanted = f"bool ({x.shape[0]}, {x.shape[1]}), True for padding"
        raise ValueError(f"{name} must be {wanted}, got {padding.dtype} {tuple(padding.shape)}")
    return Mask.key_padding(~padding)
