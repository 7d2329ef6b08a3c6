"""`MultiheadCrossAttention`: `nn.MultiheadAttention` on `cross_attention`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossattn_kernels.functional import autocasts, cross_attention
from crossattn_kernels.layers.heads import merge_heads, split_heads
from crossattn_kernels.maps import attention_weights
from crossattn_kernels.masks import Mask
from crossattn_kernels.problem import check_dense, fits


class MultiheadCrossAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention`: same constructor, initialisation, state dict, forward arguments and results.

    It adds no state, so a live module becomes one by `module.__class__ = MultiheadCrossAttention`, and back again.
    `out_proj` is called, so an adapter may replace it; the input projections are parameters of the module itself.
    Nothing of size L x S is made but weights that are asked for, and copies of an attn_mask of that size.

    What differs:
        a query that sees no key takes 0 from attention, and its weights are 0; `nn.MultiheadAttention` gives NaN with
            need_weights=True and with bool or -inf masks;
        weights that are returned are those before dropout;
        is_causal hides no key of `add_bias_kv` or `add_zero_attn`; `nn.MultiheadAttention` hides them with
            need_weights=False and no key_padding_mask;
        a query of batch 1 serves every batch entry of key and value;
        nested tensors are refused, and there is no other path for inference.
    Source: https://arxiv.org/abs/1706.03762.
    """

    def reset_parameters(self) -> None:
        """Draws new weights as the constructor does: projections Xavier uniform, biases 0, `bias_k` Xavier normal."""
        self.out_proj.reset_parameters()
        self._reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights): the output has the layout of query, weights are None unless need_weights.

        query: (L, N, embed_dim)   key: (S, N, kdim)   value: (S, N, vdim);   with batch_first: (N, L, ...), (N, S, ...)
            or all without a batch: (L, embed_dim), (S, kdim), (S, vdim).
        key_padding_mask: (N, S), or (S,) without a batch; bool, True hides the key; or float, added to the logits.
        attn_mask: (L, S) or (N * num_heads, L, S); bool, True hides the key; or float, added to the logits.
        need_weights: return also the weights, (N, L, S), or (N, num_heads, L, S) with average_attn_weights=False, and
            without N if there is no batch; a key for `add_bias_kv` and one for `add_zero_attn` come after the others.
        is_causal: says that attn_mask, which must be there, hides key j from query i where j > i.

        Raises ValueError for shapes and TypeError for types of masks.
        """
        self._check(query, key, value)
        batched = query.ndim == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q[None], k[None], v[None]
            key_padding_mask = key_padding_mask[None] if isinstance(key_padding_mask, Tensor) else key_padding_mask
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask, which is None")
        # torch relies on the hint only where it does not need attn_mask for something else
        hint = is_causal and key_padding_mask is None and not need_weights
        sizes = k.shape[0], self.num_heads, q.shape[1], k.shape[1]
        mask, bias = self._masks(key_padding_mask, attn_mask, hint, *sizes)

        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
        dropout_p = self.dropout if self.training else 0.0
        y = merge_heads(cross_attention(q, k, v, mask, bias=bias, dropout_p=dropout_p))
        if not batched:
            y = y[0]
        elif not self.batch_first:
            y = y.transpose(0, 1)
        output = self.out_proj(y)
        if not need_weights:
            return output, None

        weights = attention_weights(q, k, mask, bias=bias)
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights if batched else weights[0]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias, width = self.in_proj_bias, self.embed_dim
        if self.in_proj_weight is not None and key is value:
            # one product reads what key and value share
            q = F.linear(query, self.in_proj_weight[:width], None if bias is None else bias[:width])
            both = F.linear(key, self.in_proj_weight[width:], None if bias is None else bias[width:])
            k, v = both.chunk(2, -1)
            return q, k, v
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases))
        return q, k, v

    def _masks(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, causal: bool, B: int, H: int, M: int, N: int
    ) -> tuple[Mask, Tensor | None]:
        """(mask, bias): what bools hide, and the sum of what floats add."""
        added = (self.bias_k is not None) + self.add_zero_attn  # keys at the end, which every query sees
        mask, bias = Mask(), None
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, (M, N), (B * H, M, N))
            t = F.pad(attn_mask, (0, added))
            t = t[None, None] if t.ndim == 2 else t.unflatten(0, (B, H))
            if causal and not added:
                mask = Mask.causal(M, N, device=t.device)
            elif t.dtype == torch.bool:
                mask = Mask.groups(~t)
            else:
                bias = t
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, (B, N))
            t = F.pad(key_padding_mask, (0, added))
            if t.dtype == torch.bool:
                mask = mask & Mask.key_padding(~t)
            else:
                bias = t[:, None, None] if bias is None else bias + t[:, None, None]
        return mask, bias

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        given = dict(query=query, key=key, value=value)
        if any(isinstance(t, Tensor) and t.is_nested for t in given.values()):
            raise ValueError("nested tensors are not supported: pass padded ones and key_padding_mask")
        check_dense(**given)
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
            raise ValueError(f"query, key and value must all have 3 dimensions, or 2 without a batch: {_shapes(given)}")
        dtype = (self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight).dtype
        for (name, t), channels in zip(given.items(), (self.embed_dim, self.kdim, self.vdim)):
            if t.shape[-1] != channels:
                raise ValueError(f"the last size of {name} must be {channels}: {_shapes(given)}")
            if t.dtype != dtype and not (t.is_floating_point() and autocasts(t)):
                raise TypeError(f"{name} must be {dtype}, as the weights, got {t.dtype}: {_shapes(given)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"key and value must have one batch and one length: {_shapes(given)}")
        axis = 0 if self.batch_first else 1
        if query.ndim == 3 and not fits(query.shape[axis], key.shape[axis]):
            raise ValueError(f"the batch of query must be that of key, or 1: {_shapes(given)}")

    def extra_repr(self) -> str:
        said = f"{self.embed_dim}, {self.num_heads}, kdim={self.kdim}, vdim={self.vdim}"
        said += f", dropout={self.dropout}" if self.dropout else ""
        said += ", bias=False" if self.in_proj_bias is None else ""
        said += "" if self.bias_k is None else ", add_bias_kv=True"
        said += ", add_zero_attn=True" if self.add_zero_attn else ""
        return said + f", batch_first={self.batch_first}"


def _shapes(given: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} is {tuple(t.shape)}" for name, t in given.items())


def _check_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a tensor of bools or floats, got {got}")
    if not any(mask.shape == shape for shape in shapes):  # not `in`, see `fits`
        raise ValueError(f"{name} must have the shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
