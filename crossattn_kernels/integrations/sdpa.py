"""PyTorch's own signature on `cross_attention`, and a switch that brings the calls of unchanged code to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from crossattn_kernels.functional import cross_attention
from crossattn_kernels.masks import Mask
from crossattn_kernels.problem import check_dense, fit, one_of, shapes


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, computed by `cross_attention`.

    query: (..., H, M, D)   key: (..., Hk, N, D)   value: (..., Hk, N, Dv)
        Two dimensions or more; those before the last two broadcast.  H and Hk may differ only with enable_gqa.
    attn_mask: bool (True may attend) or float (added to the logits, differentiable), broadcastable to (..., H, M, N).
    is_causal: query i sees keys up to i, also where M and N differ ("top-left").
    dropout_p, scale: as in `cross_attention`; the draw of the dropout is not torch's.

    Returns (..., H, M, Dv) in the dtype of query.  A query that may see no key gives 0 and no gradient.
    Raises ValueError and TypeError where torch raises RuntimeError: also for is_causal together with attn_mask, which
    torch documents as an error and some of its backends accept.
    """
    given = dict(query=query, key=key, value=value)
    check_dense(**given)
    if min(t.ndim for t in given.values()) < 2:
        raise ValueError(f"query, key and value must have at least 2 dimensions: {shapes(**given)}")
    if is_causal and attn_mask is not None:
        raise ValueError(f"is_causal does not go with attn_mask: {shapes(**given, attn_mask=attn_mask)}")
    flat = max(t.ndim for t in given.values()) == 2
    q, k, v = (t[None] if t.ndim == 2 else t for t in given.values())
    if not enable_gqa and len({t.shape[-3] for t in (q, k, v)} - {1}) > 1:
        raise ValueError(f"numbers of heads differ, which needs enable_gqa=True: {shapes(**given)}")
    q, k, v = _fit_heads(q, k, v, **given)
    lead = _broadcast(*(t.shape[:-3] for t in (q, k, v)), **given)
    mask: Mask | Tensor | None = attn_mask
    if is_causal:
        mask = Mask.causal(q.shape[-2], k.shape[-2], device=q.device)
    elif isinstance(attn_mask, Tensor) and len(lead) > 1 and attn_mask.ndim > 3:
        check_dense(attn_mask=attn_mask)
        mask = _one_batch(fit("attn_mask", attn_mask, (*lead, *q.shape[-3:-1], k.shape[-2]), **given), lead)
    q, k, v = (_one_batch(t, lead) for t in (q, k, v))
    y = cross_attention(q, k, v, mask, scale=scale, dropout_p=dropout_p)
    return y.reshape(y.shape[2:] if flat else (*lead, *y.shape[1:]))


def _broadcast(*sizes: torch.Size, **given: Tensor) -> torch.Size:
    try:
        return torch.broadcast_shapes(*sizes)
    except RuntimeError:
        raise ValueError(f"heads and batches of query, key and value must broadcast: {shapes(**given)}") from None


def _fit_heads(q: Tensor, k: Tensor, v: Tensor, **given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One number of heads, and one batch, for k and v; at least as many heads for q."""
    if k.shape[-3] != v.shape[-3] and 1 not in (k.shape[-3], v.shape[-3]):
        k, v = (t.repeat_interleave(q.shape[-3] // max(1, t.shape[-3]), -3) for t in (k, v))
    batch = _broadcast(k.shape[:-2], v.shape[:-2], **given)
    q = q.expand(*q.shape[:-3], batch[-1], -1, -1) if q.shape[-3] == 1 else q
    return q, k.expand(*batch, -1, -1), v.expand(*batch, -1, -1)


def _one_batch(t: Tensor, lead: Iterable[int]) -> Tensor:
    """(..., H, M, D) -> (1|B, H, M, D), where B is the product of `lead`."""
    lead = tuple(lead)
    t = t[(None,) * (len(lead) + 3 - t.ndim)]
    if len(lead) == 1:
        return t
    if t.shape[:-3].numel() == 1:
        return t.reshape(1, *t.shape[-3:])
    return t.expand(*lead, -1, -1, -1).flatten(0, -4)


# ---- everybody's calls ----

TORCHS_OWN = F.scaled_dot_product_attention


class sdpa_override(TorchFunctionMode):
    """`with sdpa_override():` any PyTorch code's cross-attention runs on this package, eager or compiled.

    calls: "cross", those whose numbers of queries and keys differ and that are not causal; "all"; or a function of the
        arguments of `scaled_dot_product_attention` that returns True for the calls to take.  Lengths are all that one
        call shows, so a decoding step of self-attention (one query, many cached keys) is taken with "cross" too.

    Reached: `F.scaled_dot_product_attention`, whoever calls it, and `nn.MultiheadAttention` (so also
    `nn.TransformerDecoderLayer`) with need_weights=False.  Not reached: code that writes attention out (as
    `nn.MultiheadAttention` with need_weights=True does), fused kernels of other packages, other threads (a mode belongs
    to the thread that entered it), and what runs after the block: with gradient checkpointing call `backward` in it.
    What `cross_attention` cannot serve goes to PyTorch's own: wrong calls, for its error, forward-mode derivatives, and
    tensor subclasses such as DTensor and nested tensors.  A gradient of a gradient raises NotImplementedError: leave
    its calls out with `calls`.  An error in the block passes through, and the mode is left.
    """

    def __init__(self, calls: str | Callable[..., bool] = "cross") -> None:
        super().__init__()
        self.route = Route(calls) if callable(calls) else ROUTES[one_of("calls", calls, tuple(ROUTES))]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is TORCHS_OWN:
            func = self.route.attention
        elif func is F.multi_head_attention_forward:
            func = self.route.multi_head
        elif func in BACKWARDS:
            # checkpointed code runs again here and must find the mode that it ran with
            with self:
                return BACKWARDS[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Route:
    """Where the calls go that a rule takes."""

    def __init__(self, takes: Callable[..., bool]) -> None:
        self.takes = takes
        # torch looks its attention up in its module, and a mode that is being handled does not see that call
        self.multi_head = _asking_no_mode(F.multi_head_attention_forward, scaled_dot_product_attention=self.attention)

    def attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """One call of `scaled_dot_product_attention`: here if it is to be taken and can be, else PyTorch's own."""
        if self.takes(*args, **kwargs) and not any(map(_is_special, (*args, *kwargs.values()))):
            try:
                return scaled_dot_product_attention(*args, **kwargs)
            except (NotImplementedError, TypeError, ValueError):  # before anything was computed
                pass
        return TORCHS_OWN(*args, **kwargs)


def _is_cross(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **rest: Any,
) -> bool:
    return not is_causal and query.shape[-2:-1] != key.shape[-2:-1]


def _is_ever(*args: Any, **kwargs: Any) -> bool:
    return True


def _is_never(*args: Any, **kwargs: Any) -> bool:
    return False


def _is_special(t: Any) -> bool:
    return isinstance(t, Tensor) and (t.is_nested or is_traceable_wrapper_subclass(t))


def _asking_no_mode(function: Any, **names: Any) -> Callable[..., Any]:
    """torch's function as if no mode were active, and with these names in its module; no other thread notices."""
    never = dict(has_torch_function=_is_never, has_torch_function_unary=_is_never)
    names = {name: value for name, value in function.__globals__.items() if name != "__name__"} | never | names
    return FunctionType(function.__code__, names, argdefs=function.__defaults__)


BACKWARDS = {f: _asking_no_mode(f) for f in (Tensor.backward, torch.autograd.backward, torch.autograd.grad)}
ROUTES = {"cross": Route(_is_cross), "all": Route(_is_ever)}
