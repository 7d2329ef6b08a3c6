"""What the battery cannot see: tile sizes, grids, offsets, reproducibility, launches."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from crossattn_kernels import Mask, cross_attention, kernels, tuning
from crossattn_kernels.kernels import launch
from crossattn_kernels.kernels.views import Logits, MaskView, View
from crossattn_kernels.problem import canonical
from crossattn_kernels.testing import FEATURES, PLAIN, assert_within_budget, check, compare, draw, run, worst
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


def test_the_end_of_the_keys_where_heads_are_large():
    """dq has one loop there, and a tile of keys that is not full."""
    with tile_size(16):
        assert_within_budget(check(replace(SMALL, B=1, D=136), "triton"))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.5, 50.0, 1e4])
def test_softcaps_of_any_size(softcap, dtype):
    """From one that caps all logits to one that should change none."""
    assert_within_budget(check(replace(SMALL, softcap=softcap, dtype=dtype, scale=1.0), "triton"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_may_be_large(backend, dtype):
    """Rows of a thousand and more, which cancel in the softmax, and lose digits of the logits."""
    call = draw(replace(SMALL, dtype=dtype, bias=(0, 0, 1, 1)))
    call.tensors["bias"] += 1000 * torch.randn(SMALL.M, 1, generator=torch.Generator().manual_seed(3)).to(dtype)
    found, *expected = (run(call, *how) for how in ((backend,), ("reference", torch.float64), ("reference",)))
    assert_within_budget(compare(found, *expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 5], ids=["packed heads", "one head"])
@pytest.mark.parametrize("mask", [None, "all fields"])
@pytest.mark.parametrize("scale", ["signs", 0.0])
def test_scales_of_either_sign(backend, size, mask, scale):
    """The largest product is not the largest logit there."""
    case = replace(SMALL, B=8, Hq=8, Hk=2, M=size, N=120, scale=scale, mask=mask)
    assert_within_budget(check(case, backend))


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
