"""One call described once: every bad input in one sentence, canonical shapes, costs worked by hand, shared batches."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from crossattn_kernels import Mask, cross_attention, explain
from crossattn_kernels.problem import Inputs, Problem, canonical, matmul_flops

B, HQ, HK, M, N, D, DV = 2, 4, 2, 5, 7, 8, 6


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def call(**changes) -> dict:
    return dict(q=zeros(B, HQ, M, D), k=zeros(B, HK, N, D), v=zeros(B, HK, N, DV)) | changes


def flags(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.bool)


def whole(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.int64)


# what is wrong: (changes to a good call, error, the argument it must name, the shape it must show besides q, k and v)
BAD = {
    "q of rank 3": (dict(q=zeros(HQ, M, D)), ValueError, "q", ()),
    "k of rank 5": (dict(k=zeros(1, B, HK, N, D)), ValueError, "k", ()),
    "v of rank 0": (dict(v=zeros()), ValueError, "v", ()),
    "q a list": (dict(q=[[1.0]]), TypeError, "q", ()),
    "v missing": (dict(v=None), TypeError, "v", ()),
    "B of k": (dict(k=zeros(3, HK, N, D), v=zeros(3, HK, N, DV)), ValueError, "k", ()),
    "B of v": (dict(v=zeros(1, HK, N, DV)), ValueError, "v", ()),
    "H of v": (dict(v=zeros(B, HQ, N, DV)), ValueError, "v", ()),
    "D of k": (dict(k=zeros(B, HK, N, D + 1)), ValueError, "k", ()),
    "D of 0": (dict(q=zeros(B, HQ, M, 0), k=zeros(B, HK, N, 0)), ValueError, "q", ()),
    "N of v": (dict(v=zeros(B, HK, N + 1, DV)), ValueError, "v", ()),
    "Hq no multiple of Hk": (dict(q=zeros(B, 5, M, D)), ValueError, "k", ()),
    "Hk above Hq": (dict(q=zeros(B, 1, M, D)), ValueError, "k", ()),
    "no key heads": (dict(k=zeros(B, 0, N, D), v=zeros(B, 0, N, DV)), ValueError, "k", ()),
    "mixed dtypes": (dict(k=zeros(B, HK, N, D, dtype=torch.float16)), TypeError, "k", ()),
    "integer tensors": (dict(q=whole(B, HQ, M, D), k=whole(B, HK, N, D), v=whole(B, HK, N, DV)), TypeError, "q", ()),
    "bool tensors": (dict(q=flags(B, HQ, M, D), k=flags(B, HK, N, D), v=flags(B, HK, N, DV)), TypeError, "q", ()),
    "fp8 tensors": ({n: t.to(torch.float8_e4m3fn) for n, t in call().items()}, TypeError, "q", ()),
    "v without channels": (dict(v=zeros(B, HK, N, 0)), ValueError, "v", ()),
    "mixed devices": (dict(k=zeros(B, HK, N, D, device="meta")), ValueError, "k", ()),
    "mask of another type": (dict(mask="causal"), TypeError, "mask", ()),
    "mask of integers": (dict(mask=whole(M, N)), TypeError, "mask", (M, N)),
    "bool mask too wide": (dict(mask=flags(M, N + 1)), ValueError, "mask", (M, N + 1)),
    "bool mask of rank 5": (dict(mask=flags(1, B, HQ, M, N)), ValueError, "mask", (1, B, HQ, M, N)),
    "float mask too wide": (dict(mask=zeros(M, N + 1)), ValueError, "mask", (M, N + 1)),
    "float mask beside a bias": (dict(mask=zeros(3, N), bias=zeros(M, N)), ValueError, "mask", (3, N)),
    "bias beside a float mask": (dict(mask=zeros(M, N), bias=zeros(3, N)), ValueError, "bias", (3, N)),
    "mask on another device": (dict(mask=zeros(M, N, device="meta")), ValueError, "mask", (M, N)),
    "start of wrong M": (dict(mask=Mask(start=whole(B, 1, M + 1))), ValueError, "mask.start", (B, 1, M + 1)),
    "end of wrong B": (dict(mask=Mask.lengths(whole(3))), ValueError, "mask.end", (3, 1, 1)),
    "end of rank 4": (dict(mask=Mask(end=whole(1, B, 1, M))), ValueError, "mask.end", (1, B, 1, M)),
    "start of floats": (dict(mask=Mask(start=zeros(1, 1, M))), TypeError, "mask.start", (1, 1, M)),
    "start of bools": (dict(mask=Mask(start=flags(1, 1, M))), TypeError, "mask.start", (1, 1, M)),
    "start a number": (dict(mask=Mask(start=3)), TypeError, "mask.start", ()),
    "keys too short": (dict(mask=Mask.key_padding(flags(B, N - 1))), ValueError, "mask.keys", (B, N - 1)),
    "keys a list": (dict(mask=Mask(keys=[True] * N)), TypeError, "mask.keys", ()),
    "keys of integers": (dict(mask=Mask(keys=whole(B, N))), TypeError, "mask.keys", (B, N)),
    "visible ungrouped": (dict(mask=Mask.groups(flags(M, N), 1, 2)), ValueError, "mask.visible", (1, 1, M, N)),
    "visible of floats": (dict(mask=Mask(visible=zeros(1, 1, M, N))), TypeError, "mask.visible", (1, 1, M, N)),
    "keys on another device": (dict(mask=Mask(keys=flags(B, N).to("meta"))), ValueError, "mask.keys", (B, N)),
    "bias that does not broadcast": (dict(bias=zeros(HK, M, N)), ValueError, "bias", (HK, M, N)),
    "bias of rank 5": (dict(bias=zeros(1, 1, 1, M, N)), ValueError, "bias", (1, 1, 1, M, N)),
    "bias of integers": (dict(bias=whole(M, N)), TypeError, "bias", (M, N)),
    "bias a number": (dict(bias=1.0), TypeError, "bias", ()),
    "bias on another device": (dict(bias=zeros(M, N, device="meta")), ValueError, "bias", (M, N)),
    "gate that does not broadcast": (dict(gate=zeros(HQ + 1)), ValueError, "gate", (HQ + 1,)),
    "gate with D instead of Dv": (dict(gate=zeros(HQ, D)), ValueError, "gate", (HQ, D)),
    "gate of integers": (dict(gate=whole(HQ)), TypeError, "gate", (HQ,)),
    "gate a number": (dict(gate=0.5), TypeError, "gate", ()),
    "gate on another device": (dict(gate=zeros(HQ, device="meta")), ValueError, "gate", (HQ,)),
    "scale of wrong shape": (dict(scale=zeros(HK)), ValueError, "scale", (HK,)),
    "scale of integers": (dict(scale=whole(HQ)), TypeError, "scale", (HQ,)),
    "scale on another device": (dict(scale=zeros(HQ, device="meta")), ValueError, "scale", (HQ,)),
    "scale infinite": (dict(scale=math.inf), ValueError, "scale", ()),
    "scale nan": (dict(scale=math.nan), ValueError, "scale", ()),
    "scale a string": (dict(scale="auto"), TypeError, "scale", ()),
    "scale a flag": (dict(scale=np.bool_(True)), TypeError, "scale", ()),
    "scale complex": (dict(scale=1j), TypeError, "scale", ()),
    "softcap 0": (dict(softcap=0.0), ValueError, "softcap", ()),
    "softcap negative": (dict(softcap=-1.0), ValueError, "softcap", ()),
    "softcap infinite": (dict(softcap=math.inf), ValueError, "softcap", ()),
    "softcap beyond fp32": (dict(softcap=1e39), ValueError, "softcap", ()),
    "scale beyond a float": (dict(scale=10**400), ValueError, "scale", ()),
    "bias sparse": (dict(bias=zeros(M, N).to_sparse()), TypeError, "bias", ()),
    "mask sparse": (dict(mask=zeros(M, N).to_sparse()), TypeError, "mask", ()),
    "scale sparse": (dict(scale=zeros(HQ).to_sparse()), TypeError, "scale", ()),
    "dropout_p 1": (dict(dropout_p=1.0), ValueError, "dropout_p", ()),
    "dropout_p negative": (dict(dropout_p=-0.1), ValueError, "dropout_p", ()),
    "dropout_p nan": (dict(dropout_p=math.nan), ValueError, "dropout_p", ()),
    "dropout_p a flag": (dict(dropout_p=True), TypeError, "dropout_p", ()),
    "empty_rows unknown": (dict(empty_rows="mean"), ValueError, "empty_rows", ()),
    "backend unknown": (dict(backend="cuda"), ValueError, "backend", ()),
}


@pytest.mark.parametrize("door", [cross_attention, explain], ids=lambda door: door.__name__)
@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_is_one_sentence(wrong, door):
    changes, error, name, shape = BAD[wrong]
    arguments = call(**({"dropout_p": 0.5} | changes))
    state = torch.get_rng_state()
    with pytest.raises(error) as raised:
        door(**arguments)
    message = str(raised.value)
    assert "\n" not in message
    assert re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", message.partition(": q ")[0])
    shown = [tuple(t.shape) for n in "qkv" if isinstance(t := arguments[n], Tensor)] + [shape] * (shape != ())
    assert all(str(s) in message for s in shown)
    assert torch.equal(torch.get_rng_state(), state), "a call that failed drew a random number"


@pytest.mark.parametrize("door", [cross_attention, explain], ids=lambda door: door.__name__)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda t: torch.nested.nested_tensor([t[0], t[1, :, :2]]), "nested: pad it, and pass Mask.lengths"),
        (
            lambda t: torch.nested.nested_tensor([*t], layout=torch.jagged),
            "nested: pad it, and pass Mask.lengths",
        ),
        (Tensor.to_sparse, "sparse: pass {}.to_dense()"),
    ],
    ids=["nested", "jagged", "sparse"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_only_dense_tensors(make, got, name, door):
    arguments = call()
    with pytest.raises(TypeError) as raised:
        door(**arguments | {name: make(arguments[name])})
    assert str(raised.value) == f"{name} must be a dense tensor, not {got.format(name)}"
    for other in {"q", "k", "v"} - {name}:
        with pytest.raises(TypeError, match=f"{other} must be a tensor, got list"):
            door(**arguments | {name: make(arguments[name]), other: [1.0]})


@pytest.mark.parametrize(
    ("changes", "error", "hint"),
    [
        ({n: t.transpose(1, 2) for n, t in call().items()}, ValueError, "pass transpose(1, 2) of each"),
        (dict(mask=flags(B, N)), ValueError, "pass Mask.key_padding(mask)"),
        (dict(mask=whole(B, N)), TypeError, "pass Mask.key_padding(mask.bool())"),
        (dict(mask=zeros(B, N)), ValueError, None),
        (dict(mask=flags(B + 1, N)), ValueError, None),
        (dict(bias=zeros(B, N)), ValueError, None),
        (dict(q=zeros(B, 5, M, D)), ValueError, None),
    ],
    ids=["bshd", "padding", "padding of integers", "floats", "another batch", "bias", "heads that never fit"],
)
def test_what_was_probably_meant(changes, error, hint):
    with pytest.raises(error) as raised:
        cross_attention(**call(**changes))
    message = str(raised.value)
    assert "\n" not in message
    assert f"{hint})" in message if hint else " pass " not in message


@pytest.mark.parametrize(
    "number", [np.float32(0.25), np.float16(0.25), np.float64(0.25), Fraction(1, 4), np.int64(2), 2]
)
def test_any_real_number_is_a_number(number):
    _, options = canonical(**call(scale=number, softcap=number, dropout_p=min(number, 0.25)))
    assert (options.scale, options.softcap, options.dropout_p) == (number, number, 0.25)
    assert all(type(x) is float for x in (options.scale, options.softcap, options.dropout_p))
    y = cross_attention(**call(scale=number))
    assert torch.equal(y, cross_attention(**call(scale=float(number))))


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, ["torch.float64 is wider than fp32"]),
        (dict(D=300), ["torch.float64 is wider than fp32", "D = 300 and Dv = 6"]),
        (dict(D=300, dtype=torch.float32), ["D = 300 and Dv = 6"]),
        (dict(D=300, device="meta"), ["torch.float64 is wider", "D = 300 and Dv = 6", "on meta, not on a GPU"]),
    ],
    ids=["fp64", "fp64 and D", "D", "fp64 and D and device"],
)
def test_explicit_backend_gives_all_reasons(changes, reasons):
    pytest.importorskip("triton")
    options = dict(D=D, dtype=torch.float64, device="cpu") | changes
    size = options.pop("D")
    arguments = dict(
        q=zeros(B, HQ, M, size, **options), k=zeros(B, HK, N, size, **options), v=zeros(B, HK, N, DV, **options)
    )
    for door in (cross_attention, explain):
        with pytest.raises(NotImplementedError) as raised:
            door(**arguments, backend="triton")
        message = str(raised.value)
        assert "backend='triton'" in message and "\n" not in message
        assert len(message.split("; ")) == len(reasons)
        assert all(reason in message for reason in reasons)


# ---- canonical form ----


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), (1, 1, 1, 1)),
        ((1,), (1, 1, 1, 1)),
        ((HQ,), (1, HQ, 1, 1)),
        ((DV,), (1, 1, 1, DV)),
        ((HQ, DV), (1, HQ, 1, DV)),
        ((HQ, 1), (1, HQ, 1, 1)),
        ((1, DV), (1, 1, 1, DV)),
        ((M, DV), (1, 1, M, DV)),
        ((M, 1), (1, 1, M, 1)),
        ((HQ, 1, 1), (1, HQ, 1, 1)),
        ((B, 1, M, 1), (B, 1, M, 1)),
        ((B, HQ, M, DV), (B, HQ, M, DV)),
    ],
    ids=str,
)
def test_gate_forms(given, expected):
    gate = torch.arange(math.prod(given)).reshape(given).float()
    x, _ = canonical(**call(gate=gate))
    assert x.gate.shape == expected
    assert torch.equal(x.gate.flatten(), gate.flatten())
    assert x.gate_varies == (expected[3] > 1)


def test_gate_of_as_many_channels_as_heads_is_read_by_head():
    x, _ = canonical(**call(v=zeros(B, HK, N, HQ), gate=zeros(HQ)))
    assert x.gate.shape == (1, HQ, 1, 1)


@pytest.mark.parametrize("given", [(), (1,), (HQ,)], ids=str)
def test_scale_forms(given):
    x, options = canonical(**call(scale=torch.full(given, 3.0)))
    assert torch.equal(x.scale, torch.full((1, HQ), 3.0))
    assert canonical(**call(scale=3))[1].scale == 3.0
    assert canonical(**call())[1].scale == D**-0.5 and canonical(**call())[0].scale is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_ranges_become_int32(dtype):
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    given = torch.tensor([low, 2, 3, 4, high], dtype=dtype)
    x, _ = canonical(**call(mask=Mask(start=given)))
    assert x.start.dtype == torch.int32 and x.start.shape == (1, 1, M)
    if dtype == torch.int32:  # no launch in each call
        assert x.start.data_ptr() == given.data_ptr()
    else:
        assert x.start.flatten().tolist() == [0, 2, 3, 4, min(high, 2**31 - 1)]


@pytest.mark.parametrize(
    ("shape", "field", "expected"),
    [
        ((N,), "keys", (1, N)),
        ((B, 1, 1, N), "keys", (B, N)),
        ((M, N), "visible", (1, 1, M, N)),
        ((M, 1), "visible", (1, 1, M, 1)),
        ((HQ, 1, N), "visible", (1, HQ, 1, N)),
        ((B, 1, M, N), "visible", (B, 1, M, N)),
    ],
    ids=str,
)
def test_bool_mask_takes_the_cheapest_field(shape, field, expected):
    x, _ = canonical(**call(mask=flags(*shape)))
    fields = {name: t for name in ("start", "end", "keys", "visible") if (t := getattr(x, name)) is not None}
    assert {name: tuple(t.shape) for name, t in fields.items()} == {field: expected}


def test_float_mask_is_added_to_the_bias():
    mask, bias = torch.randn(M, N), torch.randn(HQ, 1, N)
    assert torch.equal(canonical(**call(mask=mask))[0].bias, mask[None, None])
    assert torch.equal(canonical(**call(mask=mask, bias=bias))[0].bias, (bias + mask)[None])


@pytest.mark.parametrize(
    ("q", "k", "expected"),
    [(2, 2, 2), (1, 2, 2), (2, 1, 2), (1, 1, 1), (0, 0, 0), (0, 1, 0), (1, 0, 0)],
)
def test_batch_sizes(q, k, expected):
    x, _ = canonical(zeros(q, HQ, M, D), zeros(k, HK, N, D), zeros(k, HK, N, DV))
    assert x.sizes == (expected, HQ, M, N)


# ---- shared batches ----


@pytest.mark.parametrize("expanded", ["q", "k", "kv", "qkv"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_expanded_batch_has_a_gradient_an_entry_and_its_base_their_sum(backend, expanded):
    """As with a copy of each entry, to whoever looks at the gradient in between."""
    g = torch.Generator().manual_seed(0)
    base = {n: torch.randn(1, *t.shape[1:], generator=g, dtype=torch.float64) for n, t in call().items()}
    views = {n: t.requires_grad_().expand(3, -1, -1, -1) for n, t in base.items()}
    tensors = {n: t if n in expanded else t.contiguous() for n, t in views.items()}
    dy = torch.randn(3, HQ, M, DV, generator=g, dtype=torch.float64)
    found = torch.autograd.grad(cross_attention(**tensors, backend=backend), [*tensors.values(), *base.values()], dy)
    copies = {n: t.contiguous() for n, t in views.items()}
    y = cross_attention(**copies, backend="reference")
    torch.testing.assert_close(found, torch.autograd.grad(y, [*copies.values(), *base.values()], dy))


def test_an_expanded_batch_is_not_copied():
    tensors = {n: t[:1].expand(3, -1, -1, -1) for n, t in call().items()}
    x, _ = canonical(**tensors)
    assert [t.data_ptr() for t in x[:3]] == [t.data_ptr() for t in tensors.values()]
    assert all(t.stride(0) == 0 for t in x[:3])


# ---- costs ----

SMALL = dict(B=2, Hq=4, Hk=2, M=3, N=5, D=8, Dv=16, device=torch.device("cpu"))


def test_flops_by_hand():
    qk, pv = 2 * 2 * 4 * 3 * 5 * 8, 2 * 2 * 4 * 3 * 5 * 16
    assert (qk, pv) == (1920, 3840)
    problem = Problem(**SMALL, dtype=torch.bfloat16)
    assert problem.flops() == qk + pv == 5760
    assert problem.flops("backward") == 3 * qk + 2 * pv == 13440  # q kᵀ, ds k, dsᵀ q; do vᵀ, pᵀ do
    assert matmul_flops(1, 1, 1, 1, 1, 0, "forward") == 2


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)], ids=str)
def test_bytes_by_hand(dtype, size):
    q, k, v, y, lse = 2 * 4 * 3 * 8, 2 * 2 * 5 * 8, 2 * 2 * 5 * 16, 2 * 4 * 3 * 16, 2 * 4 * 3
    assert (q, k, v, y, lse) == (192, 160, 320, 384, 24)
    problem = Problem(**SMALL, dtype=dtype)
    assert problem.bytes() == size * (q + k + v + y) + 4 * lse  # 1056 elements
    assert problem.bytes("backward") == size * 2 * (q + k + v + y) + 4 * lse  # read q k v y dy, write dq dk dv


def test_problem_of_a_call():
    x, options = canonical(**call(mask=flags(M, N), bias=zeros(N), q=zeros(1, HQ, M, D)))
    expected = Problem(
        B, HQ, HK, M, N, D, DV, torch.float32, torch.device("cpu"),
        masked=True, bias_varies=(False, False, False, True), plain=False, sifts=True, extras=2, pairwise=True,
        scattered=True, shares_q=True, aligned=False,
    )  # fmt: skip
    assert Problem.of(x, options) == expected and expected.group == 2
    assert Problem.of(Inputs(x.q, x.k, x.v), options).masked is False
