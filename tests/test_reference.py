"""The definition: against examples worked by hand, against finite differences, and against PyTorch's SDPA."""

import math
from fractions import Fraction as F

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from crossattn_kernels import Mask, cross_attention

INF = math.inf

# ---- two queries, three keys, worked by hand ----
#
# q is 1 and 2, k is log 1, log 2, log 3, so with scale 1 the weights before normalisation are 1, 2, 3 and 1, 4, 9.
# v has the columns (1, 2, 3) and (0, 1, 0), so y is (mean key number, probability of the second key).

PLAIN = [(F(14, 6), F(2, 6)), (F(36, 14), F(4, 14))], [6, 14]
HALF = math.log(3) / 2  # tanh of it is 1/2
CAP = 2 * math.log(2)  # caps a logit of +-CAP * HALF at +-log 2
CAPPED = dict(q=[1, 0], k=[0, CAP * HALF, -CAP * HALF], softcap=CAP)  # weights 1, 2, 1/2 and 1, 1, 1


def logs(*rows: list) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def gate(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rows(*ends: int) -> Mask:
    return Mask(end=torch.tensor(ends)[None, None])


# name: (what is asked, y, exp(lse)), a row for each query
BY_HAND = {
    "plain": (dict(), *PLAIN),
    "scale 2": (  # 1 4 9, 1 16 81
        dict(scale=2.0),
        [(F(36, 14), F(4, 14)), (F(1 + 32 + 243, 98), F(16, 98))],
        [14, 98],
    ),
    "scale 0": (dict(scale=0.0), [(2, F(1, 3)), (2, F(1, 3))], [3, 3]),
    "range": (  # 1 2 ., . 4 9
        dict(mask=Mask(start=torch.tensor([[[0, 1]]]), end=torch.tensor([[[2, 3]]]))),
        [(F(1 + 4, 3), F(2, 3)), (F(8 + 27, 13), F(4, 13))],
        [3, 13],
    ),
    "keys": (  # 1 . 3, 1 . 9
        dict(mask=Mask.key_padding(torch.tensor([[True, False, True]]))),
        [(F(1 + 9, 4), 0), (F(1 + 27, 10), 0)],
        [4, 10],
    ),
    "groups of two keys": (  # 1 2 ., . . 9
        dict(mask=Mask.groups(torch.tensor([[True, False], [False, True]]), 1, 2)),
        [(F(5, 3), F(2, 3)), (3, 0)],
        [3, 9],
    ),
    "bias": (  # 1 2 6, 0 2 9
        dict(bias=logs([1, 1, 2], [0, F(1, 2), 1])),
        [(F(1 + 4 + 18, 9), F(2, 9)), (F(4 + 27, 11), F(2, 11))],
        [9, 11],
    ),
    "bias that hides a row": (dict(bias=logs([1], [0])), [PLAIN[0][0], (0, 0)], [6, 0]),
    "softcap": (CAPPED, [(F(13, 7), F(4, 7)), (2, F(1, 3))], [3.5, 3]),
    "softcap before bias": (  # 1 2 1, 1 1 2
        CAPPED | dict(bias=logs([1, 1, 2])),
        [(2, F(1, 2)), (F(9, 4), F(1, 4))],
        [4, 4],
    ),
    "gate": (dict(gate=gate(HALF)), [(F(14, 12), F(2, 12)), (F(36, 28), F(4, 28))], [6, 14]),
    "gate 0": (dict(gate=gate(0.0)), [(0, 0), (0, 0)], [6, 14]),
    "gate by channel": (
        dict(gate=gate(HALF, -HALF)[None]),
        [(F(14, 12), -F(2, 12)), (F(36, 28), -F(4, 28))],
        [6, 14],
    ),
    "gate by query": (dict(gate=gate(HALF, 0.0)[:, None]), [(F(14, 12), F(2, 12)), (0, 0)], [6, 14]),
    "empty row zero": (dict(mask=rows(0, 3)), [(0, 0), PLAIN[0][1]], [0, 14]),
    "empty row uniform": (dict(mask=rows(0, 3), empty_rows="uniform"), [(2, F(1, 3)), PLAIN[0][1]], [3, 14]),
    "empty row attend_all": (dict(mask=rows(0, 3), empty_rows="attend_all"), *PLAIN),
    "empty row uniform, bias": (  # the bias counts for the second row only: 1 4 18
        dict(mask=rows(0, 3), empty_rows="uniform", bias=logs([1, 1, 2])),
        [(2, F(1, 3)), (F(1 + 8 + 54, 23), F(4, 23))],
        [3, 23],
    ),
    "empty row attend_all, bias": (
        dict(mask=rows(0, 3), empty_rows="attend_all", bias=logs([1, 1, 2])),
        [(F(1 + 4 + 18, 9), F(2, 9)), (F(1 + 8 + 54, 23), F(4, 23))],
        [9, 23],
    ),
    "empty row uniform, gate": (
        dict(mask=rows(0, 3), empty_rows="uniform", gate=gate(HALF)),
        [(1, F(1, 6)), (F(36, 28), F(4, 28))],
        [3, 14],
    ),
}


def by_hand_inputs(q: list = (1, 2), k: list | None = None) -> tuple[Tensor, Tensor, Tensor]:
    k = [math.log(n) for n in (1, 2, 3)] if k is None else k
    column = [torch.tensor(x, dtype=torch.float64)[None, None, :, None] for x in (list(q), k)]
    return *column, torch.tensor([[[[1, 0], [2, 1], [3, 0]]]], dtype=torch.float64)


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    options, y, exp_lse = BY_HAND[name]
    options = {"scale": 1.0} | options
    tensors = by_hand_inputs(**{n: options.pop(n) for n in "qk" if n in options})
    got, lse = cross_attention(*tensors, **options, return_lse=True, backend="reference")
    torch.testing.assert_close(got, torch.tensor([[y]], dtype=torch.float64))
    torch.testing.assert_close(lse, torch.tensor([[exp_lse]], dtype=torch.float64).log())


def test_heads_by_hand():
    """Two query heads on one key head, the second with twice the scale: weights 1 4 9 and 1 16 81."""
    q, k, v = by_hand_inputs()
    y, lse = cross_attention(
        q.expand(1, 2, 2, 1), k, v, scale=gate(1.0, 2.0), gate=gate(HALF, -HALF), return_lse=True, backend="reference"
    )
    means = [[F(14, 12), F(36, 28)], [-F(36, 28), -F(276, 196)]]
    torch.testing.assert_close(y[0, :, :, 0], torch.tensor(means, dtype=torch.float64))
    torch.testing.assert_close(lse[0], logs([6, 14], [14, 98]))


def test_default_scale_by_hand():
    """q kᵀ is 4 log 2 over D = 4 channels, so that D ** -0.5 makes it log 4: weights 1 and 4."""
    k = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    k[0, 0, 1] = math.log(2)
    v = torch.tensor([[[[0.0], [1.0]]]], dtype=torch.float64)
    y = cross_attention(torch.ones(1, 1, 1, 4, dtype=torch.float64), k, v, backend="reference")
    assert y.item() == pytest.approx(4 / 5)


@pytest.mark.parametrize("empty_rows", ["zero", "uniform", "attend_all"])
def test_no_keys(empty_rows):
    q, k, v = by_hand_inputs()
    y, lse = cross_attention(q, k[:, :, :0], v[:, :, :0], empty_rows=empty_rows, return_lse=True, backend="reference")
    assert torch.equal(y, torch.zeros(1, 1, 2, 2, dtype=torch.float64)) and (lse == -INF).all()


@pytest.mark.parametrize("junk", [math.nan, INF], ids=str)
def test_a_key_that_no_query_sees_takes_no_part(junk):
    q, k, v = (t.requires_grad_() for t in by_hand_inputs())
    dirty_k, dirty_v = k.detach().clone(), v.detach().clone()
    dirty_k[..., 1, :], dirty_v[..., 1, :] = junk, junk
    mask = BY_HAND["keys"][0]["mask"]
    clean = cross_attention(q, k, v, mask, scale=1.0, backend="reference")
    dirty = [t.requires_grad_() for t in (q.detach().clone(), dirty_k, dirty_v)]
    got = cross_attention(*dirty, mask, scale=1.0, backend="reference")
    assert torch.equal(got, clean)
    for a, b in zip(torch.autograd.grad(got.sum(), dirty), torch.autograd.grad(clean.sum(), (q, k, v))):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
    ids=str,
)
def test_dtypes(dtype, wide):
    tensors = [t.to(dtype) for t in by_hand_inputs()]
    y, lse = cross_attention(*tensors, gate=gate(HALF), bias=logs([1]), return_lse=True, backend="reference")
    assert (y.dtype, lse.dtype) == (dtype, wide)


# ---- gradients against finite differences ----

B, HQ, HK, M, N, D, DV = 2, 4, 2, 3, 4, 3, 2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


ODD = Mask(  # one row in three sees nothing
    start=torch.tensor([0, 1, 3])[None, None],
    end=torch.tensor([[[3, 4, 2]], [[4, 4, 3]]]),
    keys=torch.tensor([[True, True, False, True], [True] * 4]),
)

GRADCHECK = {
    "plain": (dict(), {}),
    "mask": (dict(mask=ODD), {}),
    "mask uniform": (dict(mask=ODD, empty_rows="uniform"), dict(bias=(HQ, M, N))),
    "mask attend_all": (dict(mask=ODD, empty_rows="attend_all"), dict(bias=(HQ, M, N))),
    "bias by query and key": (dict(), dict(bias=(M, N))),
    "bias by head and key": (dict(), dict(bias=(HQ, 1, N))),
    "bias number": (dict(), dict(bias=())),
    "gate": (dict(), dict(gate=())),
    "gate by head": (dict(), dict(gate=(HQ,))),
    "gate by head and channel": (dict(), dict(gate=(HQ, DV))),
    "gate by entry and query": (dict(), dict(gate=(B, 1, M, 1))),
    "scale tensor": (dict(), dict(scale=())),
    "scale by head": (dict(), dict(scale=(HQ,))),
    "softcap": (dict(softcap=0.8), {}),
    "softcap, scale, bias": (dict(softcap=0.8), dict(scale=(HQ,), bias=(M, N))),
    "dropout": (dict(dropout_p=0.4), {}),
    "dropout, mask, bias, gate": (dict(dropout_p=0.4, mask=ODD), dict(bias=(B, 1, M, 1), gate=(HQ,))),
    "shared q": (dict(), dict(q=(1, HQ, M, D))),
    "shared k and v": (dict(), dict(k=(1, HK, N, D), v=(1, HK, N, DV))),
    "one head each": (dict(), dict(q=(B, 2, M, D))),
    "everything": (
        dict(mask=ODD, softcap=1.2, dropout_p=0.2, empty_rows="uniform"),
        dict(bias=(1, HQ, M, N), gate=(HQ, DV), scale=(HQ,)),
    ),
}


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name):
    options, shapes = GRADCHECK[name]
    shapes = dict(q=(B, HQ, M, D), k=(B, HK, N, D), v=(B, HK, N, DV)) | shapes
    tensors = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes.values())]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        arguments = dict(zip(shapes, tensors)) | options
        generator = torch.Generator().manual_seed(3)
        y, lse = cross_attention(**arguments, generator=generator, return_lse=True, backend="reference")
        return y, lse[lse > -INF]  # finite differences of -inf are NaN

    y, lse = run(*tensors)
    empty = B * HQ if "mask" in options and "empty_rows" not in options else 0
    assert lse.numel() == y[..., 0].numel() - empty
    assert torch.autograd.gradcheck(run, tensors)


# ---- against PyTorch ----

MOST = 6  # heads
BITS = randn(B, MOST, M, N, seed=9) > -0.5
BITS[..., 0] = True  # PyTorch's answer for an empty row depends on its backend

SDPA = {
    "plain": {},
    "scale": dict(scale=0.3),
    "bool mask": dict(mask=BITS),
    "bool mask by entry and key": dict(mask=BITS[:, :1, :1]),
    "bool mask by query and key": dict(mask=BITS[0, 0]),
    "float mask": dict(mask=randn(B, MOST, M, N, seed=10)),
    "float mask by head": dict(mask=randn(MOST, M, N, seed=11), scale=0.3),
    "float mask with -inf": dict(mask=randn(M, N, seed=12).masked_fill(~BITS[1, 1], -INF)),
}


@pytest.mark.parametrize("heads", [HK, HQ, MOST], ids="heads {}".format)
@pytest.mark.parametrize("name", SDPA)
def test_agrees_with_sdpa(name, heads):
    options = dict(SDPA[name])
    mask = options.pop("mask", None)
    if mask is not None and mask.ndim > 2:
        mask = mask[..., :heads, :, :]
    floating = mask is not None and mask.is_floating_point()
    tensors = [randn(B, heads, M, D, seed=1), randn(B, HK, N, D, seed=2), randn(B, HK, N, DV, seed=3)]
    tensors = [t.requires_grad_() for t in (*tensors, *([mask.clone()] if floating else []))]
    mask = tensors[3] if floating else mask
    q, k, v = tensors[:3]
    dy = randn(B, heads, M, DV, seed=4)

    y = cross_attention(q, k, v, mask, **options, backend="reference")
    expected = scaled_dot_product_attention(q, k, v, mask, **options, enable_gqa=heads != HK)
    torch.testing.assert_close(y, expected)
    for got, want in zip(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy)):
        torch.testing.assert_close(got, want)


def test_agrees_with_sdpa_causal():
    q, k, v = randn(B, HQ, 5, D), randn(B, HQ, 7, D, seed=1), randn(B, HQ, 7, DV, seed=2)
    got = cross_attention(q, k, v, Mask.causal(5, 7), backend="reference")
    torch.testing.assert_close(got, scaled_dot_product_attention(q, k, v, is_causal=True))
