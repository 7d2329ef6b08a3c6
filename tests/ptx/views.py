"""Tensors whose rows lie far apart, and tensors that are not aligned where those of the call before were."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from crossattn_kernels import cross_attention
from tests.ptx.driver import executing


def main() -> None:
    """A line a tensor: how it was moved, which it is, the largest difference that it makes."""
    huge = torch.empty(2**31 + 2**20, dtype=torch.float16)  # the pages between the rows are never touched

    def far(t: Tensor) -> Tensor:
        B, H, S, D = t.shape
        return huge.as_strided((B, H, S, D), (H * D, D, 2**31 // (S - 1), 1)).copy_(t)

    def apart(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, s, d).half() for s, d in ((70, 64), (150, 64), (150, 64), (70, 150))]
    with executing(sys.argv[1]):
        near = cross_attention(*tensors[:3], bias=tensors[3], backend="triton")
        for move in (far, apart):
            for i in range(4):
                q, k, v, bias = (move(t) if i == j else t for j, t in enumerate(tensors))
                there = cross_attention(q, k, v, bias=bias, backend="triton")
                print(move.__name__, i, (there - near).abs().max().item())


if __name__ == "__main__":
    main()
