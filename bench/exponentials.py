"""The rate of exponentials of a GPU: a kernel that computes nothing else.  Imported only where there is one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROUNDS, BLOCK, PROGRAMS_PER_SM = 1024, 1024, 64


@triton.jit
def exponentials_kernel(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """x = 2^-x, ROUNDS times, for BLOCK numbers in registers: it nears 0.64, far from overflow and subnormals."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (at % 8).to(tl.float32)
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(out + at, x)


def exponentials(programs: int) -> tuple[torch.Tensor, int]:
    """Launch it; (its output, exponentials computed)."""
    out = torch.empty(programs * BLOCK, device="cuda", dtype=torch.float32)
    exponentials_kernel[(programs,)](out, ROUNDS, BLOCK, num_warps=4)
    return out, programs * BLOCK * ROUNDS
