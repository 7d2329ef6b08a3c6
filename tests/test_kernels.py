"""What the battery cannot see: hidden NaN, tile sizes, grids, offsets, reproducibility, the kernels' own functions."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from crossattn_kernels import Mask, cross_attention, cross_attention_chunked, kernels, tuning
from crossattn_kernels.kernels import launch
from crossattn_kernels.kernels.views import Logits, MaskView, View
from crossattn_kernels.problem import canonical
from crossattn_kernels.testing import FEATURES, PLAIN, assert_within_budget, check, compare, draw, poisoned, run, worst
from crossattn_kernels.tuning import Config

BACKENDS = ["torch", "triton"]
SMALL = replace(PLAIN, M=19, N=37, D=16, Hq=2, Hk=1)


def named(name):
    return next(c for c in FEATURES if c.name == name)


def tile_size(size):
    """Within it, kernels whose tiles have `size` queries and keys."""
    config = Config(size, size, 4, 1)
    return tuning.force(backward_schedule="two-pass", forward=config, dq=config, dkv=config, bias_grad=config)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["everything", "everything by channel", "bias (0, 0, 1, 1)"])
def test_two_runs_are_bitwise_equal(backend, name):
    call = draw(replace(named(name), M=19, N=37, D=16))
    first, second = run(call, backend), run(call, backend)
    assert all(torch.equal(first[n], second[n]) for n in first)


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
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_hidden_key_does_not_leak(backend, name, bad):
    """NaN in one key: queries that do not see it have the results and gradients they have with 0 in its place."""
    mask, key = HIDING[name](SMALL.M, SMALL.N), 10
    call = draw(SMALL)._replace(mask=mask)
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
def test_a_hidden_value_makes_only_its_programs_start_again(bad, splits):
    """Bits hide it from some queries: to these it is as 0; the others, in the same tile or not, get NaN."""
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


def test_every_switch_of_tf32():
    """PyTorch has two, and the getter of the older one raises once the newer has been used."""
    matmul = torch.backends.cuda.matmul
    q, before = torch.randn(1, 1, 3, 16), matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            assert launch._tf32(torch.float32) == (precision == "tf32") and not launch._tf32(torch.bfloat16)
            assert cross_attention(q, q, q, backend="triton").isfinite().all()
    finally:
        matmul.fp32_precision = before
    torch.set_float32_matmul_precision("high")
    try:
        assert launch._tf32(torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not launch._tf32(torch.float32)


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


def test_the_end_of_the_keys_where_heads_are_large():
    """dq has one loop there, and a tile of keys that is not full."""
    with tile_size(16):
        assert_within_budget(check(replace(SMALL, B=1, D=136), "triton"))


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
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_in_a_bias_is_not_hidden(backend, softcap):
    """What it makes NaN in the reference is NaN, and nothing else."""
    call = draw(replace(SMALL, B=1, bias=(0, 0, 1, 1), softcap=softcap))
    call.tensors["bias"][..., 3, 10] = math.nan
    found, expected = run(call, backend), run(call, "reference")
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


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("name", ["zero", "uniform", "attend_all"])
def test_empty_rows_do_not_depend_on_their_tile(name, size):
    """Rows that see nothing between rows that see something, some tiles empty altogether."""
    for mask in ("every second", "ranges", "packed", "all fields"):
        case = replace(SMALL, name=mask, mask=mask, empty_rows=name, M=40, B=1)
        with tile_size(size):
            assert_within_budget(check(case, "triton"), f"{case} {name} {size}")


@pytest.mark.parametrize("size", [16, 64])
def test_dropout_does_not_depend_on_the_tile(size):
    """v the identity shows p itself: the same entries are 0 as in the reference."""
    call = draw(replace(SMALL, dropout_p=0.4, N=48))
    eye = torch.eye(48).expand(2, 1, 48, 48)
    call = call._replace(tensors=call.tensors | {"v": eye})
    with tile_size(size):
        p = [
            cross_attention(
                *call.tensors.values(), dropout_p=0.4, generator=torch.Generator().manual_seed(5), backend=b
            ) for b in ("triton", "torch", "reference")
        ]  # fmt: skip
    assert torch.equal(p[0] == 0, p[2] == 0) and torch.equal(p[1] == 0, p[2] == 0)
    assert 0.3 < (p[2] == 0).float().mean() < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_and_negative_logits(backend):
    """Peaked rows, rows of equal logits, and logits far below 0 (an lse of -1000)."""
    case = replace(SMALL, scale=3.0)
    assert_within_budget(worst([check(case, backend, seed=seed) for seed in range(4)]), "peaked")
    call = draw(SMALL)
    q, k = torch.ones_like(call.tensors["q"]), -60 * torch.ones_like(call.tensors["k"])
    y, lse = cross_attention(q, k, call.tensors["v"], scale=1.0, return_lse=True, backend=backend)
    torch.testing.assert_close(y, call.tensors["v"].mean(2, keepdim=True).expand_as(y))
    torch.testing.assert_close(lse, torch.full_like(lse, -60 * 16 + math.log(SMALL.N)))


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


@pytest.mark.parametrize("fits", [2, 1, 0])
def test_a_pipeline_that_needs_too_much_shared_memory_is_shortened(monkeypatch, fits):
    tried = []

    class Kernel:
        __name__ = "forward_kernel"

        def __getitem__(self, grid):
            def launched(*args, num_stages, **options):
                tried.append((num_stages, int(args[-1].EDGE_STAGES)))
                if num_stages > fits:
                    raise OutOfResources(300_000, 232_448, "shared memory")

            return launched

    x, options = canonical(
        *(torch.zeros(1, 1, 64, 16) for _ in range(3)), Mask(keys=torch.ones(1, 64, dtype=torch.bool))
    )
    with tuning.force(forward=Config(16, 16, 4, 3)), pytest.raises(OutOfResources) if not fits else nullcontext():
        launch.Launcher.of(x, options)(Kernel(), lambda q: (1, q), x.q)
    assert tried == [(stages, stages) for stages in range(3, max(fits, 1) - 1, -1)]


def test_grids_are_one_dimensional(monkeypatch):
    """Only the first dimension of a grid goes beyond 65,535."""
    seen = {}

    def count(self, kernel, arguments, *tensors, label=""):
        seen[kernel.__name__] = arguments(*tensors)[0]

    monkeypatch.setattr(launch.Launcher, "__call__", count)
    q = torch.zeros(35_000, 2, 17, 16, requires_grad=True)
    bias = torch.zeros(35_000, 2, 1, 3, requires_grad=True)
    with tuning.force(backward_schedule="two-pass"):
        cross_attention(q, q[:, :, :3], q[:, :, :3], bias=bias, backend="triton").sum().backward()
    assert {"forward_kernel", "dq_kernel", "dkv_kernel", "bias_grad_kernel"} <= seen.keys()
    assert all(type(n) is int and n >= 70_000 for n in seen.values())


@pytest.mark.parametrize("which", ["q", "k", "bias"])
def test_offsets_beyond_int32(which):
    """Views whose strides reach past 2^31 elements; the pages between are never touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        huge = torch.empty(2**31 + 2**20, dtype=torch.float16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True

    def far(*shape):
        """(B, H, S, D) whose rows lie 2^31 / (S - 1) elements apart."""
        step = 2**31 // (shape[2] - 1)
        return huge.as_strided(shape, (shape[1] * shape[3], shape[3], step, 1)).copy_(torch.randn(shape))

    q, k, v = (torch.randn(1, 2, s, 16).half() for s in (5, 9, 9))
    bias = None
    if which == "bias":
        bias = far(1, 2, 5, 9)
    elif which == "q":
        q = far(*q.shape)
    else:
        k = far(*k.shape)
    near = [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in (q, k, v, bias)]
    got = cross_attention(q, k, v, bias=bias, backend="triton")
    assert torch.equal(got, cross_attention(*near[:3], bias=near[3], backend="triton"))


def test_a_batch_of_one_is_not_copied():
    """Whisper's beams: one k and v for all, and their gradients are theirs, not a copy for each."""
    q = torch.randn(3, 2, 4, 16, requires_grad=True)
    k = torch.randn(1, 2, 9, 16, requires_grad=True)
    for backend in BACKENDS:
        y = cross_attention(q, k, k, backend=backend)
        dk = torch.autograd.grad(y.sum(), k)[0]
        want = torch.autograd.grad(cross_attention(q, k.repeat(3, 1, 1, 1), k.repeat(3, 1, 1, 1)).sum(), k)[0]
        torch.testing.assert_close(dk, want)


def test_reasons_are_all_given():
    q = torch.zeros(1, 1, 2, 300, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"float64.*300"):
        cross_attention(q, q, q, backend="triton")


def test_none_fields_are_the_default():
    """A view of nothing is None, so that the code behind it is gone."""
    assert MaskView() == (None,) * 6 + (1, 1, 0)
    assert Logits(1.0, None, None, None, MaskView()).mask.start is None and View(None, ()).strides == ()
    assert kernels.unsupported.__doc__


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_lie_together_are_copied_once(backend, monkeypatch):
    """Engines see unit last strides only, and the backward the very copy that the forward made."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name.startswith("crossattn::"):
                seen.append(args[0 if func._schema.name.endswith("forward") else 7])  # q
            return func(*args, **(kwargs or {}))

    call = draw(replace(SMALL, layout="last strided"))
    assert call.tensors["q"].stride(3) != 1
    with Watch():
        y = cross_attention(*(t.requires_grad_() for t in call.tensors.values()), backend=backend)
        y.sum().backward()
    forward, backward = seen
    assert forward.stride(3) == 1 and forward.data_ptr() == backward.data_ptr()
