"""The parts that the torch backend cuts a call into: together all that is seen, nothing twice, worth a call each."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from crossattn_kernels import Mask
from crossattn_kernels.problem import Inputs, Options, canonical
from crossattn_kernels.testing import MASKS, Case, draw
from crossattn_kernels.tiled import flash
from crossattn_kernels.tiled.parts import (
    ROWS,
    TILE,
    Call,
    Part,
    by_keys,
    few_rows,
    filled_rows,
    parts,
    size,
    small,
)

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
    filled = filled_rows(x, options)
    seen = options.mask(x).as_dense(B, Hq, M, N)
    seen = seen if filled is None else seen | filled[..., None]
    times, inside = torch.zeros(B, M), torch.zeros(B, M, N, dtype=torch.bool)
    few = torch.zeros(B, M, dtype=torch.bool)
    for part in parts(Call(x, options, filled), backward):
        times[part.batch, part.rows] += 1
        inside[part.batch, part.rows, part.keys] = True
        view = seen[part.batch, :, part.rows, part.keys]
        _, m, n = size(part)
        for stretch in few_rows(Call(x, options, filled), part, flash.FEW):
            assert stretch.batch == part.batch and stretch.kind == "masked"
            few[stretch.batch, stretch.rows] = True
            outside = seen[stretch.batch, :, stretch.rows].clone()
            outside[..., stretch.keys] = False
            assert not outside.any()
        if part.kind == "whole":
            few[part.batch, part.rows] |= n < flash.FEW
            assert x.bias is None and view.all()
        elif part.kind == "causal":
            assert torch.equal(view, torch.ones(m, n, dtype=torch.bool).tril().expand_as(view))
    assert (times == 1).all()
    assert not (seen & ~inside[:, None]).any()
    shown = seen if x.bias is None else seen & (x.bias > -torch.inf)
    counts = shown.sum(-1)
    if filled is not None:  # a part with such rows is not the flash kernel's
        counts = counts.masked_fill(filled, 0)
    assert few[((counts > 0) & (counts < flash.FEW)).any(1)].all()


def ranged(start: Tensor | None, end: Tensor | None, B: int, H: int, M: int, N: int) -> Inputs:
    q, k = torch.zeros(B, H, M, 8), torch.zeros(B, H, N, 8)
    return canonical(q, k, k, Mask(start, end))[0]


def kinds(x: Inputs, backward: bool = False) -> list[tuple[int, int, int, int, str]]:
    found = parts(Call(x, Options(), None), backward)
    return [(p.rows.start, p.rows.stop, p.keys.start, p.keys.stop, p.kind) for p in found]


def test_parts_worth_a_call():
    """Drawn by hand: what is one call, what is cut, what is joined."""
    M, N = 2 * ROWS, 600
    row = torch.arange(M)[None, None]
    assert kinds(ranged(None, None, 2, 2, M, N)) == [(0, M, 0, N, "whole")]
    stairs = ranged(None, row + 1, 1, 8, M, N)
    assert kinds(stairs) == kinds(stairs, True) == [(0, M, 0, M, "causal")]
    half = stairs._replace(q=stairs.q.half(), k=stairs.k.half(), v=stairs.v.half())
    assert all(kind == "masked" for *_, kind in kinds(half, True))
    media = ranged(None, (row // ROWS + 1) * 100, 1, 8, M, N)
    assert kinds(media) == [(0, ROWS, 0, 100, "whole"), (ROWS, M, 0, 200, "whole")]
    ragged = ranged(None, 300 - 10 * (row % 2), 1, 8, M, N)
    assert kinds(ragged) == [(0, M, 0, 304, "masked")]
    lengths = torch.tensor([500, 3])[:, None, None]
    assert kinds(ranged(None, lengths, 2, 8, M, N)) == [(0, M, 0, 500, "whole"), (0, M, 0, 3, "whole")]
    assert kinds(ranged(None, lengths, 2, 1, 9, N)) == [(0, 9, 0, 512, "masked")]  # too small to be worth two
    assert len(kinds(ranged(None, torch.arange(600)[:, None, None] % 5, 600, 2, 3, 5))) < 5
    row = torch.arange(4096)[None, None]
    wide = kinds(ranged(row * 2, row * 2 + 4096, 1, 1, 4096, 12_000))
    assert all((bottom - top) * (high - low) <= 2 * TILE and kind == "masked" for top, bottom, low, high, kind in wide)


ALONG = {  # (M, N, mask, whether it is cut anew)
    "window": (900, 700, Mask.window(900, 700, 100, 60), True),
    "diagonal": (700, 1500, Mask.window(700, 1500, 0, 0), True),
    "causal": (1500, 1201, Mask.window(1500, 1201, 2000, 0), False),
    "band": (600, 600, Mask.window(600, 600, 9, 9), True),
    "media": (1000, 640, Mask.media(torch.arange(1000)[None] % 100 == 50, 64, latest=False), True),
}


@pytest.mark.parametrize("name", ALONG)
def test_parts_along_the_keys_cover_each_pair_once(name):
    """What a query sees is spread over parts of the backward, which nothing counts twice; some see nothing."""
    M, N, mask, anew = ALONG[name]
    x, options = canonical(*(torch.zeros(2, 8, n, 8) for n in (M, N, N)), mask)
    call = Call(x, options, None)
    before = list(parts(call, backward=True))
    times, seen = torch.zeros(2, M, N), options.mask(x).as_dense(2, 1, M, N)[:, 0]
    found = by_keys(call, before)
    for part in found:
        assert part.kind == "masked" or part in before
        view = times[part.batch, part.rows, part.keys]
        view += 1
    assert len(found) > 1 and (found != before) is anew
    assert (times[seen] == 1).all() and times.max() == 1


def test_pieces_cover_a_part_once():
    part = Part(slice(1, 6), slice(10, 1000), slice(3, 5000), "masked")
    t = torch.empty(8, 4, 5000, 8, dtype=torch.bfloat16)
    for cut in (flash.cached, flash.exact, small):
        keys = torch.zeros(8, 1000, dtype=torch.long)
        for piece in cut(Inputs(t, t, t), part):
            keys[piece.batch, piece.rows] += size(piece)[2]
        assert (keys[1:6, 10:] == 4997).all() and keys.sum() == 5 * 990 * 4997
