"""The kernels' own functions, in kernels of their own."""

import torch
import triton
import triton.language as tl

from crossattn_kernels import dropout
from crossattn_kernels.kernels.scores import capped
from crossattn_kernels.kernels.softmax import kept, tanh
from crossattn_kernels.kernels.views import Dropout, Logits, MaskView


@triton.jit
def tanh_kernel(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tanh(tl.load(x + i)))


@triton.jit
def capped_kernel(x, y, logits, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, capped(tl.load(x + i), logits, 1.0))


def test_tanh():
    x = torch.cat((torch.linspace(-12, 12, 1000), torch.logspace(-30, 1, 1000), torch.tensor([0.0, -0.0, 100, -100])))
    x = torch.nn.functional.pad(x, (0, 2048 - x.numel()))
    y = torch.empty_like(x)
    exact = torch.tanh(x.double())
    capped_kernel[(1,)](x, y, Logits(1.0, None, 1.0, None, MaskView(), FINE=0), 2048)
    assert (y.double() - exact).abs().max() < 2**-22
    tanh_kernel[(1,)](x, y, 2048)
    error = (y.double() - exact).abs() / exact.abs().clamp(min=1e-300)
    assert (y[exact == 0] == 0).all() and error[exact != 0].max() < 3 * 2**-24


@triton.jit
def kept_kernel(y, drop, b, h, n: tl.constexpr):
    i = tl.arange(0, n)
    p = tl.zeros([n, n], tl.float32) + 1.0
    b, h = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
    tl.store(y + i[:, None] * n + i[None, :], kept(p, drop, b, h, i[:, None], i[None, :]))


def test_dropout_is_the_reference_s():
    seed, p = torch.tensor(2**61 + 12345), 0.37
    y = torch.empty(16, 16)
    kept_kernel[(1,)](y, Dropout(seed, dropout.threshold(p), 1 / (1 - p), 1000), 3, 5, 16)
    keep = dropout.keep(seed, p, slice(3, 4), 6, slice(0, 16), slice(1000, 1016))
    torch.testing.assert_close(y, keep[0, 5] / (1 - p))
