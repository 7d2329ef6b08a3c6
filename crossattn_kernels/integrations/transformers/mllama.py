"""Llama 3.2 Vision: its mask of text rows and image tiles reaches the kernel as one bit per tile.

Upstream repeats every bit of the mask for each of the 1025 or 1601 tokens of a tile and makes it a float.  Here the
same function makes it for one token a tile, and a `Mask` says how many keys a bit stands for.

Rows are what they are upstream: text that may see no tile attends to all of them, and loses the feed-forward branch of
the gated layer, not the attention branch.  One thing is not reproduced: without a mask, upstream's "sdpa" takes
cross-attention for causal (https://github.com/huggingface/transformers/issues/48172); here, as with upstream's
"eager", every row then sees every key.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.mllama import modeling_mllama as upstream

from crossattn_kernels.integrations.reports import HERE
from crossattn_kernels.masks import Mask


class MllamaModel(upstream.MllamaModel):
    """Keeps the mask of tiles compact and hands it to the text model beside the arguments that upstream passes."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        aspect_ratio_mask: Tensor | None = None,
        aspect_ratio_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        **rest: Any,
    ) -> Any:
        if cross_attention_mask is not None and _all_run_here(self.language_model):
            text = input_ids if input_ids is not None else rest["inputs_embeds"]
            visible = _of_these_tokens(cross_attention_mask, text.shape[1], rest.get("past_key_values"))
            rest["crossattn_tiles"] = tile_mask(visible, self.vision_model.num_patches, self.dtype)
            cross_attention_mask = None
        return super().forward(
            input_ids, pixel_values, aspect_ratio_mask, aspect_ratio_ids, attention_mask, cross_attention_mask, **rest
        )


class MllamaTextModel(upstream.MllamaTextModel):
    """Gives its layers the compact mask where upstream gives them the dense one."""

    def forward(self, *args: Any, crossattn_tiles: tuple[Mask, Tensor] | None = None, **rest: Any) -> Any:
        if crossattn_tiles is not None:
            rest["cross_attention_mask"], rest["full_text_row_masked_out_mask"] = crossattn_tiles
        return super().forward(*args, **rest)


def _all_run_here(text: upstream.MllamaTextModel) -> bool:
    """False once `set_attn_implementation` has named something else, which reads no `Mask`."""
    layers = (text.layers[i] for i in text.cross_attention_layers)
    return all(layer.cross_attn.config._attn_implementation == HERE for layer in layers)


def tile_mask(visible: Tensor, tokens: int, dtype: Any) -> tuple[Mask, Tensor]:
    """(mask, rows) of `visible`, (B, T, images, tiles), 1 where text may see a tile of `tokens` keys.

    rows: (B, 1, T, 1) in `dtype`, 0 for text that may see no tile, as upstream gives it to the feed-forward branch.
    """
    added, rows = upstream._prepare_cross_attention_mask(visible, num_vision_tokens=1, dtype=dtype)
    return Mask.groups(added == 0, 1, tokens), rows


def _of_these_tokens(mask: Tensor, length: int, cache: Any) -> Tensor:
    """The rows of the tokens at hand, when a call with a cache gives the mask of the whole text."""
    if mask.shape[1] == length:
        return mask
    past = int(cache.get_seq_length()) if cache is not None else 0
    return mask[:, past : past + length]
