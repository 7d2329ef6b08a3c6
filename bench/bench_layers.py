"""Layers beside the library's own, on the CPU: time of both in one run, and the memory of Mllama's mask."""

import subprocess
import sys

import pytest

from bench.layers import PAIRS, checked

CASES = [(name, mode) for name, (_, modes, _) in PAIRS.items() for mode in modes]


@pytest.mark.parametrize("name, mode", CASES, ids=[f"{name}, {mode}" for name, mode in CASES])
def test_layer(name, mode, race):
    build, modes, target = PAIRS[name]
    pair = checked(build, mode, "cpu")  # a wrong result is not timed
    race("layers against the library's own", f"{name}, {mode}", pair.bind(mode), target if mode == modes[-1] else None)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_of_the_mask(benchmark, record):
    """2 images of 4 tiles of 1601 tokens, 2048 text tokens: each measured in a process of its own."""

    def bytes_of(who):
        command = [sys.executable, "-m", "bench.layers", "--mask-memory", who]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    theirs, ours = bytes_of("theirs"), benchmark.pedantic(bytes_of, ("ours",), rounds=1)
    values = {"ours MiB": f"{ours / 2**20:.2f}", "theirs MiB": f"{theirs / 2**20:.0f}"}
    record("memory of a mask", "Mllama, 2048 x 12808", "<= 1/50", 50 * ours <= theirs, **values)
    assert 50 * ours <= theirs
