"""Time over doublings of M and of N: it grows as their product, so its exponent in each is 1."""

import statistics

import pytest

from bench.measure import exponent, seconds
from bench.providers import MODES, bind
from crossattn_kernels.testing import Case, draw

ROUNDS = 7


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [{}, {"softcap": 30.0}], ids=["flash", "tile loop"])
@pytest.mark.parametrize("vary", ["M", "N"])
def test_time(vary, case, mode, benchmark, record):
    sizes = [1024 * 2**i for i in range(4)]
    works = []
    for size in sizes:
        M, N = (size, 1024) if vary == "M" else (1024, size)
        works.append(bind("ours", draw(Case("", B=1, Hq=4, Hk=4, M=M, N=N, D=64, **case)), mode))
    rounds = []
    # all sizes in each round, so that a busy moment meets all of them
    benchmark.pedantic(lambda: rounds.append([seconds(w) for w in works]), rounds=ROUNDS, warmup_rounds=1)
    medians = [statistics.median(column) for column in zip(*rounds[-ROUNDS:])]
    slope = exponent(sizes, medians)
    met = abs(slope - 1) <= 0.15
    name = f"{vary} {sizes[0]}..{sizes[-1]} {'tile loop' if case else 'flash'} {mode}"
    shown = {f"{n} ms": f"{1e3 * t:.1f}" for n, t in (("smallest", medians[0]), ("largest", medians[-1]))}
    record("time over doublings", name, "1.0 +- 0.15", met, **shown, exponent=f"{slope:.2f}")
    assert met
