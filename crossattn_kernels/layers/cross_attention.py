"""`CrossAttention`: a sequence reads another one; projections, norms and a gate around `cross_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crossattn_kernels.functional import autocasts, cross_attention
from crossattn_kernels.layers.heads import merge_heads, split_heads
from crossattn_kernels.masks import Mask, check_integer
from crossattn_kernels.problem import fits, one_of, typed


class ContextCache(NamedTuple):
    """A projected context: k and v are (B, kv_heads, N, head_dim); a batch of 1 serves every batch entry of x."""

    k: Tensor
    v: Tensor


class CrossAttention(nn.Module):
    """residual + gate * o_proj(attention of norm(x) to context_norm(context)).

    dim, context_dim: channels of x and of the context; context_dim=None means dim.
    heads, kv_heads: query heads, and key heads, which divide them (kv_heads=None: as many).
    head_dim: channels of a head; None means dim // heads.
    bias: whether the four projections have one.
    qk_norm: RMSNorm over the channels of each head of q and of k, after the projections (`q_norm`, `k_norm`; eps 1e-6).
    gate: None, or a learnt factor tanh(gate) which starts at 0, so that a new layer adds nothing:
        "scalar", (1,): one for the layer, as in Flamingo and Mllama;
        "head", (heads,): one a head, before `o_proj`, so that the bias of `o_proj`, if any, is not gated;
        "channel", (dim,): one a channel of the output, after `o_proj`, as Idefics' `alpha_type="vector"`.
    dropout: share of the attention weights dropped in training.
    norm, context_norm: what normalises x and the context: a class or a function called as norm(channels, device=...,
        dtype=...), e.g. `nn.LayerNorm`, `nn.RMSNorm` or `functools.partial(nn.LayerNorm, eps=1e-6)`; None: none.

    Initialisation: projections Xavier uniform with biases 0, norms their own, gates 0.
    State dict: norm, context_norm, q_proj, k_proj, v_proj, o_proj (each .weight and, with bias, .bias), q_norm.weight,
    k_norm.weight, gate; those which exist.
    Projections are called, so adapters, quantisation and sharding may replace them.
    Raises ValueError (sizes, names) and TypeError (types).
    Sources: attention, https://arxiv.org/abs/1706.03762; gates, https://arxiv.org/abs/2204.14198 (Flamingo);
    norms of q and k, https://arxiv.org/abs/2302.05442; shared key heads, https://arxiv.org/abs/2305.13245.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        gate: str | None = None,
        dropout: float = 0.0,
        norm: Callable[..., nn.Module] | None = nn.LayerNorm,
        context_norm: Callable[..., nn.Module] | None = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = dict(dim=dim, context_dim=context_dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        for name, n in sizes.items():
            if n is not None or name in ("dim", "heads"):
                check_integer(name, n)
        if heads < 1 or (head_dim is None and dim % heads):
            raise ValueError(f"heads must divide dim unless head_dim is given, got dim={dim} and heads={heads}")
        self.dim, self.context_dim = dim, dim if context_dim is None else context_dim
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        if min(self.dim, self.context_dim, self.head_dim) < 1:
            got = f"dim={dim}, context_dim={context_dim} and head_dim={head_dim}"
            raise ValueError(f"dim, context_dim and head_dim must be positive, got {got}")
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got heads={heads} and kv_heads={kv_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dropout = dropout
        self.gate_kind = one_of("gate", gate, (None, "scalar", "head", "channel"))

        place: dict[str, Any] = dict(device=device, dtype=dtype)
        inner, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.norm = norm(self.dim, **place) if norm else nn.Identity()
        self.context_norm = context_norm(self.context_dim, **place) if context_norm else nn.Identity()
        self.q_proj = nn.Linear(self.dim, inner, bias, **place)
        self.k_proj = nn.Linear(self.context_dim, shared, bias, **place)
        self.v_proj = nn.Linear(self.context_dim, shared, bias, **place)
        self.o_proj = nn.Linear(inner, self.dim, bias, **place)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **place) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **place) if qk_norm else nn.Identity()
        gates = {"scalar": 1, "head": heads, "channel": dim}
        self.gate = None if gate is None else nn.Parameter(torch.empty(gates[gate], **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights, see "Initialisation"."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        reset(self.norm, self.context_norm, self.q_norm, self.k_norm)
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def project_context(self, context: Tensor) -> ContextCache:
        """Keys and values of a context, (B, N, context_dim): for a fixed one, do it once and use it at every step.

        Gradients flow through what it returns.  It holds for this layer only.
        """
        check_input("context", context, ("batch", "sequence", self.context_dim), self.context_norm, self.k_proj)
        context = self.context_norm(context)
        return ContextCache(self.k_norm(self._split(self.k_proj(context))), self._split(self.v_proj(context)))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Mask | Tensor | None = None,
        *,
        residual: Tensor | None = None,
        context_cache: ContextCache | None = None,
    ) -> Tensor:
        """(B, M, dim): what x takes from the context, plus `residual`.

        x: (B, M, dim)   context: (B, N, context_dim), or instead `context_cache`, which `project_context` returned
        mask: a `Mask`, or a tensor with SDPA's meaning (bool: True may attend; float: added to the logits).
        residual: (B, M, dim), usually x; it is added within the output projection where that changes nothing.

        A batch of 1, of x, of the context or of the residual, serves every batch entry of the others.
        The same bits with a context and with its cache.  A query that sees no key takes 0 from attention.
        """
        check_input("x", x, ("batch", "sequence", self.dim), self.norm, self.q_proj)
        if context is not None and context_cache is None:
            context_cache = self.project_context(context)
        elif context is not None or context_cache is None:
            raise ValueError("give either context or context_cache, got " + ("neither" if context is None else "both"))
        elif not isinstance(context_cache, (tuple, list)) or len(context_cache) != 2:
            raise TypeError(f"context_cache must be a ContextCache, (k, v), got {type(context_cache).__name__}")
        k, v = context_cache
        full = (k.shape[0] if x.shape[0] == 1 else x.shape[0], *x.shape[1:])
        if residual is not None:
            check_input("residual", residual, ("batch", "sequence", self.dim))
            if residual.shape[1] != full[1] or not fits(residual.shape[0], full[0]):
                raise ValueError(f"residual must have the shape {full}, or a batch of 1, got {tuple(residual.shape)}")
        q = self.q_norm(self._split(self.q_proj(self.norm(x))))

        # one factor for all commutes with a product by a matrix, but not with a bias, nor with what an adapter may do
        folds = is_plain(self.o_proj) and self.o_proj.bias is None
        early = self.gate_kind == "head" or (self.gate_kind == "scalar" and folds)
        y = cross_attention(
            q, k, v, mask, gate=self.gate if early else None, dropout_p=self.dropout if self.training else 0.0
        )
        y = merge_heads(y)
        late = None if early else self.gate
        # under autocast the residual may be wider than the product, which must not round it
        if residual is not None and folds and late is None and (residual.shape, residual.dtype) == (full, y.dtype):
            return torch.addmm(residual.flatten(0, 1), y.flatten(0, 1), self.o_proj.weight.t()).view_as(residual)
        y = self.o_proj(y)
        if late is not None:
            y = late.tanh() * y
        return y if residual is None else residual + y

    def _split(self, x: Tensor) -> Tensor:
        # under tensor parallelism only some of the heads arrive
        return split_heads(x, x.shape[-1] // self.head_dim)

    def extra_repr(self) -> str:
        said = f"dim={self.dim}, context_dim={self.context_dim}, heads={self.heads}, kv_heads={self.kv_heads}"
        said += f", head_dim={self.head_dim}"
        said += "" if self.gate is None else f", gate={self.gate_kind!r}"
        return said + (f", dropout={self.dropout}" if self.dropout else "")


def check_input(name: str, x: Tensor, form: tuple[str | int, ...], *path: nn.Module) -> None:
    """One clear error before torch's from deep inside: x must be floats of the shape `form`, of which the last counts.

    path: what x goes through up to its projection, which takes one dtype where all of it is torch's own; another norm
    may return another dtype, and so may what an adapter or a hook makes of it.
    """
    typed(name, x, "floats")
    if x.ndim != len(form) or x.shape[-1] != form[-1]:
        raise ValueError(f"{name} must have the shape ({', '.join(map(str, form))}), got {tuple(x.shape)}")
    if not path or type(path[-1]) is not nn.Linear or x.dtype == path[-1].weight.dtype or autocasts(x):
        return
    if is_plain(path[-1]) and all(type(norm) in (nn.LayerNorm, nn.Identity) for norm in path[:-1]):
        wanted = path[-1].weight.dtype
        raise TypeError(f"{name} must be {wanted}, as the weights are, got {x.dtype} of shape {tuple(x.shape)}")


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is F.linear with its weight: no adapter, quantisation, sharding, hook or the like."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # accelerate replaces `forward` of the instance; a quantised or sharded weight is a subclass of Parameter
    untouched = type(module) is nn.Linear and "forward" not in vars(module) and not any(hooks)
    return untouched and type(module.weight) is nn.Parameter


def reset(*modules: nn.Module) -> None:
    """`reset_parameters` of each module that has it."""
    for module in modules:
        if callable(draw := getattr(module, "reset_parameters", None)):
            draw()
