"""The border with PyTorch: operators, what has no derivative, checkpointing, autocast, FLOPs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp
from torch.utils import checkpoint as ckpt
from torch.utils.flop_counter import FlopCounterMode

from crossattn_kernels import cross_attention, tiled
from crossattn_kernels.ops import CrossAttention, CrossAttentionBackward, Gradients, Inputs
from crossattn_kernels.problem import canonical
from crossattn_kernels.testing import Case, draw, run
from tests.border import CASES, EVERYTHING, SMALL, attend, backends, cases, close, compiled, leaves, results, same

forward, backward = torch.ops.crossattn.forward, torch.ops.crossattn.backward


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


# ---- the operators ----


def operator_arguments(case: Case, backend: str, differentiable: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of crossattn::forward and, with every gradient wanted, of crossattn::backward."""
    call = draw(case)
    tensors = {n: t.requires_grad_(differentiable) for n, t in call.tensors.items()}
    x, options = canonical(**tensors, mask=call.mask, **call.options)
    x = x._replace(seed=torch.tensor(2**61 + 3) if options.dropout_p else None)
    with torch.no_grad():
        y, o, lse, *rest = forward(*x, *options, backend)
    wanted = [getattr(x, name) is not None for name in Gradients._fields]
    detached = Inputs(*(t if t is None else t.detach() for t in x))
    saved = (torch.ones_like(y), torch.ones_like(lse), y if o.ndim == 1 else o, lse, *rest, wanted)
    return (*x, *options, backend), (*saved, *detached, *options, backend)


def description(tensors: Any) -> list[tuple]:
    """Shape, dtype and the strides that matter (torch.Tensor.is_contiguous looks at no others)."""
    strides = [[s for n, s in zip(t.shape, t.stride()) if n > 1 and t.numel()] for t in tensors]
    return [(tuple(t.shape), t.dtype, s) for t, s in zip(tensors, strides)]


@backends
@cases
def test_fakes_describe_the_results(case, backend):
    for op, args in zip((forward, backward), operator_arguments(case, backend, differentiable=False)):
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        assert description(fake) == description(op(*args))


@pytest.mark.parametrize("case, backend", [*((c, "torch") for c in CASES), (SMALL, "triton")], ids=str)
def test_opcheck(case, backend):
    forward_args, backward_args = operator_arguments(case, backend, differentiable=True)
    torch.library.opcheck(forward, forward_args)
    torch.library.opcheck(backward, backward_args)


@backends
def test_the_operator_is_differentiable(backend):
    args, _ = operator_arguments(EVERYTHING, backend, differentiable=True)
    x = [t for t in args[:3] if isinstance(t, Tensor)]
    y, _, lse, *_ = forward(*args)
    found = torch.autograd.grad(y.sum() + lse.sum(), x)
    y, _, lse, *_ = CrossAttention.apply(*args)
    same(found, torch.autograd.grad(y.sum() + lse.sum(), x))


@backends
def test_functions_are_applied_where_something_is_differentiated(backend, monkeypatch):
    tensors, f = leaves(EVERYTHING), attend(EVERYTHING, backend)
    y, *gradients = results(f, tensors.values())
    torch.manual_seed(7)
    again = f(*tensors.values())
    weights = torch.linspace(-1, 2, y.numel()).reshape(y.shape)
    same(torch.autograd.grad((weights * again).sum(), list(tensors.values()), create_graph=True), gradients)

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is differentiated here")

    monkeypatch.setattr(CrossAttentionBackward, "apply", refuse)
    same(results(f, tensors.values()), (y, *gradients))
    monkeypatch.setattr(CrossAttention, "apply", refuse)
    torch.manual_seed(7)
    same([f(*(t.detach() for t in tensors.values()))], [y])
    torch.manual_seed(7)
    with torch.no_grad():
        same([f(*tensors.values())], [y])


@backends
def test_gradients_do_not_depend_on_which_are_wanted(backend):
    tensors, f = leaves(EVERYTHING), attend(EVERYTHING, backend)
    _, *every = results(f, tensors.values())
    for wanted in (*([name] for name in tensors), ["k", "v"]):
        some = {n: t if n in wanted else t.detach() for n, t in tensors.items()}
        _, *found = results(f, some.values())
        close(found, [g for n, g in zip(tensors, every) if n in wanted])


@backends
def test_no_gradient_is_wanted(backend):
    tensors = {n: t.detach() for n, t in leaves(SMALL).items()}
    assert not attend(SMALL, backend)(*tensors.values()).requires_grad
    with torch.no_grad():
        assert not attend(SMALL, backend)(*leaves(SMALL).values()).requires_grad


@backends
@pytest.mark.parametrize("used", ["y", "lse"])
def test_only_one_result_is_used(used, backend):
    tensors = leaves(SMALL).values()
    call = partial(attend(SMALL, backend, return_lse=True), *tensors)
    oracle = partial(attend(SMALL, "reference", return_lse=True), *tensors)
    i = ["y", "lse"].index(used)
    found, exact = (torch.autograd.grad(f()[i].sum(), list(tensors), allow_unused=True) for f in (call, oracle))
    close(found, [torch.zeros_like(t) if e is None else e for t, e in zip(tensors, exact)])


@backends
@pytest.mark.parametrize("case", [EVERYTHING, CASES[2], CASES[4]], ids=str)
def test_two_runs_are_bitwise_equal(case, backend):
    tensors = leaves(case).values()
    same(results(attend(case, backend), tensors), results(attend(case, backend), tensors))


@backends
@cases
def test_gradients_are_laid_out_as_their_leaves(case, backend):
    tensors = [t.clone(memory_format=torch.contiguous_format).detach().requires_grad_() for t in leaves(case).values()]
    attend(case, backend)(*tensors).sum().backward()
    for t in tensors:
        assert t.grad.shape == t.shape and t.grad.dtype == t.dtype and t.grad.is_contiguous()


def test_writing_over_the_result_is_noticed():
    """As with SDPA: y is needed by the backward, unless the ungated output is kept in its place."""
    q, k, v = leaves(SMALL).values()
    y = cross_attention(q, k, v, backend="torch")
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = cross_attention(q, k, v, gate=torch.ones(2, 16), backend="torch")
    y.transpose(1, 2).flatten(2).mul_(2).sum().backward()


# ---- what there is no derivative for ----


@backends
def test_double_backward_raises(backend):
    (q, k, v), of = leaves(SMALL).values(), attend(SMALL, backend)

    def f(q: Tensor) -> Tensor:
        return of(q, k, v)

    (first,) = torch.autograd.grad(f(q).square().sum(), q, create_graph=True)
    same([first.detach()], torch.autograd.grad(f(q).square().sum(), q))
    with pytest.raises(NotImplementedError, match="cross_attention has no second derivative"):
        torch.autograd.grad(first.sum(), q)
    with pytest.raises(NotImplementedError, match="cross_attention has no second derivative"):
        grad(lambda q: grad(lambda q: f(q).square().sum())(q).sum())(q)
    with pytest.raises(NotImplementedError, match="cross_attention has no"):
        hessian(lambda q: f(q).sum())(q)


def test_a_penalty_on_other_gradients_still_works():
    """create_graph=True where the second derivative does not pass through the attention."""
    q, k, v = leaves(SMALL).values()
    w = torch.ones(16, requires_grad=True)
    y = cross_attention(q, k, v, backend="torch") * w
    (dw,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
    torch.autograd.grad(dw.square().sum(), w)


@backends
def test_forward_mode_raises(backend):
    (q, k, v), f = (t.detach() for t in leaves(SMALL).values()), attend(SMALL, backend)
    raises = partial(pytest.raises, NotImplementedError, match="cross_attention has no forward-mode derivative")
    with raises():
        jvp(lambda q: f(q, k, v), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with raises():
            f(dual, k, v)
        with torch.no_grad(), raises():
            f(dual, k, v)


def test_the_operators_refuse_what_they_have_no_derivative_for():
    forward_args, backward_args = operator_arguments(SMALL, "torch", differentiable=False)
    q, *rest = forward_args
    with pytest.raises(NotImplementedError, match="torch.func"):
        jvp(lambda q: forward(q, *rest)[0], (q,), (q,))
    with pytest.raises(NotImplementedError, match="torch.func"):
        grad(lambda q: forward(q, *rest)[0].sum())(q)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            forward(dual, *rest)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            backward(torch.autograd.forward_ad.make_dual(*[backward_args[0]] * 2), *backward_args[1:])
    dq = backward(backward_args[0].requires_grad_(), *backward_args[1:])[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(dq.sum(), backward_args[0])


def test_the_reference_has_the_derivatives_that_the_others_refuse():
    tensors = {n: t.double() for n, t in leaves(replace(SMALL, M=2, N=3, D=2, B=1, gate="head")).items()}

    def f(q: Tensor, k: Tensor, gate: Tensor) -> Tensor:
        return cross_attention(q, k, tensors["v"], gate=gate, backend="reference")

    inputs = [tensors[n].detach().requires_grad_() for n in ("q", "k", "gate")]
    torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(f, inputs)


# ---- checkpointing ----


@pytest.mark.parametrize("backend, use_reentrant", [("torch", False), ("torch", True), ("triton", False)])
def test_checkpoint(use_reentrant, backend):
    case = replace(EVERYTHING, dropout_p=0.3)
    tensors = leaves(case).values()
    f = attend(case, backend)
    same(results(partial(ckpt.checkpoint, f, use_reentrant=use_reentrant), tensors), results(f, tensors))


def test_selective_checkpoint_saves_the_attention(monkeypatch):
    calls = []
    original = tiled.forward
    monkeypatch.setattr(tiled, "forward", lambda *args: calls.append(1) or original(*args))

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> ckpt.CheckpointPolicy:
        save = op == forward.default
        return ckpt.CheckpointPolicy.MUST_SAVE if save else ckpt.CheckpointPolicy.PREFER_RECOMPUTE

    case = replace(EVERYTHING, dropout_p=0.3)
    tensors, f = leaves(case).values(), attend(case, "torch")
    plain = results(f, tensors)
    for context, runs in (({}, 2), (dict(context_fn=partial(ckpt.create_selective_checkpoint_contexts, policy)), 1)):
        calls.clear()
        same(results(partial(ckpt.checkpoint, f, use_reentrant=False, **context), tensors), plain)
        assert len(calls) == runs


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(dtype, monkeypatch):
    """The engine runs in the autocast dtype with autocast off; the backward does not care whether it is on."""
    seen = []
    for name in ("forward", "backward"):
        original = getattr(tiled, name)

        def spy(*args: Any, original: Any = original) -> Any:
            x = next(a for a in args if isinstance(a, Inputs))
            seen.append((x.q.dtype, torch.is_autocast_enabled("cpu")))
            return original(*args)

        monkeypatch.setattr(tiled, name, spy)
    case = replace(EVERYTHING, dropout_p=0.0)
    tensors, f = list(leaves(case).values()), attend(case, "torch")
    with torch.autocast("cpu", dtype):
        y = f(*tensors)
        inside = torch.autograd.grad(y.float().sum(), tensors, retain_graph=True)
    outside = torch.autograd.grad(y.float().sum(), tensors)
    assert y.dtype == dtype and seen == [(dtype, False)] * 3
    same(inside, outside)
    assert all(g.dtype == torch.float32 for g in inside)
    # as if the caller had cast
    cast = [t.to(dtype) if i < 3 else t for i, t in enumerate(tensors)]
    same(inside, torch.autograd.grad(f(*cast).float().sum(), tensors))


# ---- FLOPs ----


@backends
@pytest.mark.parametrize(
    "case", [SMALL, CASES[2], replace(SMALL, share="q", B=3)], ids=["gqa", "Dv-shared-kv", "shared-q"]
)
def test_flops(case, backend):
    """Two products forward (q kᵀ, p v), five backward (q kᵀ, do vᵀ, ds k, dsᵀ q, pᵀ do)."""
    tensors, f = list(leaves(case).values()), attend(case, backend)
    B, H, M, N, D, Dv = case.B, case.Hq, case.M, case.N, case.D, case.Dv or case.D
    product, product_v = 2 * B * H * M * N * D, 2 * B * H * M * N * Dv
    with FlopCounterMode(display=False) as counter:
        y = f(*tensors)
    assert counter.get_total_flops() == product + product_v
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 3 * product + 2 * product_v


# ---- all of it together ----


def test_run_agrees_with_the_reference_through_every_door():
    """The same call, eager, compiled, checkpointed and through the operator, gives the same bits."""
    case = replace(EVERYTHING, dropout_p=0.0)
    tensors, f = list(leaves(case).values()), attend(case, "torch")
    eager = results(f, tensors)
    for door in (compiled(f), partial(ckpt.checkpoint, f, use_reentrant=False)):
        same(results(door, tensors), eager)
    call = draw(case)
    same([run(call, "torch")["y"]], eager[:1])
