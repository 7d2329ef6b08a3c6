"""Dropout: Philox against known answers and against Triton's, the share dropped, and that no tile changes it."""

import pytest
import torch
from torch import Tensor

from crossattn_kernels import cross_attention, dropout
from crossattn_kernels.functional import BACKENDS, attend
from crossattn_kernels.problem import Options, canonical


def whole(*values: int) -> list[Tensor]:
    """int64 tensors; a 64-bit pattern above 2^63 is a negative number there."""
    return [torch.tensor(x - 2**64 if x >= 2**63 else x) for x in values]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_known_answers(counter, key, words):
    """philox4x32-10 of Random123's kat_vectors."""
    assert tuple(word.item() for word in dropout._philox(*whole(*counter), *whole(key))) == words


SEEDS = [0, 1, 0xFFFFFFFF, 2**32, 2**32 + 1, 0x123456789ABCDEF, 2**62 - 1, 2**63 - 1]


@pytest.mark.parametrize("seed", SEEDS, ids=hex)
def test_philox_is_tritons(seed):
    pytest.importorskip("triton")
    import triton
    import triton.language as tl

    @triton.jit
    def draw(out, seed, counters, n: tl.constexpr):
        at = tl.arange(0, n)
        c0, c1 = tl.load(counters + at), tl.load(counters + n + at)
        c2, c3 = tl.load(counters + 2 * n + at), tl.load(counters + 3 * n + at)
        w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, c3)
        tl.store(out + at, w0.to(tl.int64))
        tl.store(out + n + at, w1.to(tl.int64))
        tl.store(out + 2 * n + at, w2.to(tl.int64))
        tl.store(out + 3 * n + at, w3.to(tl.int64))

    n = 512
    counters = torch.randint(2**31, (4, n), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    counters[:, :4] = torch.tensor([0, 1, 2**31 - 2, 2**31 - 1])
    out, seed_tensor = torch.empty(4, n, dtype=torch.int64), torch.tensor(seed)
    draw[(1,)](out, seed_tensor, counters, n=n)
    assert torch.equal(out & dropout.LOW, torch.stack(dropout._philox(*counters, seed_tensor)))


def keep(seed: int, p: float, B: int = 1, H: int = 1, M: int = 1, N: int = 1, first_key: int = 0) -> Tensor:
    return dropout.keep(torch.tensor(seed), p, slice(0, B), H, slice(0, M), slice(first_key, first_key + N))


@pytest.mark.parametrize("p", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_share_dropped(p):
    sizes = dict(B=4, H=8, M=64, N=256)
    kept = keep(2**40 + 7, p, **sizes)
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(1 - kept.double().mean() - p) <= 5 * sigma
    for axis in range(4):  # no entry, head, query or key is treated differently
        shares = 1 - kept.double().mean([i for i in range(4) if i != axis])
        assert (shares - p).abs().max() <= 5 * sigma * kept.shape[axis] ** 0.5 + 1e-12


@pytest.mark.parametrize("axis", range(4), ids=["batch", "head", "query", "key"])
def test_neighbours_are_independent(axis):
    kept = keep(5, 0.5, B=8, H=8, M=32, N=64).double().movedim(axis, 0)
    agree = (kept[1:] == kept[:-1]).double().mean()
    assert abs(agree - 0.5) <= 5 * 0.5 / kept[1:].numel() ** 0.5


def test_seeds_are_independent():
    a, b, c = (keep(seed, 0.5, M=256, N=256) for seed in (5, 6, 5 + 2**32))
    for other in (b, c):
        assert abs((a == other).double().mean() - 0.5) <= 5 * 0.5 / 256


def test_draw_depends_on_the_index_only():
    kept = keep(9, 0.3, B=2, H=3, M=5, N=20)
    assert torch.equal(keep(9, 0.3, B=2, H=3, M=5, N=7, first_key=13), kept[..., 13:])
    far = 2**31 - 4
    assert torch.equal(keep(9, 0.3, N=2, first_key=far + 2), keep(9, 0.3, N=4, first_key=far)[..., 2:])


# ---- which probabilities a call drops: with v = 1 the output is the probabilities as they multiplied v ----

B, HQ, HK, M, N, P = 2, 2, 1, 40, 150, 0.3


def call(N: int = N, first: int = 0, **options):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(B, HQ, M, 16, generator=g), torch.randn(B, HK, first + N, 16, generator=g)[:, :, first:]
    return canonical(q, k, torch.eye(N).expand(B, HK, N, N), dropout_p=P, **options)


def probabilities(backend: str, x, options: Options, seed: int = 77) -> Tensor:
    return attend(x._replace(seed=torch.tensor(seed)), options, backend)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_are_dropped_by_every_backend(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    x, options = call()
    got = probabilities(backend, x, options)
    kept = keep(77, P, B, HQ, M, N)
    assert torch.equal(got > 0, kept)
    whole = probabilities("reference", x, options._replace(dropout_p=0.0))
    torch.testing.assert_close(got, torch.where(kept, whole / (1 - P), 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_drops_what_the_whole_drops(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    first = 70
    x, options = call(N - first, first)
    got = probabilities(backend, x, options._replace(first_key=first))
    assert torch.equal(got > 0, keep(77, P, B, HQ, M, N)[..., first:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropping_leaves_lse_alone(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    q, k, v = (torch.randn(1, 1, n, 16, generator=torch.Generator().manual_seed(n)) for n in (8, 9, 9))
    _, plain = cross_attention(q, k, v, return_lse=True, backend=backend)
    _, dropped = cross_attention(q, k, v, dropout_p=P, return_lse=True, backend=backend)
    torch.testing.assert_close(plain, dropped)
