"""Who looked at what: the exact weights of a call, for those who ask for a tensor of size M x N."""

from __future__ import annotations

import torch
from torch import Tensor

from crossattn_kernels import reference
from crossattn_kernels.functional import autocast
from crossattn_kernels.masks import Mask
from crossattn_kernels.problem import canonical


def attention_weights(
    q: Tensor,
    k: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    empty_rows: str = "zero",
) -> Tensor:
    """The softmax weights (B, Hq, M, N) that `cross_attention` gives v, in q's dtype: its definition, differentiable.

    q: (B, Hq, M, D)   k: (B, Hk, N, D)   mask, bias, scale, softcap, empty_rows: as in `cross_attention`.
    Weights are those before dropout and gate.  A query that sees no key has weights 0 with empty_rows="zero".
    Memory grows as M x N: ask for it where the weights themselves are wanted.
    Raises ValueError and TypeError as `cross_attention` does.
    """
    q, k = autocast(q, k)
    x, options = canonical(q, k, k, mask, bias=bias, scale=scale, softcap=softcap, empty_rows=empty_rows)
    # as in the kernels: in 16 bits the logits would be rounded, and large ones would overflow
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = reference.probabilities(x._replace(q=x.q.to(wide), k=x.k.to(wide)), options)[0]
    return weights.to(q.dtype)
