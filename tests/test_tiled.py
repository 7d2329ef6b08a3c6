"""The torch backend beyond the battery: the flash kernel's share of the work, parts, memory."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from crossattn_kernels import Mask, cross_attention, tiled
from crossattn_kernels.parts import Call, free_rows, parts, size
from crossattn_kernels.problem import canonical
from crossattn_kernels.testing import MASKS, PLAIN, Case, assert_within_budget, check, draw, run, with_dtypes

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
]  # fmt: skip


@pytest.mark.parametrize("case", with_dtypes(FLASH, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_gradients_without_lse(case):
    assert_within_budget(check(case, "torch", through_lse=False), case)


def test_flash_does_the_work(monkeypatch):
    """Plain, ranged and padded calls never reach the tile loop, forward or backward."""

    def refuse(*args):
        raise AssertionError("the tile loop was asked")

    monkeypatch.setattr(tiled, "_tiles", refuse)
    for mask in (None, "padding", "dense"):
        run(draw(replace(BIG, mask=mask)), "torch", through_lse=False)


def test_ranges_save_products(monkeypatch):
    """Of two documents of 512 queries and keys each sees its own: half of the products are done."""
    done = []
    flash = tiled.flash

    def count(q, k, *args, **kwargs):
        done.append(q.shape[0] * q.shape[2] * k.shape[2])
        return flash(q, k, *args, **kwargs)

    monkeypatch.setattr(tiled, "flash", count)
    q = torch.randn(1, 2, 1024, 16)
    ends = torch.tensor([0, 512, 1024])
    cross_attention(q, q, q, Mask.packed(ends, ends))
    assert sum(done) == 2 * 512 * 512


cases = st.builds(
    Case,
    name=st.just("drawn"),
    B=st.integers(1, 3),
    Hq=st.just(2),
    Hk=st.just(1),
    M=st.integers(1, 500),
    N=st.integers(0, 500),
    D=st.just(4),
    mask=st.none() | st.sampled_from(sorted(MASKS)),
    bias=st.none() | st.tuples(*[st.integers(0, 1)] * 4),
    empty_rows=st.sampled_from(["zero", "uniform"]),
    share=st.sampled_from([None, "q", "kv"]),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases, backward=st.booleans())
def test_parts_cover_what_is_seen(case, backward):
    """Every query is in exactly one part, with all keys that it sees; what a part claims to be seen, is."""
    call = draw(case)
    bias = call.tensors.get("bias")
    x, options = canonical(*(call.tensors[n] for n in "qkv"), call.mask, bias=bias, empty_rows=case.empty_rows)
    B, Hq, M, N = x.sizes
    free = free_rows(x, options)
    seen = options.mask(x).as_dense(B, Hq, M, N)
    seen = seen if free is None else seen | free[..., None]
    times, inside = torch.zeros(B, M), torch.zeros(B, M, N, dtype=torch.bool)
    for part in parts(Call(x, options, free), backward):
        times[part.batch, part.rows] += 1
        inside[part.batch, part.rows, part.keys] = True
        view = seen[part.batch, :, part.rows, part.keys]
        _, m, n = size(part)
        if part.kind == "whole":
            assert x.bias is None and view.all()
        elif part.kind == "causal":
            assert torch.equal(view, torch.ones(m, n, dtype=torch.bool).tril().expand_as(view))
    assert (times == 1).all()
    assert not (seen & ~inside[:, None]).any()


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
    "Dv": dict(Dv=32),
    "one head of many": dict(Hq=1, Hk=1, M=12_000, N=12_000),
}


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("through_lse", [False, True])
def test_nothing_of_m_by_n(name, through_lse):
    """At 4096 x 4096 and 8 heads no tensor is larger than a 25th of the logits."""
    case = replace(PLAIN, **(dict(M=4096, N=4096, D=16, B=1, Hq=8, Hk=4) | MEMORY[name]))
    call = draw(case)
    with Largest() as largest:
        run(call, "torch", through_lse=through_lse)
    assert largest.bytes <= 4 * case.Hq * case.M * case.N / 25


def test_many_entries():
    """Thousands of entries and heads, through the flash kernel and through the tile loop."""
    q, k = torch.randn(3000, 4, 2, 8), torch.randn(3000, 4, 5, 8)
    for options in ({}, dict(softcap=3.0)):
        want = cross_attention(q, k, k, backend="reference", **options)
        torch.testing.assert_close(cross_attention(q, k, k, **options), want)
