"""The border with PyTorch: the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from crossattn_kernels import Mask, cross_attention
from crossattn_kernels.problem import canonical
from crossattn_kernels.testing import Case, draw
from tests.border import EVERYTHING, SMALL, Reader, attend, backends, close, leaves, reader_arguments, same

forward = torch.ops.crossattn.forward


VMAPS = {
    "all": "q k v",
    "shared q": "k v",
    "shared kv": "q",
    "everything": "q k v bias gate scale",
    "shared parameters": "q k v",  # bias, gate and scale are
    "only bias": "bias",
    "only gate": "gate",
}
FUNC_CASES = {
    "all": SMALL,
    "shared q": replace(SMALL, share="q"),
    "shared kv": replace(SMALL, share="kv", gate="channel"),
    "everything": replace(EVERYTHING, dropout_p=0.0),
    "shared parameters": replace(EVERYTHING, dropout_p=0.0, empty_rows="attend_all", gate="channel", share="kv"),
    "only bias": replace(SMALL, bias=(0, 1, 1, 1)),
    "only gate": replace(SMALL, gate="scalar"),
}
V = 3


def samples(case: Case, mapped: str) -> tuple[list[Tensor], list[int | None]]:
    """The tensors of V samples, those named in `mapped` stacked along a last or first dimension, and in_dims."""
    draws = [draw(case, seed=i).tensors for i in range(V)]
    tensors, dims = [], []
    for i, name in enumerate(draws[0]):
        dim = (-1 if i % 2 else 0) if name in mapped.split() else None
        tensors.append(draws[0][name] if dim is None else torch.stack([d[name] for d in draws], dim))
        dims.append(dim)
    return tensors, dims


def looped(f: Callable[..., Any], tensors: list[Tensor], dims: list[int | None]) -> tuple[Tensor, ...]:
    """What vmap(f, dims) should give."""
    each = [f(*(t if d is None else t.select(d, i) for t, d in zip(tensors, dims))) for i in range(V)]
    return tuple(torch.stack(r) for r in zip(*each))


@pytest.mark.parametrize("name, backend", [*((name, "torch") for name in VMAPS), ("shared parameters", "triton")])
def test_vmap(name, backend):
    """Results and per-sample gradients of everything, shared or not, against a loop."""
    case = FUNC_CASES[name]
    tensors, dims = samples(case, VMAPS[name])
    f = attend(case, backend, return_lse=True)

    def loss(*tensors: Tensor) -> tuple[Tensor, Any]:
        y, lse = f(*tensors)
        weights = torch.linspace(-1, 2, y.numel()).reshape(y.shape)
        total = (weights * y).sum()
        if name in ("everything", "only gate"):  # in the others the gradient of lse is None
            total = total + lse.masked_fill(lse == -torch.inf, 0).sum()
        return total, (y, lse)

    def both(*tensors: Tensor) -> tuple[Tensor, ...]:
        gradients, (y, lse) = grad(loss, argnums=tuple(range(len(tensors))), has_aux=True)(*tensors)
        return y, lse, *gradients

    close(vmap(both, tuple(dims))(*tensors), looped(both, tensors, dims))


@backends
def test_vmap_of_masks(backend):
    """One mask a sample: lengths that vary, key padding that is shared."""
    tensors, dims = samples(SMALL, "q k v")
    lengths, keep = torch.tensor([[3, 0], [7, 1], [2, 5]]), torch.tensor([[1, 1, 0, 1, 1, 1, 0]]).bool()

    def f(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = Mask.lengths(lengths) & Mask.key_padding(keep)
        y = cross_attention(q, k, v, mask, empty_rows="uniform", backend=backend)
        return (y,)

    close(vmap(f, (*dims, 0))(*tensors, lengths), looped(f, [*tensors, lengths], [*dims, 0]))


def test_nested_vmap():
    q, k, v = (torch.randn(2, 3, *t.shape) for t in draw(SMALL).tensors.values())

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grad(lambda q: cross_attention(q, k, v, backend="torch").square().sum())(q)

    found = vmap(vmap(f, (0, None, 0)), (0, 0, 1))(q, k[:, 0], v.transpose(0, 1))
    exact = torch.stack([torch.stack([f(q[i, j], k[i, 0], v[i, j]) for j in range(3)]) for i in range(2)])
    close([found], [exact])


@pytest.mark.parametrize("order", ["grad of vmap", "jacrev"])
def test_other_transforms(order):
    tensors, dims = samples(replace(SMALL, bias=(0, 1, 1, 1), gate="head"), "q gate")
    case = replace(SMALL, bias=(0, 1, 1, 1), gate="head")
    f = attend(case, "torch")
    oracle = attend(case, "reference")
    argnums = tuple(range(len(tensors)))
    if order == "jacrev":
        one = [t if d is None else t.select(d, 0) for t, d in zip(tensors, dims)]
        close(jacrev(f, argnums)(*one), jacrev(oracle, argnums)(*one))
    else:
        found, exact = (
            grad(lambda *t, g=g: vmap(g, tuple(dims))(*t).square().sum(), argnums)(*tensors) for g in (f, oracle)
        )
        close(found, exact)


@pytest.mark.parametrize("randomness, backend", [("same", "torch"), ("different", "torch"), ("different", "triton")])
def test_vmap_of_dropout(randomness, backend):
    tensors, dims = samples(SMALL, "q k v")
    f = attend(replace(SMALL, dropout_p=0.5), backend)

    def both(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, pullback = torch.func.vjp(f, *tensors)
        return y, *pullback(torch.ones_like(y))

    torch.manual_seed(5)
    found = vmap(both, tuple(dims), randomness=randomness)(*tensors)
    torch.manual_seed(5)
    seeds = torch.randint(2**62, (() if randomness == "same" else (V,)), dtype=torch.int64).expand(V)
    call = draw(replace(SMALL, dropout_p=0.5))
    for i in range(V):
        leaf = [t.select(d, i).clone().requires_grad_() for t, d in zip(tensors, dims)]
        x, options = canonical(*leaf, **call.options)
        y, *_ = forward(*x._replace(seed=seeds[i]), *options, backend)
        close([r[i] for r in found], [y.detach(), *torch.autograd.grad(y.sum(), leaf)])


def test_jacrev_of_dropout():
    """The forward is not vmapped, the backward is: it must drop what the forward dropped."""
    case = replace(SMALL, B=2, M=2, N=3, dropout_p=0.5)
    tensors = [t.detach() for t in leaves(case).values()]
    f = attend(case, "torch")

    def jacobian(function: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(3)
        return function(lambda q: f(q, *tensors[1:]), tensors[0])

    by_hand = jacobian(torch.autograd.functional.jacobian)
    close([jacobian(lambda f, q: jacrev(f)(q))], [by_hand])


def test_per_sample_gradients_of_a_model():
    model = Reader("torch")
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x, context, lengths = (torch.stack([a, a.flip(1) if a.ndim > 1 else a - 1]) for a in reader_arguments())

    def loss(parameters: dict[str, Tensor], *args: Tensor) -> Tensor:
        return functional_call(model, parameters, args).square().sum()

    found = vmap(grad(loss), (None, 0, 0, 0))(parameters, x, context, lengths)
    for i in range(2):
        exact = torch.autograd.grad(model(x[i], context[i], lengths[i]).square().sum(), list(model.parameters()))
        close([found[n][i] for n in parameters], exact)


@backends
@pytest.mark.parametrize("recording", [True, False])
def test_a_tensor_that_outlived_its_transform(recording, backend):
    q, k, v = (t.detach() for t in leaves(SMALL).values())
    left: list[Tensor] = []
    grad(lambda t: (left.extend([t, torch.ones_like(t)]), t.sum())[1])(q)
    with torch.set_grad_enabled(recording):
        for t, plain in zip(left, (q, torch.ones_like(q))):
            same([cross_attention(t, k, v, backend=backend)], [cross_attention(plain, k, v, backend=backend)])
    y = cross_attention(q.requires_grad_(), k, v, backend=backend)
    grad(lambda t: (left.append(torch.ones_like(t)), t.sum())[1])(y.detach())
    found = torch.autograd.grad(y, q, left[-1], retain_graph=True)
    same(found, torch.autograd.grad(y, q, torch.ones_like(y)))


@backends
def test_batched_gradients(backend):
    """What PyTorch's own, older vmap does: `is_grads_batched`, and `jacobian` with it."""
    q, k, v = (torch.randn(1, 1, n, 8, requires_grad=n == 3) for n in (3, 4, 4))
    y = cross_attention(q, k, v, backend=backend)
    dy = torch.randn(5, *y.shape)
    (batched,) = torch.autograd.grad(y, q, dy, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batched, torch.stack([torch.autograd.grad(y, q, t, retain_graph=True)[0] for t in dy]))

    def jacobian(backend):
        return torch.autograd.functional.jacobian(
            partial(cross_attention, k=k, v=v, backend=backend), q, vectorize=True
        )

    torch.testing.assert_close(jacobian(backend), jacobian("reference"))
