"""The torch backend beyond the battery: the flash kernel's share of the work, memory, NaN, empty rows."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossattn_kernels import Mask, cross_attention, tiled
from crossattn_kernels.problem import Gradients, canonical
from crossattn_kernels.testing import (
    LAYOUTS,
    MASKS,
    PLAIN,
    Case,
    assert_within_budget,
    check,
    compare,
    draw,
    run,
    with_dtypes,
)
from crossattn_kernels.testing import Call as Drawn
from crossattn_kernels.tiled import flash, loop
from crossattn_kernels.tiled.parts import BLOCK

BACKENDS = (("torch", None), ("reference", torch.float64), ("reference", None))

BIG = replace(PLAIN, M=90, N=130, D=16)
# the battery sends a gradient through lse, which the flash kernel cannot take; these do not
FLASH = [
    BIG,
    *(replace(BIG, name=f"mask {m}", mask=m) for m in MASKS),
    *(replace(BIG, name=f"{e} {m}", mask=m, empty_rows=e)
      for e in ("uniform", "attend_all") for m in ("ranges", "padding", "every second", "nothing")),
    replace(BIG, name="gate", gate="head"),
    replace(BIG, name="gate at 0", gate="channel", gate_value=0.0),
    *(replace(BIG, name=f"share {s} {m}", share=s, mask=m)
      for s in ("q", "kv", "q expanded", "kv expanded") for m in (None, "ranges")),
    *(replace(BIG, name=f"layout {lay}", layout=lay, mask="media") for lay in ("bshd", "sbhd", "sliced")),
    replace(BIG, name="long", M=1200, N=300, Hq=2, Hk=1, D=8),
    replace(BIG, name="long causal", M=700, N=700, Hq=2, Hk=2, B=1, mask="causal"),
    replace(BIG, name="long window", M=700, N=700, Hq=2, Hk=1, B=1, mask="window"),
    replace(BIG, name="heads 6 / 2", Hq=6),
    replace(BIG, name="D 40", D=40),
    replace(BIG, name="one entry, lengths", B=1, mask="lengths"),
    replace(BIG, name="77 keys", M=300, N=77),
    replace(BIG, name="keys of two tiles, padding", M=40, N=1500, mask="padding"),
]  # fmt: skip


@pytest.mark.parametrize("case", with_dtypes(FLASH, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_gradients_without_lse(case):
    assert_within_budget(check(case, "torch", through_lse=False), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [None, "ranges", "padding", "causal"])
@pytest.mark.parametrize("bias", [(1, 1, 1, 1), (0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 1, 0)], ids=str)
def test_bias_without_a_gradient(bias, mask, dtype):
    """The flash kernel takes a bias of which no gradient is wanted."""
    case = replace(BIG, bias=bias, mask=mask, dtype=dtype)
    assert_within_budget(compare(*(gradients(draw(case), *way) for way in BACKENDS)), case)


def gradients(call: Drawn, backend: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """y and the gradients of q, k and v through y alone."""
    tensors = {n: t.to(dtype or t.dtype).requires_grad_(n in "qkv") for n, t in call.tensors.items()}
    y = cross_attention(**tensors, mask=call.mask, backend=backend)
    grads = torch.autograd.grad(y, [tensors[n] for n in "qkv"], call.dy.to(y.dtype))
    return {"y": y.detach()} | {"d" + n: g for n, g in zip("qkv", grads)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [dict(M=8192, N=600), dict(M=8192, N=600, mask="lengths"), dict(M=16, N=20_000), dict(M=40, N=16 * BLOCK + 8)],
    ids=str,
)
def test_sixteen_bits(sizes, dtype):
    """The kernel sums dk, dv and dq in 16 bits from block to block, so it gets few; the last keys may be very few."""
    case = Case("", B=1, Hq=2, Hk=1, D=16, dtype=dtype, **sizes)
    assert_within_budget(check(case, "torch", through_lse=False), case)


@pytest.mark.parametrize("mask", ["causal", "window", "ranges", "media", "tiles"])
@pytest.mark.parametrize("seed", range(4))
def test_queries_that_see_few_keys(mask, seed):
    """What the flash kernel takes for ds of a query that sees a single key is a rounding error; it has to be 0."""
    case = Case("", B=1, Hq=2, Hk=1, M=512, N=64, D=64, mask=mask)
    assert_within_budget(check(case, "torch", seed=seed + 8, through_lse=False), case)


def test_a_single_key_has_no_gradient_of_its_logit():
    case = Case("", B=1, Hq=2, Hk=2, M=300, N=300, D=64, mask="causal")
    assert run(draw(case), "torch", through_lse=False)["dq"][:, :, 0].count_nonzero() == 0


def test_only_what_is_wanted():
    call = draw(BIG)
    x, options = canonical(*(call.tensors[n] for n in "qkv"))
    y, _, lse, state, _ = tiled.forward(x, options)
    for wanted in ((True, False, False), (False, True, True)):
        grads = tiled.backward(call.dy, None, x, options, y, lse, state, None, Gradients(*wanted))
        assert [g is not None for g in grads[:3]] == list(wanted) and grads[3:] == (None, None, None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M", [1, 40, 900])
def test_layout_of_the_output(M, layout):
    y = run(draw(replace(BIG, M=M, layout=layout)), "torch", through_lse=False)["y"]
    assert y.transpose(1, 2).is_contiguous()


def test_flash_does_the_work(monkeypatch):
    """Plain, ranged and padded calls never reach the tile loop, forward or backward."""

    def refuse(*args):
        raise AssertionError("the tile loop was asked")

    monkeypatch.setattr(loop, "_tiles", refuse)
    for mask in (None, "padding", "dense"):
        run(draw(replace(BIG, mask=mask)), "torch", through_lse=False)


def test_ranges_save_products(monkeypatch):
    """Of two documents of 512 queries and keys each sees its own: half of the products are done."""
    done = []
    kernel = flash.flash_kernel

    def count(q, k, *args, **kwargs):
        done.append(q.shape[0] * q.shape[2] * k.shape[2])
        return kernel(q, k, *args, **kwargs)

    monkeypatch.setattr(flash, "flash_kernel", count)
    q = torch.randn(1, 2, 1024, 16)
    ends = torch.tensor([0, 512, 1024])
    cross_attention(q, q, q, Mask.packed(ends, ends))
    assert sum(done) == 2 * 512 * 512


class Largest(TorchDispatchMode):
    """The size of the largest storage that any operation returned, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


# dropout goes through the same tiles as softcap, and Philox in PyTorch is slow
MEMORY = {
    "plain": {},
    "softcap": dict(softcap=5.0),
    "key bias": dict(bias=(0, 1, 0, 1)),
    "scale": dict(scale="head"),
    "causal": dict(mask="causal"),
    "ranges by head": dict(mask="head ranges"),
    "padding": dict(mask="padding"),
    "uniform": dict(mask="ranges", empty_rows="uniform"),
    "window": dict(mask="window"),
    "lengths": dict(mask="lengths", B=2, Hq=4),
    "gate": dict(gate=(1, 1, 1, 1)),
    "half": dict(mask="media", dtype=torch.bfloat16),
    "Dv": dict(Dv=32),
    "one head of many": dict(Hq=1, Hk=1, M=12_000, N=12_000),
    "padding and bias": dict(mask="padding", bias=(0, 1, 1, 1), B=64, M=512, N=512),
}


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("through_lse", [False, True])
def test_nothing_of_m_by_n(name, through_lse):
    """At 3072 x 3072 and 4 heads no tensor is larger than a 12th of the logits, a third of those of one head."""
    case = replace(PLAIN, **(dict(M=3072, N=3072, D=16, B=1, Hq=4, Hk=2) | MEMORY[name]))
    call = draw(case)
    with Largest() as largest:
        run(call, "torch", through_lse=through_lse)
    assert largest.bytes <= 4 * case.B * case.Hq * case.M * case.N / 12


@pytest.mark.parametrize("scale", [-0.25, 0.0, -1e-30, 1e-50])
def test_a_scale_that_is_not_positive(scale):
    """PyTorch's flash kernel multiplies the -inf of its own causal mask by it."""
    call = draw(replace(BIG, M=300, N=300, mask="causal"))
    call = call._replace(options=call.options | dict(scale=scale))
    exact, eager = (run(call, *way, through_lse=False) for way in BACKENDS[1:])
    assert_within_budget(compare(run(call, "torch", through_lse=False), exact, eager), str(scale))


@pytest.mark.parametrize("high", [1e4, 1e6, 1e30])
@pytest.mark.parametrize("by", ["bias", "logits"])
def test_gradients_where_lse_is_large(by, high):
    """p = exp(s - lse) would be wrong by the digits that lse has lost beside it, up to N times."""
    k = torch.randn(1, 1, 1, 16).expand(-1, -1, 24, -1) if by == "logits" else torch.randn(1, 1, 24, 16)
    q, v = (torch.randn(1, 1, 24, 16) * n for n in (high if by == "logits" else 1, 1))
    bias = torch.full((24, 24), high) if by == "bias" else None
    found = {}
    for backend in ("torch", "reference"):
        leaf = v.clone().requires_grad_()
        cross_attention(q, k, leaf, bias=bias, backend=backend).sum().backward()
        found[backend] = leaf.grad
    torch.testing.assert_close(found["torch"], found["reference"])


def test_another_default_device():
    """Tensors are made where those of the call are, not where others are made by default."""
    q = torch.randn(2, 2, 40, 16, requires_grad=True)
    masks = Mask.lengths(torch.tensor([5, 40])), Mask(end=torch.arange(40)[None, None]), None
    bias = torch.randn(40, 40)
    torch.set_default_device("meta")
    try:
        for mask in masks:
            for options in ({}, dict(softcap=2.0), dict(empty_rows="uniform"), dict(bias=bias)):
                y = cross_attention(q, q, q, mask, **options)
                torch.autograd.grad(y.square().sum(), q)
    finally:
        torch.set_default_device(None)


def test_many_entries():
    """Thousands of entries and heads, through the flash kernel and through the tile loop."""
    q, k = torch.randn(3000, 4, 2, 8), torch.randn(3000, 4, 5, 8)
    for options in ({}, dict(softcap=3.0)):
        want = cross_attention(q, k, k, backend="reference", **options)
        torch.testing.assert_close(cross_attention(q, k, k, **options), want)


# ---- NaN in hidden keys ----


def poison(call: Drawn, key: int, value: float) -> Drawn:
    k, v = (call.tensors[n].clone() for n in "kv")
    k[:, :, key], v[:, :, key] = value, value
    return call._replace(tensors=call.tensors | {"k": k, "v": v})


@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"bias": (0, 1, 0, 1)}, {"share": "kv"}], ids=str)
@pytest.mark.parametrize("mask", ["lengths", "padding", "causal", "media", "dense", "all fields"])
def test_nan_that_nobody_sees(mask, more):
    case = replace(BIG, mask=mask, **more)
    call, last = draw(case), case.N - 1
    call = call._replace(mask=call.mask & Mask.lengths(torch.full((case.B,), last)))
    exact, eager = (run(call, *way, through_lse=False) for way in BACKENDS[1:])
    for value in (torch.nan, torch.inf):
        got = run(poison(call, last, value), "torch", through_lse=False)
        assert_within_budget(compare(got, exact, eager), case)
        assert not any(got[n][:, :, last].any() for n in ("dk", "dv"))


@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}], ids=["flash", "tiles"])
@pytest.mark.parametrize("mask", ["causal", "window", "media", "dense", "tiles", "head ranges"])
def test_nan_that_some_queries_see(mask, more):
    case = replace(BIG, M=300, N=280, mask=mask, **more)
    call, key = draw(case), 100
    sees = call.mask.as_dense(case.B, case.Hq, case.M, case.N)[..., key]  # (B, Hq, M)
    assert 0 < sees.sum() < sees.numel()
    got = run(poison(call, key, torch.nan), "torch", through_lse=False)
    exact, eager = (run(call, *way, through_lse=False) for way in BACKENDS[1:])
    assert all(got[n][sees].isnan().all() for n in ("y", "dq"))
    rows = compare(*({n: r[n][~sees] for n in ("y", "dq")} for r in (got, exact, eager)))
    assert_within_budget(rows, case)


@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}], ids=["flash", "tiles"])
def test_nan_in_queries(more):
    """Of packed segments, and past the last of them: a query that is NaN has no share in others, nor has one of inf."""
    case = replace(BIG, B=1, M=300, N=280, **more)
    call = draw(case)._replace(mask=Mask.packed(torch.tensor([0, 120, 260]), torch.tensor([0, 100, 280]), 300))
    exact, eager = (run(call, *way, through_lse=False) for way in BACKENDS[1:])
    for bad in (torch.nan, torch.inf):
        q = call.tensors["q"].clone()
        q[:, :, 7], q[:, :, 260:] = bad, bad
        got = run(call._replace(tensors=call.tensors | {"q": q}), "torch", through_lse=False)
        assert got["y"][:, :, 7].isnan().all()
        seen = dict(y=(8, 300), lse=(8, 260), dq=(8, 260), dv=(100, 280))
        rows = compare(*({n: r[n][:, :, slice(*s)] for n, s in seen.items()} for r in (got, exact, eager)))
        assert_within_budget(rows, case)
        assert (got["lse"][:, :, 260:] == -torch.inf).all()


# ---- queries that see nothing ----


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_the_mean_of_a_row_that_sees_nothing(bad):
    q, v = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)
    v[0, 0, 2] = bad
    y = cross_attention(q, torch.randn(1, 1, 5, 4), v, Mask(end=torch.tensor([[[0, 2, 5]]])), empty_rows="uniform")
    assert not y[0, 0, [0, 2]].isfinite().any() and y[0, 0, 1].isfinite().all()


def interleaved(M: int, N: int) -> Iterator[Mask]:
    odd = torch.arange(M) % 2 == 1
    yield Mask(end=torch.where(odd, 0, N)[None, None])
    yield Mask(start=torch.where(odd, N, N // 2)[None, None])
    yield Mask.groups((~odd)[:, None].expand(M, N))
    yield Mask(end=torch.where(torch.arange(M) % 7 == 3, 40, 0)[None, None])
    yield Mask(end=torch.where(torch.arange(M) < M // 2, 0, N)[None, None])


@pytest.mark.parametrize("empty_rows", ["zero", "uniform", "attend_all"])
@pytest.mark.parametrize(("M", "N"), [(5, 40), (64, 64), (200, 700), (769, 77)])
def test_empty_rows_between_others(M, N, empty_rows):
    case = replace(BIG, M=M, N=N, empty_rows=empty_rows)
    for mask in interleaved(M, N):
        call = draw(case)._replace(mask=mask)
        got, exact, eager = (run(call, *way, through_lse=False) for way in BACKENDS)
        assert_within_budget(compare(got, exact, eager), case)
        empty = ~mask.as_dense(1, 1, M, N)[0, 0].any(-1)
        if empty_rows == "zero":
            assert (got["lse"][:, :, empty] == -torch.inf).all() and got["lse"][:, :, ~empty].isfinite().all()
            assert not any(got[n][:, :, empty].any() for n in ("y", "dq"))


def test_lse_of_zero_is_no_empty_row():
    """The flash kernel gives an empty row lse = 0, which is also that of a row that sees one logit of 0."""
    call = draw(replace(BIG, mask="window"))
    call = call._replace(tensors=call.tensors | {"q": torch.zeros_like(call.tensors["q"])})
    mask = Mask(start=torch.arange(BIG.M)[None, None], end=torch.arange(1, BIG.M + 1)[None, None])
    assert (run(call._replace(mask=mask), "torch")["lse"] == 0).all()


@pytest.mark.parametrize("case", FLASH, ids=str)
def test_same_bits(case):
    first, second = (run(draw(case), "torch", through_lse=False) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", [1, 2], ids=["heads", "rows"])
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_rows_that_overlap(name, step, axis, dtype):
    """PyTorch's flash kernel is wrong for strides (.., 1, 1), and raises for rows of 16 bits less than D apart."""
    shape = (2, 4, 24, 64)
    tensors = {n: torch.randn(shape).to(dtype) for n in "qkv"}
    wide = [n for i, n in enumerate(shape[:3]) if i != axis]
    overlapping = torch.randn(*wide, 64 + step * (shape[axis] - 1)).to(dtype).unfold(2, 64, step)  # (.., axis, 64)
    tensors[name] = overlapping if axis == 2 else overlapping.transpose(1, 2)
    assert tensors[name].shape == shape and tensors[name].stride(axis) == step and tensors[name].stride(3) == 1

    def results(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        y = cross_attention(*leaves, backend="torch")
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    copied = {n: t.contiguous() for n, t in tensors.items()}
    for found, expected in zip(results(tensors), results(copied)):
        torch.testing.assert_close(found, expected)
