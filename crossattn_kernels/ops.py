"""The border with PyTorch: two custom operators with their fakes, and the autograd.Function that drives them.

`crossattn::forward` and `crossattn::backward` are opaque to torch.compile and torch.export; which engine runs inside
(the Triton kernels or `tiled`) is their argument `backend`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crossattn_kernels import tiled
from crossattn_kernels.problem import Inputs, Options, matmul_flops
from crossattn_kernels.tiled import Gradients

# the arguments of both operators, in the order of Inputs and Options
TENSORS = ", ".join(("Tensor q, Tensor k, Tensor v", *(f"Tensor? {name}" for name in Inputs._fields[3:])))
OPTIONS = "int query_group, int key_group, float scale, float softcap, float dropout_p, str empty_rows, int first_key, bool chunk, str backend"
NUM_INPUTS, NUM_OPTIONS = len(Inputs._fields), len(Options._fields)


def _engine(backend: str) -> ModuleType:
    if backend == "torch":
        return tiled
    from crossattn_kernels import kernels

    return kernels


def _unpack(args: tuple) -> tuple[Inputs, Options, str]:
    return Inputs(*args[:NUM_INPUTS]), Options(*args[NUM_INPUTS : NUM_INPUTS + NUM_OPTIONS]), args[-1]


def _keeps_o(x: Inputs, backend: str) -> bool:
    """The ungated output is kept where the backward cannot do without it."""
    return x.gate is not None if backend == "torch" else x.gate_varies


def _keeps_free(x: Inputs, options: Options) -> bool:
    return options.empty_rows != "zero" and not options.mask(x).is_trivial()


# ---- operators ----


@torch.library.custom_op(
    "crossattn::forward", mutates_args=(), schema=f"({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def forward_op(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, o, lse, free): y (B, Hq, M, Dv) laid out as (B, M, Hq, Dv); o the ungated output, free the rows that
    `empty_rows` fills, both empty where the backward does not need them."""
    x, options, backend = _unpack(args)
    with torch.autocast(x.q.device.type, enabled=False):
        return _engine(backend).forward(x, options)


@forward_op.register_fake
def _(*args):
    x, options, backend = _unpack(args)
    B, Hq, M, _ = x.sizes
    wide = torch.promote_types(x.q.dtype, torch.float32)

    def output() -> Tensor:
        return x.q.new_empty(B, M, Hq, x.v.shape[3]).transpose(1, 2)

    free = x.q.new_empty(0, dtype=torch.bool)
    if _keeps_free(x, options):
        free = x.q.new_empty(*options.mask(x).lead(), M, dtype=torch.bool)
    o = output() if _keeps_o(x, backend) else x.q.new_empty(0)
    return output(), o, x.q.new_empty(B, Hq, M, dtype=wide), free


@torch.library.custom_op(
    "crossattn::backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? dlse, Tensor y, Tensor o, Tensor lse, Tensor free, bool[] wanted, {TENSORS}, {OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(dy, dlse, y, o, lse, free, wanted, *args) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, bias, gate and scale; an empty tensor for one that is not wanted."""
    x, options, backend = _unpack(args)
    o = o if _keeps_o(x, backend) else y
    with torch.autocast(x.q.device.type, enabled=False):
        grads = _engine(backend).backward(
            dy, dlse, x, options, o, lse, free if _keeps_free(x, options) else None, Gradients(*wanted)
        )
    return tuple(x.q.new_empty(0) if g is None else g.contiguous() for g in grads)


@backward_op.register_fake
def _(dy, dlse, y, o, lse, free, wanted, *args):
    x, _, _ = _unpack(args)
    inputs = (x.q, x.k, x.v, x.bias, x.gate, x.scale)
    return tuple(t.new_empty(t.shape) if w else x.q.new_empty(0) for t, w in zip(inputs, wanted))


def _flops(mode: str, q, k, v, *args, **kwargs) -> int:
    (b_q, Hq, M, D), (b_k, _, N, _) = q, k
    return matmul_flops(max(b_q, b_k), Hq, M, N, D, v[3], mode)


if torch.ops.crossattn.forward not in torch.utils.flop_counter.flop_registry:  # a reload registers twice

    @register_flop_formula(torch.ops.crossattn.forward)
    def _(*args, **kwargs) -> int:
        return _flops("forward", *args)

    @register_flop_formula(torch.ops.crossattn.backward)
    def _(*args, **kwargs) -> int:
        return _flops("backward", *args[7:])


# ---- autograd ----


class CrossAttention(torch.autograd.Function):
    """(y, lse, o, free) of one call; only y and lse are differentiable.

    Arguments: the fields of Inputs, then those of Options, then the backend.  A hand-written Function, because
    `register_autograd` does not work under torch.func.grad.
    """

    @staticmethod
    def forward(*args):
        y, o, lse, free = torch.ops.crossattn.forward(*args)
        return y, lse, o, free

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        y, lse, o, free = output
        ctx.mark_non_differentiable(o, free)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:NUM_INPUTS], y, o, lse, free)
        ctx.options = inputs[NUM_INPUTS:]

    @staticmethod
    def backward(ctx, dy, dlse, *unused):
        *tensors, y, o, lse, free = ctx.saved_tensors
        if dy is None and dlse is None:
            return (None,) * (NUM_INPUTS + NUM_OPTIONS + 1)
        x, need = Inputs(*tensors), ctx.needs_input_grad
        wanted = [t is not None and n for t, n in zip((*x[:3], *x[7:10]), (*need[:3], *need[7:10]))]
        dy = torch.zeros_like(y) if dy is None else dy
        grads = CrossAttentionBackward.apply(dy, dlse, y, o, lse, free, wanted, *tensors, *ctx.options)
        dq, dk, dv, dbias, dgate, dscale = (g if w else None for g, w in zip(grads, wanted))
        return dq, dk, dv, None, None, None, None, dbias, dgate, dscale, None, *(None,) * (NUM_OPTIONS + 1)

    @staticmethod
    def vmap(info, in_dims, *args):
        B = max(_batch(args[0], in_dims[0]), _batch(args[1], in_dims[1]))
        folded = _fold(args, in_dims, 0, info.batch_size, B)
        out = CrossAttention.apply(*folded)
        return tuple(_unfold(t, info.batch_size) for t in out), (0, 0, 0, 0)


class CrossAttentionBackward(torch.autograd.Function):
    """The gradients, as a Function of its own: so that vmap over a gradient works, and a gradient of it says why not."""

    @staticmethod
    def forward(*args):
        return torch.ops.crossattn.backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "cross_attention has no double backward; use backend='reference' where a gradient of a gradient is needed"
        )

    @staticmethod
    def vmap(info, in_dims, *args):
        V, first = info.batch_size, 7
        x = Inputs(*args[first : first + NUM_INPUTS])
        B = max(_batch(x.q, in_dims[first]), _batch(x.k, in_dims[first + 1]))
        folded = _fold(args, in_dims, first, V, B)
        out = CrossAttentionBackward.apply(*folded)
        inputs, dims = (*x[:3], *x[7:10]), (*in_dims[first : first + 3], *in_dims[first + 7 : first + 10])
        grads = []
        for grad, t, dim, wanted in zip(out, inputs, dims, args[6]):
            if wanted:  # per sample: (V, B, ...), summed where the entries of a sample share one
                grad = _unfold(grad, V)
                grad = grad.sum(1, keepdim=True) if _batch(t, dim) == 1 else grad
            grads.append(grad)
        return tuple(grads), tuple(0 if w else None for w in args[6])


def _batch(t: Tensor, dim: int | None) -> int:
    """Batch size of one sample."""
    return t.shape[0] if dim is None or dim != 0 else t.shape[1]


def _fold(args, in_dims, first: int, V: int, B: int) -> list:
    """Every tensor with its vmapped dimension folded into the batch, (V * B, ...); the seed stays as it is."""

    def fold(i: int, t, dim):
        if (
            not isinstance(t, Tensor)
            or t.shape == (0,)
            or (t.ndim == 1 and dim is not None and t.shape[0] == V and V != t.numel())
        ):
            return t
        if i == first + NUM_INPUTS - 1:
            return t if dim is None else t.select(dim, 0)
        t = t[None] if dim is None else t.movedim(dim, 0)  # (1|V, 1|B, ...)
        if t.numel() == 0 and t.ndim == 2:
            return t.flatten()
        return t.expand(V, B, *t.shape[2:]).flatten(0, 1)

    return [fold(i, t, dim) for i, (t, dim) in enumerate(zip(args, in_dims))]


def _unfold(t: Tensor, V: int) -> Tensor:
    """(V * B, ...) -> (V, B, ...); an empty placeholder becomes one a sample."""
    return t.new_empty(V, 0) if t.shape == (0,) else t.unflatten(0, (V, -1))
