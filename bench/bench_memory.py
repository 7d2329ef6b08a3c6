"""Extra memory, in fresh processes: against eager, and how it grows."""

import sys

import pytest

from bench.measure import exponent, extra_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
MODE = "forward+backward"
KINDS = {"dense": {}, "ranges": {"mask": "ranges"}, "tile loop": {"softcap": 30.0}}


def test_against_eager(benchmark, record):
    """M = N = 8192, 8 heads: eager needs several GiB."""
    sizes = (1, 8, 8192, 8192, 64)
    eager = extra_memory("eager", sizes, MODE)
    ours = benchmark.pedantic(extra_memory, ("ours", sizes, MODE), rounds=1)
    name = f"{'x'.join(map(str, sizes))} {MODE}"
    met = 20 * ours < eager
    record(
        "extra peak memory against eager",
        name,
        "< 1/20",
        met,
        **mib(ours=ours, eager=eager),
        share=f"1/{eager / ours:.0f}",
    )
    assert met


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vary", ["M", "N", "M and N"])
def test_growth(vary, kind, benchmark, record):
    """Doubling M, N or both: extra memory may at most double."""
    small = [2048 * 2**i for i in range(4)]
    sizes = [(1, 2, m if "M" in vary else 2048, m if "N" in vary else 2048, 32) for m in small]
    extra = benchmark.pedantic(lambda: [extra_memory("ours", s, MODE, **KINDS[kind]) for s in sizes], rounds=1)
    slope = exponent([s[2] + s[3] for s in sizes], extra)
    met = slope <= 1.15
    name = f"{vary} {small[0]}..{small[-1]} {kind}"
    record(
        "extra memory over M + N",
        name,
        "<= 1.15",
        met,
        **mib(smallest=extra[0], largest=extra[-1]),
        exponent=f"{slope:.2f}",
    )
    assert met


def mib(**bytes_of: int) -> dict[str, str]:
    return {f"{name} MiB": f"{n / 2**20:.0f}" for name, n in bytes_of.items()}
