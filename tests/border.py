"""Calls as PyTorch sees them: functions of tensors, their results and gradients.  Not a test file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossattn_kernels import Mask, cross_attention
from crossattn_kernels.testing import Case, draw

SMALL = Case("small", B=2, Hq=2, Hk=1, M=5, N=7, D=16)
EVERYTHING = replace(SMALL, name="everything", mask="all fields", bias=(0, 1, 1, 1), gate="head", scale="head",
                     softcap=2.0, dropout_p=0.2, empty_rows="uniform", layout="bshd")  # fmt: skip
CASES = [
    SMALL,
    EVERYTHING,
    replace(EVERYTHING, name="by channel", Dv=24, gate="channel", bias=(1, 0, 0, 1), scale="scalar", share="kv",
            empty_rows="attend_all", mask="ranges", layout="bhsd"),
    replace(SMALL, name="shared q", share="q", gate="scalar", mask="padding"),
    replace(SMALL, name="half", dtype=torch.bfloat16, gate="channel", mask="lengths"),
    replace(SMALL, name="no keys", N=0, mask="lengths", empty_rows="uniform", bias=(1, 1, 1, 1), gate="head"),
    replace(SMALL, name="no queries", M=0, mask="ranges", empty_rows="attend_all", gate="channel", scale="head"),
    replace(SMALL, name="no batch", B=0, mask="padding", bias=(0, 1, 1, 1)),
]  # fmt: skip

backends = pytest.mark.parametrize("backend", ["torch", "triton"])
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name.replace(" ", "-"))


def leaves(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """q, k, v, bias, gate, scale of a case, requiring a gradient."""
    return {name: t.detach().requires_grad_() for name, t in draw(case, seed=seed).tensors.items()}


def attend(case: Case, backend: str, mask: Mask | None = None, **more: Any) -> Callable[..., Any]:
    """cross_attention as a function of the case's tensors, in their order."""
    call = draw(case)
    names = list(call.tensors)

    def f(*tensors: Tensor) -> Any:
        given = dict(zip(names, tensors))
        return cross_attention(
            **given, mask=call.mask if mask is None else mask, **call.options, backend=backend, **more
        )

    return f


def results(f: Callable[..., Any], tensors: Any, seed: int = 7) -> list[Tensor]:
    """y and every gradient of a loss that weighs its entries differently."""
    torch.manual_seed(seed)
    y = f(*tensors)
    weights = torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(y.dtype)
    wanted = [t for t in tensors if t.requires_grad]
    for t in wanted:
        t.grad = None
    (weights * y).sum().backward()
    return [y.detach(), *(t.grad for t in wanted)]


def same(a: Any, b: Any) -> None:
    """Bitwise."""
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def close(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)


def compiled(f: Callable[..., Any], dynamic: bool = False, backend: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)


class Reader(nn.Module):
    """Cross-attention as a model has it."""

    def __init__(self, backend: str):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(16, 32), nn.Linear(16, 64), nn.Linear(32, 16, bias=False)
        self.gate = nn.Parameter(torch.full((2,), 0.5))
        self.backend = backend

    def forward(self, x: Tensor, context: Tensor, lengths: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (2, 16)).transpose(1, 2)
        k, v = self.kv(context).unflatten(2, (2, 2, 16)).permute(2, 0, 3, 1, 4)
        y = cross_attention(q, k, v, Mask.lengths(lengths), gate=self.gate, backend=self.backend)
        return x + self.out(y.transpose(1, 2).flatten(2))


def reader_arguments(M: int = 5, N: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(M)
    return torch.randn(2, M, 16, generator=g), torch.randn(2, N, 16, generator=g), torch.tensor([N, N - 2])
