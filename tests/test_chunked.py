"""Chunks against one call over their concatenation, and against the reference."""

import functools
import math

import pytest
import torch
from torch import nn

from crossattn_kernels import Mask, cross_attention, cross_attention_chunked
from crossattn_kernels.chunked import State, merge
from crossattn_kernels.testing import assert_within_budget, compare, worst

LENGTHS = [(7, 16, 9), (0, 5, 0, 3), (40,), (1, 1, 1)]


def inputs(lengths, dtype=torch.float32, B=2, Hq=4, Hk=2, M=11, D=16, Dv=24):
    g = torch.Generator().manual_seed(sum(lengths))
    q = torch.randn(B, Hq, M, D, generator=g).to(dtype)
    pairs = [
        (torch.randn(B, Hk, n, D, generator=g).to(dtype), torch.randn(B, Hk, n, Dv, generator=g).to(dtype))
        for n in lengths
    ]
    return q, pairs


def whole(q, pairs, do, dlse, dtype, options):
    """Results and gradients of the reference on the concatenation."""
    q = q.detach().to(dtype).requires_grad_()
    k, v = (torch.cat([p[i].detach().to(dtype) for p in pairs], 2).requires_grad_() for i in (0, 1))
    rest = {n: t.detach().to(dtype).requires_grad_() if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    o, lse = cross_attention(
        q, k, v, **rest, generator=torch.Generator().manual_seed(3), return_lse=True, backend="reference"
    )
    return results(o, lse, do, dlse, q, rest, k, v)


def results(o, lse, do, dlse, q, rest, *kv):
    wanted = {"q": q, **{n: t for n, t in rest.items() if isinstance(t, torch.Tensor) and t.requires_grad}}
    loss = (o * do.to(o.dtype)).sum() + (lse.masked_fill(lse == -math.inf, 0) * dlse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, [*wanted.values(), *kv])
    named = {f"d{n}": g for n, g in zip(wanted, grads)}
    n = len(kv) // 2
    dk, dv = (torch.cat(grads[len(wanted) + i * n :][:n], 2) for i in (0, 1))
    return {"y": o.detach(), "lse": lse.detach(), **named, "dk": dk, "dv": dv}


CASES = {
    "plain": lambda N: {},
    "bias": lambda N: dict(bias=torch.randn(1, 4, 11, N)),
    "scalar bias, one bit for all keys": lambda N: dict(
        bias=torch.randn(()), mask=Mask(keys=torch.tensor([[True], [False]]))
    ),
    "key bias, gate": lambda N: dict(bias=torch.randn(2, 1, 1, N), gate=torch.randn(4)),
    "channel gate, softcap": lambda N: dict(gate=torch.randn(4, 24), softcap=2.0),
    "dropout": lambda N: dict(dropout_p=0.3),
    "ranges": lambda N: dict(mask=Mask(torch.arange(11)[None, None] // 4, torch.arange(11)[None, None] + N)),
    "keys, tiles": lambda N: dict(
        mask=Mask(keys=torch.arange(N)[None] % 3 > 0) & Mask.groups(torch.rand(11, -(-N // 4)) > 0.5, 1, 4)
    ),
}


# the interpreter is slow: one list of lengths, with empty chunks
@pytest.mark.parametrize(("backend", "lengths"), [*(("torch", n) for n in LENGTHS), ("triton", LENGTHS[1])], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_whole(backend, name, lengths):
    rows = [rows_of_a_draw(seed, backend, name, lengths) for seed in range(4)]
    assert_within_budget(worst(rows), f"{name} {lengths}")


def rows_of_a_draw(seed, backend, name, lengths):
    torch.manual_seed(seed)
    q, pairs = inputs(lengths)
    options = CASES[name](sum(lengths))
    do, dlse = torch.randn(2, 4, 11, 24), torch.randn(2, 4, 11)
    q_ = q.clone().requires_grad_()
    kv = [t.clone().requires_grad_() for i in (0, 1) for t in (p[i] for p in pairs)]
    chunks = list(zip(kv[: len(pairs)], kv[len(pairs) :]))
    rest = {n: t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    o, lse = cross_attention_chunked(
        q_, chunks, **rest, generator=torch.Generator().manual_seed(3), return_lse=True, backend=backend
    )
    got = results(o, lse, do, dlse, q_, rest, *kv)
    oracle, eager = (whole(q, pairs, do, dlse, dtype, options) for dtype in (torch.float64, torch.float32))
    return compare(got, oracle, eager)


def test_low_precision():
    q, pairs = inputs((33, 20), torch.bfloat16)
    do, dlse = torch.randn(2, 4, 11, 24), torch.randn(2, 4, 11)
    q_ = q.clone().requires_grad_()
    kv = [t.clone().requires_grad_() for i in (0, 1) for t in (p[i] for p in pairs)]
    o, lse = cross_attention_chunked(q_, list(zip(kv[:2], kv[2:])), return_lse=True)
    got = results(o, lse, do, dlse, q_, {}, *kv)
    oracle, eager = (whole(q, pairs, do, dlse, dtype, {}) for dtype in (torch.float64, torch.bfloat16))
    assert_within_budget(compare(got, oracle, eager))


class Project(nn.Module):
    def __init__(self):
        super().__init__()
        self.k, self.v = nn.Linear(6, 32), nn.Linear(6, 32)

    def forward(self, x):
        return tuple(p(x).unflatten(2, (2, 16)).transpose(1, 2) for p in (self.k, self.v))


def grads_of(loss, tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


@pytest.mark.parametrize("captured", [False, True])
def test_callables_give_every_gradient(captured):
    """Parameters are found in the closure; a context is found as an argument, or in the closure if it is a leaf."""
    torch.manual_seed(0)
    project = Project().double()
    raw = torch.randn(2, 30, 6, dtype=torch.float64, requires_grad=True)
    context = raw if captured else torch.sin(raw)
    q = torch.randn(2, 4, 5, 16, dtype=torch.float64, requires_grad=True)
    pieces = context.detach().split(10, 1) if captured else context.split(10, 1)
    leaves = [p.clone().requires_grad_() for p in pieces]
    chunks = [
        (lambda x=x: project(x)) if captured else functools.partial(project, x)
        for x in (leaves if captured else pieces)
    ]
    sources = [q, *project.parameters(), *(leaves if captured else [raw])]
    got = grads_of(cross_attention_chunked(q, chunks).square().sum(), sources)
    k, v = project(torch.cat(leaves, 1) if captured else context)
    want = grads_of(cross_attention(q, k, v, backend="reference").square().sum(), sources)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("of_keys", [lambda k: k, torch.sin], ids=["are", "come from"])
def test_values_that_are_or_come_from_the_keys(of_keys, called):
    """What v owes to k is counted once."""
    x = torch.randn(1, 2, 7, 16, dtype=torch.float64, requires_grad=True)
    w = torch.randn(16, dtype=torch.float64, requires_grad=True)
    q = torch.randn(1, 4, 5, 16, dtype=torch.float64)

    def pair(x):
        k = x * w
        return k, of_keys(k)

    chunks = [functools.partial(pair, t) if called else pair(t) for t in x.split(4, 2)]
    got = grads_of(cross_attention_chunked(q, chunks).square().sum(), [x, w])
    torch.testing.assert_close(got, grads_of(cross_attention(q, *pair(x)).square().sum(), [x, w]))


def test_callables_are_called_again_one_at_a_time():
    """k and v of one chunk alone are alive: forward and backward."""
    import weakref

    alive, most = [], []

    def make(i):
        def chunk():
            k, v = (torch.full((1, 1, 4, 16), float(i + 1)) * w for w in weights)
            most.append(sum(r() is not None for r in alive) // 2)
            alive.extend((weakref.ref(k), weakref.ref(v)))
            return k, v

        return chunk

    weights = [torch.ones(16, requires_grad=True) for _ in range(2)]
    q = torch.randn(1, 1, 3, 16, requires_grad=True)
    cross_attention_chunked(q, [make(i) for i in range(5)]).sum().backward()
    assert len(most) == 10 and max(most) <= 1
    assert weights[0].grad is not None and weights[1].grad.abs().sum() > 0


def test_captured_result_of_a_computation_is_refused():
    x = torch.randn(1, 4, 6, requires_grad=True).sin()
    project = Project()
    with pytest.raises(ValueError, match="functools.partial"):
        cross_attention_chunked(torch.randn(1, 2, 3, 16), [lambda: project(x)])


def test_no_chunks_and_empty_chunks():
    q = torch.randn(2, 3, 4, 8, requires_grad=True)
    o, lse = cross_attention_chunked(q, [], return_lse=True)
    assert o.shape == q.shape and not o.any() and torch.equal(lse, torch.full((2, 3, 4), -math.inf))
    none = torch.randn(2, 3, 0, 8, requires_grad=True)
    o, lse = cross_attention_chunked(q, [(none, none)] * 2, return_lse=True)
    assert not o.any() and (lse == -math.inf).all()
    o.sum().backward()
    assert not q.grad.any() and none.grad.shape == none.shape


def test_merge():
    a, b = (State(torch.randn(3, 5, 8), torch.randn(3, 5), torch.rand(3, 5)) for _ in range(2))
    empty = State(torch.zeros(3, 5, 8), torch.full((3, 5), -math.inf), torch.ones(3, 5))
    for x, y in zip(merge(a, b), merge(b, a)):
        torch.testing.assert_close(x, y)
    for x, y in zip(merge(a, empty), a):
        assert torch.equal(x, y)
    nothing = merge(empty, empty)
    assert not nothing.acc.any() and not nothing.total.any() and torch.equal(nothing.high, empty.high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "Dv"), [("torch", 24), ("torch", 16), ("triton", 24)])
def test_rows_whose_every_logit_is_the_least_number(backend, Dv, dtype):
    """What many models add to hide a key, added to all keys of a row: lse has no digit left of their number.

    PyTorch's flash kernel takes v of q's head size.
    """
    torch.manual_seed(0)
    q, pairs = inputs((7, 16, 9), dtype, Dv=Dv)
    bias = torch.zeros(2, 1, 11, 32, dtype=dtype)
    bias[:, :, 3:6] = torch.finfo(dtype).min
    do = torch.randn(2, 4, 11, Dv).to(dtype)

    def found(attend, k, v, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, *k, *v)]
        n = len(k)
        o = attend(leaves[0], leaves[1 : 1 + n], leaves[1 + n :], bias.to(dtype))
        dq, *rest = torch.autograd.grad(o, leaves, do.to(dtype))
        return dict(y=o.detach(), dq=dq, dk=torch.cat(rest[:n], 2), dv=torch.cat(rest[n:], 2))

    def chunked(q, k, v, bias):
        return cross_attention_chunked(q, list(zip(k, v)), bias=bias, backend=backend)

    def reference(q, k, v, bias):
        return cross_attention(q, torch.cat(k, 2), torch.cat(v, 2), bias=bias, backend="reference")

    got = found(chunked, *zip(*pairs), dtype)
    assert_within_budget(compare(got, *(found(reference, *zip(*pairs), t) for t in (torch.float64, dtype))))


def test_layout_and_expanded_batches():
    leaf = torch.randn(1, 4, 7, 16, requires_grad=True)
    q = leaf.expand(3, -1, -1, -1)
    k = torch.randn(3, 2, 9, 16)
    o = cross_attention_chunked(q, [(k, k), (2 * k, k)])
    assert o.transpose(1, 2).flatten(2).data_ptr() == o.data_ptr()
    want = cross_attention(q, torch.cat((k, 2 * k), 2), torch.cat((k, k), 2))
    torch.testing.assert_close(grads_of(o.sin().sum(), [leaf]), grads_of(want.sin().sum(), [leaf]))


def keep(*shape):
    return Mask.key_padding(torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(bias=torch.zeros(1, 1, 1, 13)), ValueError, "bias must cover the 11 keys of all chunks"),
        (dict(bias=torch.zeros(11, 4)), ValueError, "bias must cover the 5 or more keys of all chunks"),
        (dict(bias=1.0), TypeError, "bias must be a tensor, got float"),
        (dict(mask=keep(1, 12)), ValueError, "mask.keys must cover the 11 keys"),
        (dict(mask=keep(2, 10)), ValueError, r"mask.keys must cover the 11 keys of all chunks, got \(2, 10\)"),
        (dict(mask=keep(2, 3)), ValueError, r"mask.keys must cover the 5 or more keys of all chunks, got \(2, 3\)"),
        (dict(mask=Mask.groups(torch.ones(11, 2) > 0, 1, 4)), ValueError, "mask.visible must cover the 11 keys"),
        (dict(mask=torch.ones(2, 11) > 0), TypeError, r"must be a Mask.*key_padding.*got Tensor.*mask is \(2, 11\)"),
        (dict(mask="lengths"), TypeError, "mask must be a Mask.*got str"),
        (dict(bias=torch.zeros(2, 11).numpy()), TypeError, "bias must be a tensor, got ndarray"),
        (dict(scale=torch.ones(())), NotImplementedError, "multiply q"),
        (dict(backend="reference"), NotImplementedError, "no chunks"),
        (dict(backend="fast"), ValueError, "backend"),
        (dict(empty_rows="none"), ValueError, "empty_rows"),
        (dict(empty_rows="uniform", mask=Mask.lengths(torch.ones(2, dtype=torch.long))), NotImplementedError, "empty"),
        (dict(dropout_p=1.0), ValueError, "dropout_p"),
        (dict(gate=torch.zeros(5)), ValueError, "gate"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)  # fmt: skip
def test_bad_input(change, error, words):
    q, pairs = inputs((5, 6))
    with pytest.raises(error, match=words):
        cross_attention_chunked(q, pairs, **change)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(dropout_p=2.0), ValueError),
        (dict(softcap=-2.0), ValueError),
        (dict(scale="x"), TypeError),
        (dict(bias=torch.zeros(1, 1, 1, 2)), ValueError),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_no_chunks_excuse_no_argument(options, error):
    with pytest.raises(error, match=f"{next(iter(options))} must"):
        cross_attention_chunked(torch.randn(2, 4, 3, 8), [], **options)


@pytest.mark.parametrize("q", [None, torch.zeros(4, 3, 8)], ids=["none", "3 dimensions"])
@pytest.mark.parametrize("chunks", [[], [2 * (torch.zeros(1, 4, 5, 8),)]], ids=len)
def test_bad_q(q, chunks):
    with pytest.raises((TypeError, ValueError), match="q must"):
        cross_attention_chunked(q, chunks)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    ("k", "v", "words"),
    [
        ((2, 2, 6, 16), (2, 2, 6, 20), r"one head size of v.*chunks\[0\] is 24 and that of chunks\[1\] 20: q .*"),
        ((2, 1, 6, 16), (2, 1, 6, 24), r"one number of key heads.*chunks\[0\] is 2 and that of chunks\[1\] 1: q .*"),
        ((2, 2, 6, 15), (2, 2, 6, 24), "last size of `k`"),
        ((3, 2, 6, 16), (3, 2, 6, 24), "batch of `k`"),
        ((2, 6, 16), (2, 6, 24), "k must have 4 dimensions"),
        ((), (2, 2, 6, 24), "k must have 4 dimensions"),
    ],
    ids=lambda v: str(v) if isinstance(v, tuple) else "",
)
def test_chunks_that_do_not_fit(k, v, words, called):
    q, pairs = inputs((5,))
    pair = torch.zeros(k), torch.zeros(v)
    with pytest.raises(ValueError, match=words):
        cross_attention_chunked(q, [*pairs, (lambda: pair) if called else pair])


def test_chunks_of_one_batch():
    """Where q is shared by all, the chunks say how many there are; a chunk that all share is welcome elsewhere."""
    q, pairs = inputs((5, 6))
    shared = pairs[0], tuple(t[:1] for t in pairs[1])
    with pytest.raises(ValueError, match="one batch"):
        cross_attention_chunked(q[:1], shared)
    k, v = (torch.cat((a, b.expand(2, -1, -1, -1)), 2) for a, b in zip(*shared))
    torch.testing.assert_close(cross_attention_chunked(q, shared), cross_attention(q, k, v))


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("chunk", [5, None, "kv", (torch.zeros(1),), [torch.zeros(2), None]], ids=repr)
def test_what_is_not_a_pair(chunk, called):
    with pytest.raises(TypeError, match=r"a chunk must be a pair of tensors \(k, v\), .* got \("):
        cross_attention_chunked(torch.zeros(1, 2, 3, 8), [(lambda: chunk) if called else chunk])
