"""The border with PyTorch: two operators with their fakes, derivatives and FLOP counts.

`crossattn::forward` and `crossattn::backward` are opaque to torch.compile and torch.export; which engine runs inside
(the Triton kernels or `tiled`) is their last argument.  Their derivatives are the two autograd.Functions below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from crossattn_kernels import tiled
from crossattn_kernels.problem import Gradients, Inputs, Options, matmul_flops

# one call, with which the arguments of both operators end: the fields of Inputs, those of Options, the backend
CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? start, Tensor? end, Tensor? keys, Tensor? visible, "
    "Tensor? bias, Tensor? gate, Tensor? head_scale, Tensor? seed, int query_group, int key_group, "
    "float scale, float softcap, float dropout_p, str empty_rows, int first_key, bool chunk, str backend"
)
SAVED = "Tensor dy, Tensor? dlse, Tensor o, Tensor lse, Tensor state, Tensor filled, bool[] wanted"
NUM_INPUTS, NUM_CALL = len(Inputs._fields), len(Inputs._fields) + len(Options._fields) + 1

LIBRARY = torch.library.Library("crossattn", "DEF")
for schema in (
    f"forward({CALL}) -> (Tensor y, Tensor o, Tensor lse, Tensor state, Tensor filled)",
    f"backward({SAVED}, {CALL}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dgate, Tensor dscale)",
):
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def attend(x: Inputs, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """(y, lse) of a canonical call."""
    # torch.compile and torch.export see the operator, torch.func and autograd the Function that is its derivative
    if torch.compiler.is_compiling():
        y, _, lse, _, _ = torch.ops.crossattn.forward(*x, *options, backend)
    elif _differentiated(x):
        y, _, lse, _, _ = CrossAttention.apply(*x, *options, backend)
    else:
        x = Inputs(*_unwrapped(x))
        with torch._C._AutoDispatchBelowADInplaceOrView():
            dispatched = _needs_dispatch(x)
            found = torch.ops.crossattn.forward(*x, *options, backend) if dispatched else _forward(x, options, backend)
        y, _, lse, _, _ = found
    return y, lse


def _differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd or a transform of torch.func wants to know what is done with these."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)


# ---- operators ----


@torch.library.impl(LIBRARY, "forward", "CompositeExplicitAutograd")
def forward_op(*call: Any) -> tuple[Tensor, ...]:
    """(y, o, lse, state, filled); what the backward does not need is empty.

    y: (B, Hq, M, Dv), laid out as (B, M, Hq, Dv), and lse: (B, Hq, M)
    o: as y, without the gate
    state: (B, 2, Hq, M), the maximum of the logits s and 1 / sum of exp(s - maximum), for p without rounding twice; the
        kernels' in base 2 where there is no bias, and the other backend's only of a chunk
    filled: bool (1|B, 1|Hq, M), rows that `empty_rows` fills
    """
    return _forward(*_unpack(call))


def _forward(x: Inputs, options: Options, backend: str) -> tuple[Tensor, ...]:
    with _no_autocast(x):
        return _engine(backend).forward(x, options)


@torch.library.impl(LIBRARY, "backward", "CompositeExplicitAutograd")
def backward_op(*args: Any) -> tuple[Tensor, ...]:
    """`_gradients`, with an empty tensor for one that is not wanted."""
    return tuple([args[-NUM_CALL].new_empty(0) if grad is None else grad for grad in _gradients(*args)])


def _gradients(
    dy: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    state: Tensor,
    filled: Tensor,
    wanted: Sequence[bool],
    *call: Any,
) -> Gradients:
    """Gradients of q, k, v, bias, gate and scale; None for one that is not wanted.

    Those of q, k and v are laid out as y, (B, sequence, H, D), as projections take them; the others are contiguous.
    o: the forward's o, or its y where that o is empty.
    """
    x, options, backend = _unpack(call)
    rows = filled if _keeps_filled(x, options) else None
    with _no_autocast(x):
        grads = _engine(backend).backward(dy, dlse, x, options, o, lse, state, rows, Gradients._make(wanted))
    by_sequence = [None if grad is None else _by_sequence(grad) for grad in grads[:3]]
    return Gradients(*by_sequence, *[None if grad is None else grad.contiguous() for grad in grads[3:]])


def _by_sequence(t: Tensor) -> Tensor:
    """(B, H, sequence, D), laid out as (B, sequence, H, D)."""
    _, H, length, D = t.shape
    there = t.stride() == (length * H * D, D, H * D, 1)
    return t if there else t.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.register_fake("crossattn::forward", lib=LIBRARY)
def _(*call: Any) -> tuple[Tensor, ...]:
    x, options, backend = _unpack(call)
    B, Hq, M, _ = x.sizes
    y = x.q.new_empty(B, M, Hq, x.v.shape[3]).transpose(1, 2)
    o = torch.empty_like(y) if _keeps_o(x, backend) else x.q.new_empty(0)
    lse = x.q.new_empty(B, Hq, M, dtype=torch.promote_types(x.q.dtype, torch.float32))
    filled = (*options.mask(x).lead(), M) if _keeps_filled(x, options) else (0,)
    state = lse.new_empty((B, 2, Hq, M) if backend == "triton" or options.chunk else (0,))
    return y, o, lse, state, x.q.new_empty(filled, dtype=torch.bool)


@torch.library.register_fake("crossattn::backward", lib=LIBRARY)
def _(dy: Tensor, dlse: Tensor | None, o: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wanted, call = rest[3], rest[4:]
    x, _, _ = _unpack(call)

    def fake(name: str) -> Tensor:
        t = getattr(x, name)
        return t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) if name in ("q", "k", "v") else t.new_empty(t.shape)

    return tuple(fake(name) if w else x.q.new_empty(0) for name, w in zip(Gradients._fields, wanted))


def _no_autocast(x: Inputs) -> contextlib.AbstractContextManager[Any]:
    if not torch._C._is_any_autocast_enabled():
        return AS_IT_IS
    kind = x.q.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else AS_IT_IS


AS_IT_IS = contextlib.nullcontext()


def _unpack(call: Sequence[Any]) -> tuple[Inputs, Options, str]:
    return Inputs(*call[:NUM_INPUTS]), Options(*call[NUM_INPUTS:-1]), call[-1]


@cache
def _engine(backend: str) -> ModuleType:
    if backend == "torch":
        return tiled
    from crossattn_kernels import kernels

    return kernels


def _keeps_o(x: Inputs, backend: str) -> bool:
    """The ungated output is kept where the backward cannot do without it."""
    return x.gate is not None if backend == "torch" else x.gate_varies


def _keeps_filled(x: Inputs, options: Options) -> bool:
    return options.empty_rows != "zero" and not options.mask(x).is_trivial()


# ---- derivatives ----


class FastApply(torch.autograd.Function):
    """A Function for plain positional arguments: `apply` does not work out its signature in each call."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*_unwrapped(args))  # type: ignore[misc]


def _unwrapped(args: Iterable[Any]) -> list[Any]:
    """A tensor that outlived its transform is taken for what it wraps, as `Function.apply` does."""
    return [t if type(t) in VALUES else torch._C._functorch.unwrap_if_dead(t) for t in args]


def _below_autograd(operator: Any, implementation: Callable[..., Any], args: Sequence[Any]) -> Any:
    """What the operator does without derivatives."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return operator(*args) if _needs_dispatch(args) else implementation(*args)


def _needs_dispatch(args: Sequence[Any]) -> bool:
    """Whether a mode or a kind of tensor listens to operators; where nobody does, the dispatcher is spared."""
    others = () if PLAIN.issuperset(map(type, args)) else args
    listening = any(isinstance(t, Tensor) and type(t) not in PLAIN for t in others)
    # batches that `is_grads_batched` makes of gradients are of type Tensor, too
    listening = listening or any(isinstance(t, Tensor) and not torch._C._has_storage(t) for t in args[:2])
    return listening or torch._C._len_torch_dispatch_stack() > 0


VALUES = {type(None), bool, int, float, str, list}
PLAIN = VALUES | {Tensor, torch.nn.Parameter}


class CrossAttention(FastApply):
    """`crossattn::forward`; y and lse are differentiable."""

    @staticmethod
    def forward(*call: Any) -> tuple[Tensor, ...]:
        return _below_autograd(torch.ops.crossattn.forward, forward_op, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        y, o, lse, state, filled = output
        ctx.mark_non_differentiable(o, state, filled)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y if o.ndim == 1 else o, lse, state, filled, *inputs[:NUM_INPUTS])
        ctx.options = inputs[NUM_INPUTS:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, _, dlse, _, _ = grads
        if dy is None and dlse is None:
            return (None,) * NUM_CALL
        saved = ctx.saved_tensors
        o, lse, state, filled, *inputs = saved
        q, k, v, _, _, _, _, bias, gate, scale, _ = ctx.needs_input_grad[:NUM_INPUTS]
        wanted = [q, k, v, bias, gate, scale]
        dy = torch.zeros_like(o) if dy is None else dy
        args = (dy, dlse, o, lse, state, filled, wanted, *inputs, *ctx.options)
        if torch.compiler.is_compiling():
            found = torch.ops.crossattn.backward(*args)
        elif _differentiated((dy, dlse, *saved)):
            found = CrossAttentionBackward.apply(*args)
        else:
            found = _below_autograd(torch.ops.crossattn.backward, _gradients, (*_unwrapped(args[:2]), *args[2:]))
        dq, dk, dv, dbias, dgate, dscale = (grad if w else None for grad, w in zip(found, wanted))
        return dq, dk, dv, None, None, None, None, dbias, dgate, dscale, None, *(None,) * (NUM_CALL - NUM_INPUTS)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "cross_attention has no forward-mode derivative; use backend='reference' where torch.func.jvp is needed"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *call: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        x = _sample(in_dims, call)
        if x.seed is not None:
            return _one_by_one(CrossAttention, info, in_dims, call)
        V, B = info.batch_size, x.sizes[0]
        out = CrossAttention.apply(*_fold(in_dims, call, V, B))
        return _unfold(out, [t.ndim > 1 for t in out], V, B)


class CrossAttentionBackward(FastApply):
    """`crossattn::backward`; a Function, so that vmap works over it and a second derivative says why it does not."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _below_autograd(torch.ops.crossattn.backward, backward_op, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "cross_attention has no second derivative; use backend='reference' where a gradient of a gradient is needed"
        )

    jvp = backward

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        wanted, x = args[-NUM_CALL - 1], _sample(in_dims[-NUM_CALL:], args[-NUM_CALL:])
        if x.seed is not None:
            return _one_by_one(CrossAttentionBackward, info, in_dims, args)
        V, B = info.batch_size, x.sizes[0]
        grads = CrossAttentionBackward.apply(*_fold(in_dims, args, V, B))
        (grads, dims), given = _unfold(grads, wanted, V, B), (getattr(x, name) for name in Gradients._fields)
        # what the entries of one sample share gets the sum of their gradients
        return tuple(g.sum_to_size(V, *t.shape) if w else g for g, t, w in zip(grads, given, wanted)), dims


def _derivative(function: type[FastApply], *args: Any) -> Any:
    """What an operator does that is called by itself, as in compiled and exported programs."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError("torch.func finds no derivative of a crossattn operator; call cross_attention")
    return function.apply(*args)


LIBRARY.impl("forward", partial(_derivative, CrossAttention), "Autograd")
LIBRARY.impl("backward", partial(_derivative, CrossAttentionBackward), "Autograd")


# ---- vmap: V samples become V * B entries of one batch ----


def _sample(in_dims: Sequence[Any], call: Sequence[Any]) -> Inputs:
    """The shapes of the inputs as one sample sees them."""

    def sample(t: Any, dim: int | None) -> Any:
        return t if dim is None else torch.empty(t.movedim(dim, 0).shape[1:], device="meta")

    return Inputs(*map(sample, call[:NUM_INPUTS], in_dims))


def _fold(in_dims: Sequence[Any], args: Sequence[Any], V: int, B: int) -> list[Any]:
    """Every (1|B, ...) of a sample to (V * B, ...); an empty placeholder stays."""

    def fold(t: Any, dim: int | None) -> Any:
        if not isinstance(t, Tensor) or t.ndim - (dim is not None) < 2:
            return t
        t = t[None] if dim is None else t.movedim(dim, 0)
        return t.expand(V, B, *t.shape[2:]).flatten(0, 1)

    return [fold(t, dim) for t, dim in zip(args, in_dims)]


def _unfold(
    results: Sequence[Tensor], real: Sequence[bool], V: int, B: int
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """(V * B, ...) to (V, B, ...), with the dimension that vmap shall take as V; a placeholder has none."""
    split = tuple(t.unflatten(0, (V, B)) if r else t for t, r in zip(results, real))
    return split, tuple(0 if r else None for r in real)


def _one_by_one(
    function: type[torch.autograd.Function], info: Any, in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """One call a sample: dropout depends on the index in the batch, which a fold would change."""
    calls = (
        [t.select(dim, i) if isinstance(dim, int) else t for t, dim in zip(args, in_dims)]
        for i in range(info.batch_size)
    )
    results = tuple(torch.stack(same) for same in zip(*(function.apply(*call) for call in calls)))
    return results, (0,) * len(results)


# ---- FLOPs ----


@register_flop_formula(torch.ops.crossattn.forward)
def _(*call: Any, **kwargs: Any) -> int:
    return _flops("forward", call)


@register_flop_formula(torch.ops.crossattn.backward)
def _(*args: Any, **kwargs: Any) -> int:
    return _flops("backward", args[-NUM_CALL:])


def _flops(mode: str, call: Sequence[Any]) -> int:
    (b_q, Hq, M, D), (b_k, _, N, _), (*_, Dv) = call[:3]
    return matmul_flops(max(b_q, b_k), Hq, M, N, D, Dv, mode)
