"""The one door: autocast, layouts, mask tensors, seeds, empty sizes, unwanted gradients."""

import math
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from crossattn_kernels import Mask, cross_attention, functional
from crossattn_kernels.testing import assert_within_budget, compare

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(name == "triton" and not find_spec("triton"), reason="no triton"))
    for name in functional.BACKENDS
]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
B, HQ, HK, M, N, D, DV = 2, 2, 1, 5, 7, 16, 8


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(b: int = B, m: int = M, n: int = N, dtype: torch.dtype = torch.float32, **to) -> dict[str, Tensor]:
    shapes = dict(q=(b, HQ, m, D), k=(b, HK, n, D), v=(b, HK, n, DV))
    return {name: randn(*shape, seed=i, dtype=dtype).to(**to) for i, (name, shape) in enumerate(shapes.items())}


# ---- autocast ----


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "given",
    [("float32",) * 3, ("bfloat16", "float32", "float32"), ("float32", "float16", "bfloat16"), ("float16",) * 3],
    ids=" ".join,
)
def test_autocast_takes_the_active_dtype(given, dtype, backend):
    tensors = {n: t.to(getattr(torch, kind)).requires_grad_() for (n, t), kind in zip(qkv().items(), given)}
    rest = dict(gate=randn(HQ).requires_grad_(), bias=randn(M, N))
    with torch.autocast("cpu", dtype=dtype):
        y, lse = cross_attention(**tensors, **rest, return_lse=True, backend=backend)
    assert (y.dtype, lse.dtype) == (dtype, torch.float32)
    same = cross_attention(**{n: t.to(dtype) for n, t in tensors.items()}, **rest, return_lse=True, backend=backend)
    assert torch.equal(y, same[0]) and torch.equal(lse, same[1])
    grads = torch.autograd.grad(y.float().sum(), [*tensors.values(), rest["gate"]])
    assert [g.dtype for g in grads] == [*(getattr(torch, kind) for kind in given), torch.float32]


@pytest.mark.parametrize("shared", ["q", "kv"])
def test_autocast_makes_no_copies_of_a_shared_batch(shared):
    rounded = {n: t.bfloat16().float() for n, t in qkv().items()}
    base = {n: (t[:1] if n in shared else t).requires_grad_() for n, t in rounded.items()}
    tensors = {n: t.expand(B, -1, -1, -1) for n, t in base.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = functional.autocast(*tensors.values())
        y = cross_attention(**tensors)
    assert [t.stride(0) == 0 for t in cast] == [n in shared for n in tensors]
    for a, b in zip(cast, tensors.values()):
        assert torch.equal(a, b.bfloat16())

    def gradients(y: Tensor) -> dict[str, Tensor]:
        return dict(zip(base, torch.autograd.grad(y, list(base.values()), torch.ones_like(y))))

    copies = {
        kind: cross_attention(*(t.to(kind).contiguous() for t in tensors.values()), backend="reference")
        for kind in (torch.float64, torch.bfloat16)
    }
    assert_within_budget(compare(gradients(y), *map(gradients, copies.values())))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_leaves_fp64_as_sdpa_does(backend):
    tensors = qkv(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = cross_attention(**tensors, backend=backend)
        assert y.dtype == scaled_dot_product_attention(*tensors.values(), enable_gqa=True).dtype == torch.float64
    assert torch.equal(y, cross_attention(**tensors, backend=backend))


def test_mixed_dtypes_need_autocast():
    tensors = qkv() | dict(q=qkv()["q"].bfloat16())
    with pytest.raises(TypeError, match="one dtype"):
        cross_attention(**tensors)
    with torch.autocast("cpu", enabled=False), pytest.raises(TypeError, match="one dtype"):
        cross_attention(**tensors)


# ---- results ----


@on_every_backend
@pytest.mark.parametrize("gate", [None, (HQ,), (HQ, DV)], ids=["no gate", "gate by head", "gate by channel"])
@pytest.mark.parametrize("transposed", [False, True], ids=["bhsd", "bshd"])
def test_heads_merge_without_a_copy(transposed, gate, backend):
    tensors = {n: t.transpose(1, 2).contiguous().transpose(1, 2) if transposed else t for n, t in qkv().items()}
    y = cross_attention(**tensors, gate=None if gate is None else randn(*gate), backend=backend)
    merged = y.transpose(1, 2).flatten(2)
    assert y.shape == (B, HQ, M, DV) and merged.shape == (B, M, HQ * DV)
    assert merged.data_ptr() == y.data_ptr() and merged.is_contiguous()


@on_every_backend
def test_return_lse(backend):
    tensors = {n: t.requires_grad_() for n, t in qkv().items()}
    alone = cross_attention(**tensors, backend=backend)
    y, lse = cross_attention(**tensors, return_lse=True, backend=backend)
    assert isinstance(alone, Tensor) and torch.equal(alone, y)
    k = tensors["k"].repeat_interleave(HQ // HK, 1)
    s = tensors["q"].double() @ k.double().mT * D**-0.5
    assert lse.dtype == torch.float32 and lse.shape == (B, HQ, M)
    torch.testing.assert_close(lse, s.logsumexp(-1).float())
    # d lse / d q is the mean of k under the probabilities
    (dq,) = torch.autograd.grad(lse.sum(), tensors["q"])
    torch.testing.assert_close(dq, (s.softmax(-1) @ k.double() * D**-0.5).float())


# ---- mask tensors ----

BITS = randn(B, HQ, M, N, seed=5) > -0.5
BITS[..., 0] = True
MASKS = {
    "bool (M, N)": BITS[0, 0],
    "bool (N,)": BITS[0, 0, 0],
    "bool (B, 1, 1, N)": BITS[:, :1, :1],
    "bool (B, Hq, M, N)": BITS,
    "bool (M, 1)": torch.tensor([True, False, True, True, False])[:, None],
    "float (M, N)": randn(M, N, seed=6),
    "float (Hq, 1, N)": randn(HQ, 1, N, seed=6),
    "float (B, 1, 1, N)": randn(B, 1, 1, N, seed=6),  # one that does not vary over keys has gradient 0
    "float with -inf": randn(M, N, seed=6).masked_fill(~BITS[1, 1], -math.inf),
}


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """SDPA's documented formula; a row that sees nothing is 0."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * q.shape[3] ** -0.5
    s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)
    nothing = (s == -math.inf).all(-1, keepdim=True)
    return s.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0) @ v


@on_every_backend
@pytest.mark.parametrize("name", MASKS)
def test_mask_tensor_means_what_it_means_for_sdpa(name, backend):
    mask = MASKS[name]

    def run(attend, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = [t.requires_grad_() for t in qkv(dtype=dtype).values()]
        tensors += [mask.to(dtype, copy=True).requires_grad_()] if mask.is_floating_point() else []
        y = attend(*tensors[:3], tensors[3] if len(tensors) > 3 else mask)
        grads = torch.autograd.grad(y, tensors, randn(*y.shape, seed=8, dtype=dtype))
        return {"y": y.detach()} | dict(zip(("dq", "dk", "dv", "dmask"), grads))

    def ours(*args: Tensor) -> Tensor:
        return cross_attention(*args, backend=backend)

    oracle = run(eager, torch.float64)
    assert_within_budget(compare(run(ours, torch.float32), oracle, run(eager, torch.float32)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_finite_sum_of_mask_and_bias_hides_nothing(backend):
    """fp16 has no room below finfo.min, and -inf would hide the key."""
    q, k = torch.randn(1, 1, 2, 16).half(), torch.randn(1, 1, 4, 16).half()
    mask = torch.full((1, 1, 1, 4), torch.finfo(torch.float16).min).half()
    bias = torch.full((2, 4), -40.0).half()
    y, lse = cross_attention(q, k, k, mask, bias=bias, return_lse=True, backend=backend)
    assert y.any(-1).all() and lse.isfinite().all()


@pytest.mark.parametrize("name", [name for name in MASKS if name != "bool (M, 1)"])
def test_that_meaning_is_sdpas(name):
    tensors = qkv(dtype=torch.float64)
    mask = MASKS[name] if MASKS[name].dtype == torch.bool else MASKS[name].double()
    torch.testing.assert_close(
        eager(**tensors, mask=mask),
        scaled_dot_product_attention(*tensors.values(), torch.atleast_2d(mask), enable_gqa=True),
    )


@on_every_backend
def test_bool_mask_beside_a_bias(backend):
    tensors, bias = qkv(), randn(HQ, M, N, seed=6)
    both = cross_attention(**tensors, mask=BITS, bias=bias, backend=backend)
    folded = cross_attention(**tensors, mask=bias.where(BITS, -math.inf), backend=backend)
    torch.testing.assert_close(both, folded)
    assert not torch.allclose(both, cross_attention(**tensors, mask=BITS, backend=backend))


@on_every_backend
def test_float_mask_beside_a_bias(backend):
    tensors, mask, bias = qkv(), randn(M, N, seed=6).requires_grad_(), randn(HQ, 1, N, seed=7).requires_grad_()
    y = cross_attention(**tensors, mask=mask, bias=bias, backend=backend)
    summed = (mask + bias).detach().requires_grad_()
    torch.testing.assert_close(y, cross_attention(**tensors, bias=summed, backend=backend))
    dmask, dbias = torch.autograd.grad(y.square().sum(), (mask, bias))
    (dsummed,) = torch.autograd.grad(cross_attention(**tensors, bias=summed, backend=backend).square().sum(), summed)
    torch.testing.assert_close(dmask, dsummed.sum(0))
    torch.testing.assert_close(dbias, dsummed.sum(1, keepdim=True))


# ---- seeds ----


def draw(backend: str, seed: int | None = None, p: float = 0.5, **options) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return cross_attention(**qkv(), dropout_p=p, generator=generator, backend=backend, **options)


@on_every_backend
def test_generator_decides_what_is_dropped(backend):
    assert torch.equal(draw(backend, 1), draw(backend, 1))
    assert not torch.equal(draw(backend, 1), draw(backend, 2))
    generator = torch.Generator().manual_seed(1)
    first, second = (cross_attention(**qkv(), dropout_p=0.5, generator=generator, backend=backend) for _ in range(2))
    assert torch.equal(first, draw(backend, 1)) and not torch.equal(first, second)


@on_every_backend
def test_default_generator_advances(backend):
    torch.manual_seed(3)
    first, second = draw(backend), draw(backend)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, draw(backend)) and torch.equal(second, draw(backend))


@on_every_backend
def test_nothing_is_drawn_in_vain(backend):
    state = torch.get_rng_state()
    draw(backend, p=0.0)  # nothing to drop
    draw(backend, 1)  # another generator
    assert torch.equal(torch.get_rng_state(), state)


def test_generator_of_another_type():
    with pytest.raises(TypeError, match="generator must be a torch.Generator, got int"):
        cross_attention(**qkv(), dropout_p=0.5, generator=3)


# ---- empty sizes ----


@on_every_backend
@pytest.mark.parametrize("empty_rows", ["zero", "uniform", "attend_all"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("size", ["b", "m", "n"], ids=["B = 0", "M = 0", "N = 0"])
def test_empty_sizes(size, masked, empty_rows, backend):
    tensors = {n: t.requires_grad_() for n, t in qkv(**{size: 0}).items()}
    b, _, m, _ = tensors["q"].shape
    n = tensors["k"].shape[2]
    rest = dict(
        bias=randn(HQ, m, n).requires_grad_(), gate=randn(HQ).requires_grad_(), scale=randn(HQ).requires_grad_()
    )
    mask = Mask.causal(m, n) & Mask.key_padding(torch.ones(b, n, dtype=torch.bool)) if masked else None
    y, lse = cross_attention(**tensors, mask=mask, **rest, empty_rows=empty_rows, return_lse=True, backend=backend)
    assert y.shape == (b, HQ, m, DV) and lse.shape == (b, HQ, m)
    assert (y == 0).all() and (lse == -math.inf).all()
    inputs = [*tensors.values(), *rest.values()]
    for grad, t in zip(torch.autograd.grad(y.sum() + lse.sum(), inputs), inputs):
        assert grad.shape == t.shape and (grad == 0).all()


@on_every_backend
def test_no_heads(backend):
    q, k, v = (t[:, :0] for t in qkv().values())
    assert cross_attention(q, k, v, backend=backend).shape == (B, 0, M, DV)


# ---- gradients ----

DIFFERENTIABLE = ("q", "k", "v", "bias", "gate", "scale")


@cache
def gradients(wanted: tuple[str, ...], backend: str, dtype: torch.dtype) -> dict[str, Tensor | None]:
    tensors = qkv(dtype=dtype) | {
        "bias": randn(HQ, M, N, seed=6, dtype=dtype),
        "gate": randn(HQ, seed=7, dtype=dtype),
        "scale": randn(HQ, seed=8, dtype=dtype),
    }
    for name in wanted:
        tensors[name].requires_grad_()
    y = cross_attention(**tensors, backend=backend)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.square().sum().backward()
    return {name: t.grad for name, t in tensors.items()}


@on_every_backend
@pytest.mark.parametrize(
    "wanted", [(), *((name,) for name in DIFFERENTIABLE), ("k", "bias"), ("q", "gate")], ids=" ".join
)
def test_gradients_only_where_asked_for(wanted, backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    everything, some = gradients(DIFFERENTIABLE, backend, dtype), gradients(wanted, backend, dtype)
    assert [name for name, grad in some.items() if grad is not None] == [n for n in DIFFERENTIABLE if n in wanted]
    for name in wanted:
        torch.testing.assert_close(some[name], everything[name])


@on_every_backend
def test_arguments_are_left_alone(backend):
    tensors = qkv() | dict(bias=randn(M, N), gate=randn(HQ), scale=randn(HQ))
    before = {name: t.clone() for name, t in tensors.items()}
    for t in tensors.values():
        t.requires_grad_()
    mask = Mask.lengths(torch.tensor([3, 0])) & Mask.groups(BITS)
    cross_attention(
        **tensors, mask=mask, empty_rows="uniform", dropout_p=0.2, softcap=1.0, backend=backend
    ).sum().backward()
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())
    assert torch.equal(mask.visible, BITS) and mask.end.flatten().tolist() == [3, 0]
