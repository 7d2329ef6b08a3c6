"""What a query may not see: NaN in hidden keys, padding, tiles that are left out or seen whole, biases that hide."""

import math
from dataclasses import replace

import pytest
import torch

from crossattn_kernels import Mask, cross_attention, cross_attention_chunked, kernels, tuning
from crossattn_kernels.problem import canonical
from crossattn_kernels.testing import assert_within_budget, check, compare, draw, poisoned, run
from crossattn_kernels.tuning import Config
from tests.test_kernels import BACKENDS, SMALL, tile_size

HIDING = {
    "padding": lambda M, N: Mask(keys=torch.arange(N)[None] % 3 != 1),
    "ranges": lambda M, N: Mask(torch.arange(M)[None, None] % 13, 20 + torch.arange(M)[None, None] % 9),
    "starts": lambda M, N: Mask(start=11 + torch.arange(M)[None, None] % 5),
    "packed": lambda M, N: Mask.packed(torch.tensor([0, 7, 19]), torch.tensor([0, 5, 37])),
    "dense": lambda M, N: Mask.groups(torch.rand(M, N, generator=torch.Generator().manual_seed(0)) > 0.3),
    "tiles": lambda M, N: Mask.groups((torch.arange(M)[:, None] + torch.arange(-(-N // 5))) % 2 == 0, 1, 5),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize(("bad", "softcap"), [(math.nan, None), (math.inf, None), (math.nan, 2.0)])
def test_a_hidden_key_does_not_leak(backend, name, bad, softcap):
    """NaN in one key: queries that do not see it have the results and gradients they have with 0 in its place."""
    mask, key = HIDING[name](SMALL.M, SMALL.N), 10
    call = draw(replace(SMALL, softcap=softcap))._replace(mask=mask)
    sees = mask.as_dense(SMALL.B, SMALL.Hq, SMALL.M, SMALL.N)[..., key]  # (B, Hq, M)
    # a loss that leaves out the queries that see the key
    call = call._replace(dy=call.dy.masked_fill(sees[..., None], 0), dlse=call.dlse.masked_fill(sees, 0))

    def with_key(value):
        k, v = (call.tensors[n].clone() for n in "kv")
        k[:, :, key], v[:, :, key] = value, value
        return call._replace(tensors=call.tensors | {"k": k, "v": v})

    def blind(results):
        hidden = {n: sees if n == "lse" else sees[..., None] for n in ("y", "lse", "dq")}
        return {n: results[n].masked_fill(h, 0) for n, h in hidden.items()}

    dirty = run(with_key(bad), backend)
    clean = [blind(run(with_key(0.0), "reference", dtype)) for dtype in (torch.float64, None)]
    assert not sees.all()
    assert_within_budget(compare(blind(dirty), *clean), name)
    assert dirty["y"][sees].isnan().all() and dirty["lse"][sees].isnan().all()
    # what shares no query with the key keeps its gradients
    dense = mask.as_dense(SMALL.B, SMALL.Hq, SMALL.M, SMALL.N)
    apart = ~(dense & sees[..., None]).any(1).any(1)  # (B, N), one key head
    assert all(dirty[n][:, 0][apart].isfinite().all() for n in ("dk", "dv"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_value_that_bits_hide_from_some_queries(bad, splits):
    """To these it is as 0, in whatever split of the keys; the others, in the same tile or not, get NaN."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (40, 90, 90))
    mask = Mask.groups(torch.rand(40, 90, generator=torch.Generator().manual_seed(0)) > 0.3)
    sees = mask.as_dense(1, 2, 40, 90)[0, 0, :, 50]
    results = []
    for value in (0.0, bad):
        v[:, :, 50] = value
        with tuning.force(forward=Config(16, 16, 4, 1, splits=splits)):
            results.append(kernels.forward(*canonical(q, k, v, mask))[0])
    clean, dirty = results
    assert torch.equal(dirty[:, :, ~sees], clean[:, :, ~sees]) and dirty[:, :, sees].isnan().all()


@pytest.mark.parametrize(
    "way", ["two-pass", "split", "short queries", "gate, window", "dropout, uniform", "attend all"]
)
def test_long_key_padding(way):
    """Whose ends are looked for first, so that tiles are left out and others are seen whole; a hidden NaN stays so."""
    key = torch.arange(300)
    keep = torch.stack([(key >= 70) & (key < 258), key % 50 > 3, key < 0, (key < 90) ^ (key >= 201)])
    mask, tile, more = Mask.key_padding(keep), Config(16, 64, 4, 1), {}
    if way == "gate, window":
        mask, more = mask & Mask.window(16, 300, -60, 200), dict(gate="head")
    elif way == "dropout, uniform":
        more = dict(dropout_p=0.2, empty_rows="uniform")
    elif way == "attend all":
        more = dict(empty_rows="attend_all")
    call = draw(replace(SMALL, B=4, Hq=1, M=16, N=300, **more))._replace(mask=mask)
    forced = dict(forward=tile._replace(splits=3 if way == "split" else 1), dq=tile, dkv=tile)
    with tuning.force(**forced, backward_schedule="short queries" if way == "short queries" else "two-pass"):
        got = run(call, "triton")
    assert_within_budget(compare(got, run(call, "reference", torch.float64), run(call, "reference")), way)
    if "empty_rows" not in more:
        x, options = canonical(*(call.tensors[n].masked_fill(~keep[:, None, :, None], math.nan)
                                 if n in "kv" else call.tensors[n] for n in "qkv"), mask)  # fmt: skip
        with tuning.force(**forced):
            dirty = kernels.forward(x, options)[0]
        assert dirty.isfinite().all()


CROSSED = {
    "nothing": Mask(),
    "causal": Mask.causal(70, 90, "bottom-right"),
    "window": Mask.window(70, 90, 30, 25),
    "packed": Mask.packed(torch.tensor([0, 20, 70]), torch.tensor([0, 50, 90])),
    # tiles that are seen whole do not lie together, and the last ends with the keys
    "here and there": Mask(end=torch.tensor([90, 20, 90, 33, 90]).repeat_interleave(14)[None, None]),
    "some see all after all": Mask(torch.tensor([0, 80]).repeat_interleave(35)[None, None], torch.full((1, 1, 70), 64)),
}


@pytest.mark.parametrize("name", CROSSED)
def test_tiles_that_are_seen_whole_between_others(name):
    """Both in one loop's range; a key that is NaN changes nothing for queries that do not see it."""
    mask, key, tile = CROSSED[name], 60, Config(16, 16, 4, 1)
    call = draw(replace(SMALL, B=1, M=70, N=90, empty_rows="attend_all"))._replace(mask=mask)

    def ours(call):
        forced = dict(forward=tile, dq=tile, dkv=tile._replace(splits=2), backward_schedule="two-pass")
        with tuning.force(**forced):
            return run(call, "triton")

    assert_within_budget(compare(ours(call), run(call, "reference", torch.float64), run(call, "reference")), name)
    dense = mask.as_dense(1, 2, 70, 90)
    sees = dense[..., key] | ~dense.any(-1)
    call = call._replace(dy=call.dy.masked_fill(sees[..., None], 0), dlse=call.dlse.masked_fill(sees, 0))
    clean, k = ours(call), call.tensors["k"].clone()
    k[:, :, key] = math.nan
    dirty = ours(call._replace(tensors=call.tensors | {"k": k}))
    assert torch.equal(dirty["dq"][~sees], clean["dq"][~sees]) and dirty["y"][sees].isnan().all()


@pytest.mark.parametrize("N", [40, 90], ids=["few tiles", "tiles that are asked for"])
def test_tiles_of_which_no_query_sees_a_key(N):
    """Left out where they are many; where they are few it is not asked, and all in them is hidden."""
    case = replace(SMALL, B=1, M=50, N=N, mask="blocks", bias=(0, 1, 1, 1), empty_rows="attend_all")
    with tile_size(16):
        assert_within_budget(check(case, "triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_hides_too(backend):
    call = draw(SMALL)
    bias = torch.zeros(SMALL.M, SMALL.N)
    bias[:, 10], bias[3] = -math.inf, -math.inf
    v = call.tensors["v"].clone()
    v[:, :, 10] = math.nan
    y, lse = cross_attention(*(call.tensors[n] for n in "qk"), v, bias=bias, return_lse=True, backend=backend)
    assert y.isfinite().all() and not y[:, :, 3].any() and (lse[:, :, 3] == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [13, 37], ids=["one tile", "three tiles"])
def test_a_key_that_a_bias_hides_from_all_has_no_gradient(backend, N):
    """Also from queries past the end, which a tile has though nobody asked."""
    call = draw(replace(SMALL, N=N, M=17))
    k, v, bias = call.tensors["k"].clone(), call.tensors["v"].clone(), torch.zeros(17, N)
    bias[:, 10], k[:, :, 10], v[:, :, 10] = -math.inf, math.nan, math.nan
    with tile_size(16):
        found = run(call._replace(tensors=call.tensors | {"k": k, "v": v}, options={"bias": bias}), backend)
    assert all(t.isfinite().all() for t in found.values())
    assert not found["dk"][:, :, 10].any() and not found["dv"][:, :, 10].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("softcap", "value"), [(None, math.nan), (5.0, math.nan), (None, math.inf)])
def test_nan_in_a_bias_is_not_hidden(backend, softcap, value):
    """What it makes NaN in the reference is NaN, and nothing else; but of an infinity the kernels' lse is NaN, too."""
    call = draw(replace(SMALL, B=1, bias=(0, 0, 1, 1), softcap=softcap))
    call.tensors["bias"][..., 3, 10] = value
    found, expected = run(call, backend), run(call, "reference")
    expected["lse"] = torch.where(expected["lse"] == math.inf, found["lse"], expected["lse"])
    assert all(torch.equal(found[n].isnan(), expected[n].isnan()) for n in expected)
    assert expected["y"][:, :, 3].isnan().all() and not expected["y"][:, :, 4].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_bias_a_query_where_ranges_start_late(backend):
    """The first tile of keys that a query sees is not the first of all."""
    ranges = Mask(torch.full((1, 1, 20), 150), torch.full((1, 1, 20), 190))
    call = draw(replace(SMALL, M=20, N=200, bias=(0, 0, 1, 0)))._replace(mask=ranges)
    expected = (run(call, "reference", dtype) for dtype in (torch.float64, None))
    with poisoned():
        found = run(call, backend)
    assert_within_budget(compare(found, *expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_scale_leaves_out_rows_that_see_nothing(backend):
    """Whatever the gradient of their lse, which a loss may make infinite."""
    tensors = {n: t.requires_grad_() for n, t in draw(replace(SMALL, scale="head")).tensors.items()}
    mask = Mask(end=(torch.arange(SMALL.M) % 3 * 10)[None, None])
    _, lse = cross_attention(**tensors, mask=mask, return_lse=True, backend=backend)
    dlse = torch.where(lse == -math.inf, lse, 1)
    assert all(
        grad.isfinite().all() for grad in torch.autograd.grad(lse, [tensors[n] for n in ("q", "k", "scale")], dlse)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [37, 1100], ids=["one tile", "many tiles"])
def test_a_finite_bias_is_no_mask(backend, N):
    """finfo.min on a whole row, which many models mean by hidden, leaves the mean of v; on some keys it hides them."""
    call = draw(replace(SMALL, B=1, Hq=1, Hk=1, M=3, N=N))
    bias = torch.zeros(3, N)
    bias[1], bias[2, 5:] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min

    def results(backend, dtype=None):
        y = run(call._replace(options={"bias": bias}, dlse=torch.zeros_like(call.dlse)), backend, dtype)
        return {n: t for n, t in y.items() if n != "lse"}

    assert_within_budget(compare(results(backend), results("reference", torch.float64), results("reference")))


@pytest.mark.parametrize("backend", ["torch", "two-pass", "short keys", "short queries"])
def test_a_bias_that_hides_beside_one_that_as_good_as_hides(backend):
    """Rows of -inf, of finfo.min, of both, and of both beside what is seen: only -inf leaves no probability."""
    M = 15 if backend == "short queries" else 31
    call = draw(replace(SMALL, M=M, N=30))
    bias = torch.where(torch.arange(30) % 3 == 0, -math.inf, torch.finfo(torch.float32).min).repeat(M, 1)
    bias[0:4], bias[4:8], bias[12:, 7:] = -math.inf, torch.finfo(torch.float32).min, 0.0
    call = call._replace(options={"bias": bias}, dlse=torch.zeros_like(call.dlse))
    oracle, yardstick = (run(call, "reference", dtype) for dtype in (torch.float64, None))
    with tuning.force(backward_schedule="two-pass" if backend == "torch" else backend):
        found = run(call, "torch" if backend == "torch" else "triton")
    assert_within_budget(compare(found, oracle, yardstick))


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("name", ["zero", "uniform", "attend_all"])
def test_empty_rows_do_not_depend_on_their_tile(name, size):
    """Rows that see nothing between rows that see something, some tiles empty altogether."""
    for mask in ("every second", "ranges", "packed", "all fields"):
        case = replace(SMALL, name=mask, mask=mask, empty_rows=name, M=40, B=1)
        with tile_size(size):
            assert_within_budget(check(case, "triton"), f"{case} {name} {size}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ranges_may_reach_beyond_the_keys(backend, dtype):
    """Any integer is a bound: below 0 is the first key, beyond N the last."""
    call, (low, high) = draw(SMALL), (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    rows = torch.arange(SMALL.M)
    start, end = (rows % 7 * 3).to(dtype), SMALL.N - (rows % 5 * 4).to(dtype)
    far = Mask(torch.where(start == 0, low, start)[None, None], torch.where(end == SMALL.N, high, end)[None, None])
    backwards = Mask(torch.where(rows == 1, high, far.start), torch.where(rows == 1, low, far.end))
    near = Mask(torch.where(rows == 1, 1, start[None, None]), torch.where(rows == 1, 0, end[None, None]))
    wanted = run(call._replace(mask=near), backend)
    for name, result in run(call._replace(mask=backwards), backend).items():
        assert torch.equal(result, wanted[name]), name
    k, v = (call.tensors[n] for n in "kv")
    y = cross_attention(call.tensors["q"], k, v, near, backend=backend)
    if backend != "reference":
        chunks = [(k[:, :, :20], v[:, :, :20]), (k[:, :, 20:], v[:, :, 20:])]
        chunked = cross_attention_chunked(call.tensors["q"], chunks, mask=backwards, backend=backend)
        torch.testing.assert_close(chunked, y)


@pytest.mark.parametrize("wanted", ["qkv", "k", "v", "qkv: short keys", "qv: short keys", "qkv: short queries"])
@pytest.mark.parametrize("bad", ["k", "v", "dlse", "q", "dy"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_nobody_sees_reaches_no_gradient(wanted, bad, value):
    """A key hidden from all, a query that sees nothing, which may reach dk and dv, but not its dq.

    An infinity does not show in every sum: q and k are positive, so that products are -inf where k is.
    """
    wanted, _, schedule = wanted.partition(": ")
    # as many as a tile holds: a query past the end, of zeros, would show any infinity
    M, N, key = 16 if schedule == "short queries" else 32, 30, 10
    row = torch.arange(M) == 4
    seen = torch.rand(M, N, generator=torch.Generator().manual_seed(0)) > 0.3
    seen[row], seen[:, key] = False, False
    call = draw(replace(SMALL, M=M, N=N))._replace(mask=Mask.groups(seen))
    clean = {n: call.tensors[n].abs() if n in "qk" else call.tensors[n] for n in "qkv"}
    clean |= dict(dy=call.dy.masked_fill(row[:, None], 0), dlse=call.dlse.masked_fill(row, 0))
    dirty = {n: t.clone() for n, t in clean.items()}
    dirty[bad][:, :, key if bad in "kv" else row] = value
    compared = set(wanted) - set("kv" if bad in ("q", "dy") else "")

    def gradients(given, backend, dtype=torch.float32):
        inputs = {n: given[n].to(dtype).requires_grad_(n in wanted) for n in "qkv"}
        outputs = cross_attention(*inputs.values(), call.mask, return_lse=True, backend=backend)
        # that of the reference has no gradient in a row that sees nothing
        outputs = [t.masked_fill(row, 0) if t.ndim == 3 and backend == "reference" else t for t in outputs]
        pairs = [(t, given[n].to(t.dtype)) for t, n in zip(outputs, ("dy", "dlse")) if t.requires_grad]
        outputs, into = zip(*pairs)
        found = torch.autograd.grad(outputs, [inputs[n] for n in wanted], into)
        return {f"d{n}": g for n, g in zip(wanted, found) if n in compared}

    with tuning.force(backward_schedule=schedule or "two-pass"):
        found = gradients(dirty, "triton")
    assert_within_budget(compare(found, gradients(clean, "reference", torch.float64), gradients(clean, "reference")))


@pytest.mark.parametrize("schedule", ["two-pass", "short keys", "short queries"])
def test_a_nan_that_is_seen_reaches_no_key_of_others(schedule):
    """One tile holds all keys: those of another segment, in the rows of which all p are NaN, have gradients."""
    M = 15 if schedule == "short queries" else 31
    call = draw(replace(SMALL, M=M, N=30))._replace(
        mask=Mask.packed(torch.tensor([0, 6, M]), torch.tensor([0, 14, 30]))
    )
    k = call.tensors["k"].clone()
    k[:, :, 3] = math.nan
    with tuning.force(backward_schedule=schedule):
        dirty = run(call._replace(tensors=call.tensors | {"k": k}), "triton")
    assert all(dirty[name].isnan().any() for name in ("dq", "dk", "dv"))

    def others(results):
        return dict(dq=results["dq"][:, :, 6:], dk=results["dk"][:, :, 14:], dv=results["dv"][:, :, 14:])

    clean = (others(run(call, "reference", dtype)) for dtype in (torch.float64, None))
    assert_within_budget(compare(others(dirty), *clean))
