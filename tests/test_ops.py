"""The border with PyTorch: operators, torch.compile, export, checkpointing, torch.func, autocast, FLOPs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils import checkpoint as ckpt
from torch.utils.flop_counter import FlopCounterMode

from crossattn_kernels import Mask, cross_attention, tiled
from crossattn_kernels.ops import CrossAttention, CrossAttentionBackward, Gradients, Inputs
from crossattn_kernels.problem import canonical
from crossattn_kernels.testing import Case, draw, run

forward, backward = torch.ops.crossattn.forward, torch.ops.crossattn.backward

SMALL = Case("small", B=2, Hq=2, Hk=1, M=5, N=7, D=16)
EVERYTHING = replace(SMALL, name="everything", mask="all fields", bias=(0, 1, 1, 1), gate="head", scale="head",
                     softcap=2.0, dropout_p=0.2, empty_rows="uniform", layout="bshd")  # fmt: skip
CASES = [
    SMALL,
    EVERYTHING,
    replace(EVERYTHING, name="by channel", Dv=24, gate="channel", bias=(1, 0, 0, 1), scale="scalar", share="kv",
            empty_rows="attend_all", mask="ranges", layout="bhsd"),
    replace(SMALL, name="shared q", share="q", gate="scalar", mask="padding"),
    replace(SMALL, name="half", dtype=torch.bfloat16, gate="channel", mask="lengths"),
    replace(SMALL, name="no keys", N=0, mask="lengths", empty_rows="uniform", bias=(1, 1, 1, 1), gate="head"),
    replace(SMALL, name="no queries", M=0, mask="ranges", empty_rows="attend_all", gate="channel", scale="head"),
    replace(SMALL, name="no batch", B=0, mask="padding", bias=(0, 1, 1, 1)),
]  # fmt: skip

backends = pytest.mark.parametrize("backend", ["torch", "triton"])
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name.replace(" ", "-"))


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


def leaves(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """q, k, v, bias, gate, scale of a case, requiring a gradient."""
    return {name: t.detach().requires_grad_() for name, t in draw(case, seed=seed).tensors.items()}


def attend(case: Case, backend: str, mask: Mask | None = None, **more: Any) -> Callable[..., Any]:
    """cross_attention as a function of the case's tensors, in their order."""
    call = draw(case)
    names = list(call.tensors)

    def f(*tensors: Tensor) -> Any:
        given = dict(zip(names, tensors))
        return cross_attention(
            **given, mask=call.mask if mask is None else mask, **call.options, backend=backend, **more
        )

    return f


def results(f: Callable[..., Any], tensors: Any, seed: int = 7) -> list[Tensor]:
    """y and every gradient of a loss that weighs its entries differently."""
    torch.manual_seed(seed)
    y = f(*tensors)
    weights = torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(y.dtype)
    wanted = [t for t in tensors if t.requires_grad]
    for t in wanted:
        t.grad = None
    (weights * y).sum().backward()
    return [y.detach(), *(t.grad for t in wanted)]


def same(a: Any, b: Any) -> None:
    """Bitwise."""
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def close(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)


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


# ---- torch.compile ----


def compiled(f: Callable[..., Any], dynamic: bool = False, backend: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)


@pytest.mark.parametrize("backend, dynamic", [("torch", False), ("torch", True), ("triton", True)])
def test_compile(dynamic, backend):
    tensors = list(leaves(EVERYTHING).values())
    f = attend(EVERYTHING, backend)
    same(results(compiled(f, dynamic), tensors), results(f, tensors))


@cases
def test_compile_cases(case):
    tensors, f = list(leaves(case).values()), attend(case, "torch")
    same(results(compiled(f, dynamic=case.N == 0), tensors), results(f, tensors))


def test_compile_once_for_all_sizes():
    torch._dynamo.config.error_on_recompile, before = True, torch._dynamo.config.error_on_recompile
    try:
        f = compiled(partial(cross_attention, backend="torch"), dynamic=True)
        for B, M, N in ((3, 5, 7), (4, 6, 9), (5, 130, 1300)):
            tensors = leaves(replace(SMALL, B=B, Hk=2, M=M, N=N)).values()
            same(results(f, tensors), results(partial(cross_attention, backend="torch"), tensors))
    finally:
        torch._dynamo.config.error_on_recompile = before


@backends
def test_compile_with_a_mask_built_inside(backend):
    def f(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
        mask = Mask.lengths(lengths) & Mask.causal(q.shape[2], k.shape[2]) & Mask.key_padding(keep)
        return cross_attention(q, k, v, mask, empty_rows="uniform", backend=backend)

    tensors = (*leaves(SMALL).values(), torch.tensor([6, 0]), torch.rand(2, 7) < 0.8)
    same(results(compiled(f, dynamic=backend == "torch"), tensors), results(f, tensors))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_with_a_mask_passed_in(dynamic):
    """One graph serves other masks of the same kind."""
    f = compiled(partial(cross_attention, backend="torch"), dynamic)
    tensors = leaves(SMALL).values()
    for seed in range(3):
        mask = draw(replace(SMALL, mask="all fields"), seed=seed).mask
        same(
            results(lambda *t, mask=mask: f(*t, mask), tensors),
            results(lambda *t, mask=mask: cross_attention(*t, mask, backend="torch"), tensors),
        )


@pytest.mark.parametrize("side, dynamic", [("q", False), ("kv", True)])
def test_compile_with_a_stride_0_batch(side, dynamic):
    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t[:1].expand(3, -1, -1, -1) if n in side else t for n, t in zip("qkv", (q, k, v)))
        return cross_attention(q, k, v, backend="torch")

    tensors = leaves(replace(SMALL, B=3)).values()
    same(results(compiled(inside, dynamic), tensors), results(inside, tensors))
    graph = compiled(partial(cross_attention, backend="torch"), dynamic)

    def outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return graph(*(t[:1].expand(3, -1, -1, -1) if n in side else t for n, t in zip("qkv", (q, k, v))))

    same(results(outside, tensors), results(inside, tensors))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_with_numbers_as_arguments(dynamic):
    def f(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
        return cross_attention(q, k, v, scale=scale, softcap=3 * scale, dropout_p=dropout_p, backend="torch")

    tensors, g = leaves(SMALL).values(), compiled(f, dynamic)
    for numbers in ((0.5, 0.1), (0.7, 0.2)):
        same(results(lambda *t, n=numbers: g(*t, *n), tensors), results(lambda *t, n=numbers: f(*t, *n), tensors))


@backends
def test_compile_draws_fresh_dropout(backend):
    q, k, v = leaves(SMALL).values()
    f = compiled(partial(cross_attention, k=k, v=v, dropout_p=0.5, backend=backend))
    torch.manual_seed(1)
    first, second = f(q), f(q)
    torch.manual_seed(1)
    again = f(q)
    assert torch.equal(first, again) and not torch.equal(first, second)
    # the backward drops what the forward dropped
    same(torch.autograd.grad(first.sum(), q), torch.autograd.grad(again.sum(), q))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_compile_under_autocast(where):
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if where == "inside" else nullcontext():
            return cross_attention(q, k, v, backend="torch")

    tensors = leaves(SMALL).values()
    with torch.autocast("cpu", torch.bfloat16) if where == "outside" else nullcontext():
        found, exact = results(compiled(f), tensors), results(f, tensors)
    assert found[0].dtype == torch.bfloat16
    same(found, exact)


def test_compile_with_lse():
    tensors = leaves(SMALL).values()

    def f(*tensors: Tensor) -> Tensor:
        y, lse = cross_attention(*tensors, return_lse=True, backend="torch")
        return y + lse[..., None]

    same(results(compiled(f), tensors), results(f, tensors))


def test_a_lse_that_is_not_used_costs_nothing_when_compiled(monkeypatch):
    """Compiled code asks for the same gradients as eager code: without that of lse, the flash kernel can serve."""
    seen = []
    original = tiled.backward
    monkeypatch.setattr(tiled, "backward", lambda dy, dlse, *rest: seen.append(dlse) or original(dy, dlse, *rest))
    results(compiled(partial(cross_attention, backend="torch")), leaves(SMALL).values())
    assert seen == [None]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor():
    call = draw(EVERYTHING)
    rest = {n: t.requires_grad_() for n, t in call.tensors.items() if n not in "qkv"}

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(cross_attention(q * 2, k + 1, v, call.mask, **rest, **call.options, backend="torch"))

    tensors, g = leaves(EVERYTHING), compiled(f, backend="inductor")
    q, k, v = (tensors[n] for n in "qkv")
    # without the cache on disk, which does not see that our operators changed
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        close(results(g, (q, k, v)), results(f, (q, k, v)))
        assert not torch.equal(g(q, k, v), g(q, k, v))


def test_compiled_autograd():
    """The backward of an eager forward, compiled."""
    tensors, f = list(leaves(EVERYTHING).values()), attend(EVERYTHING, "torch")
    eager = results(f, tensors)
    with torch._dynamo.compiled_autograd._enable(partial(torch.compile, fullgraph=True, backend="aot_eager")):
        same(results(f, tensors), eager)


# ---- torch.export ----


class Reader(nn.Module):
    """Cross-attention as a model has it."""

    def __init__(self, backend: str):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(16, 32), nn.Linear(16, 64), nn.Linear(32, 16, bias=False)
        self.gate = nn.Parameter(torch.full((2,), 0.5))
        self.backend = backend

    def forward(self, x: Tensor, context: Tensor, lengths: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (2, 16)).transpose(1, 2)
        k, v = self.kv(context).unflatten(2, (2, 2, 16)).permute(2, 0, 3, 1, 4)
        y = cross_attention(q, k, v, Mask.lengths(lengths), gate=self.gate, backend=self.backend)
        return x + self.out(y.transpose(1, 2).flatten(2))


def reader_arguments(M: int = 5, N: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(M)
    return torch.randn(2, M, 16, generator=g), torch.randn(2, N, 16, generator=g), torch.tensor([N, N - 2])


@backends
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict, backend):
    model = Reader(backend)
    program = torch.export.export(model, reader_arguments(), strict=strict)
    assert [n.target for n in program.graph.nodes].count(forward.default) == 1
    exported = program.module()
    same([exported(*reader_arguments())], [model(*reader_arguments())])
    # an exported model can be trained on
    parameters = dict(exported.named_parameters())
    found = torch.autograd.grad(exported(*reader_arguments()).square().sum(), list(parameters.values()))
    own = dict(model.named_parameters())
    same(found, torch.autograd.grad(model(*reader_arguments()).square().sum(), [own[n] for n in parameters]))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_dynamic_lengths(strict):
    model = Reader("torch").eval()
    lengths = ({1: torch.export.Dim("M")}, {1: torch.export.Dim("N")}, {})
    program = torch.export.export(model, reader_arguments(), dynamic_shapes=lengths, strict=strict)
    for M, N in ((5, 7), (1, 2), (40, 1300)):
        same([program.module()(*reader_arguments(M, N))], [model(*reader_arguments(M, N))])


def test_an_exported_program_can_be_saved(tmp_path):
    model = Reader("torch").eval()
    torch.export.save(torch.export.export(model, reader_arguments()), tmp_path / "reader.pt2")
    loaded = torch.export.load(tmp_path / "reader.pt2").module()
    same([loaded(*reader_arguments())], [model(*reader_arguments())])


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


# ---- torch.func ----

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
