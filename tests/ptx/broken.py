"""A kernel as it is compiled, or with instructions left out of it: what does the machine say?"""

from __future__ import annotations

import argparse
import re

import torch

from crossattn_kernels import cross_attention
from tests.ptx.driver import executing


def main() -> None:
    """Without `--without`: whether programs in another order, and products at once, give the same bits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arch")
    parser.add_argument("--without", default="", help="a pattern of PTX")
    parser.add_argument("--no-races", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 64).bfloat16() for n in (70, 270, 270))
    left_out = 0

    def edit(ptx: str) -> str:
        nonlocal left_out
        text, count = re.subn(options.without, "", ptx) if options.without else (ptx, 0)
        left_out += count
        return text

    def result(seed: int = 0, eager: bool = False) -> torch.Tensor:
        with executing(options.arch, not options.no_races, eager, seed, edit):
            return cross_attention(q, k, v, backend="triton")

    try:
        first = result()
    except AssertionError as error:
        print(error)
    else:
        assert left_out or not options.without
        others = [result(seed=1), result(eager=True)] if not options.without else []
        print("NaN" if first.isnan().any() else all(torch.equal(first, other) for other in others))


if __name__ == "__main__":
    main()
