"""Tile sizes and launch options: a plain function of the problem; nothing is timed in a call."""

from __future__ import annotations

from typing import NamedTuple

from crossattn_kernels.problem import Problem


class Config(NamedTuple):
    """Queries and keys in a tile, warps of a program, stages of the load pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# by the padded head size; chosen by registers, spills and shared memory as compiled for sm_90, not yet by time
HALF = {
    "forward": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    "dq": {64: Config(128, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 4, 1)},
    "dkv": {64: Config(64, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 64, 8, 1)},
    "bias_grad": {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 1)},
}
FULL = {64: Config(32, 32, 4, 2), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)}


def choose(problem: Problem, kernel: str) -> Config:
    """The configuration of one kernel: "forward", "dq", "dkv" or "bias_grad"."""
    size = max(64, power_of_two(max(problem.D, problem.Dv)))
    config = FULL[size] if problem.dtype.itemsize == 4 else HALF[kernel][size]
    return config._replace(
        BLOCK_M=min(config.BLOCK_M, max(16, power_of_two(problem.M))),
        BLOCK_N=min(config.BLOCK_N, max(16, power_of_two(problem.N))),
    )


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
