"""The benchmark of layers: what is wrong or missing gets a row and no time, and rows are written at once."""

import json
import sys

import pytest
import torch

from bench import layers
from bench.layers import BOTH, FORWARD, PAIRS, Pair, Place, check, timed
from crossattn_kernels import functional

ATTEND = functional.attend


def pair(factor=1.0, gradient=1.0, of=2):
    """softmax(x w) twice, ours times `factor`, and with its gradient of w times `gradient`."""
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    scaled = gradient * w + (1 - gradient) * w.detach()
    return Pair(lambda: factor * (x @ scaled).softmax(-1), lambda: (x @ w).softmax(-1), [x, w][:of], [x, w])


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
def test_an_error_of_one_percent_is_found(mode):
    check(pair(), mode, 1e-4)
    with pytest.raises(AssertionError, match="result 0 is off by"):
        check(pair(factor=1.01), mode, 1e-4)


def test_an_error_in_one_gradient_is_found():
    check(pair(gradient=1.01), FORWARD, 1e-4)
    with pytest.raises(AssertionError, match="result 2 is off by"):
        check(pair(gradient=1.01), BOTH, 1e-4)


def test_not_a_number_is_found():
    with pytest.raises(AssertionError, match="result 0 is off by nan"):
        check(pair(factor=torch.nan), FORWARD, 1e-4)


def test_a_gradient_that_one_side_lacks_is_found():
    with pytest.raises(ValueError, match="zip"):
        check(pair(of=1), BOTH, 1e-4)


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(layers.clocks, "on_cpu", lambda run: pytest.fail("timed"))
    row = timed(lambda place: pair(factor=1.01), FORWARD, "cpu")
    assert row.keys() == {"status"} and row["status"].startswith("AssertionError: result 0 is off by")


def test_a_library_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "flamingo_pytorch", None)
    row = timed(PAIRS["Flamingo, block 512 wide"][0], FORWARD, "cpu")
    assert row.keys() == {"status"} and "flamingo_pytorch" in row["status"]


@pytest.mark.parametrize("name", PAIRS)
def test_both_sides_are_alike_and_ours_is_ours(name, monkeypatch):
    """So is the order of their gradients, else `check` would fail."""
    calls = []
    monkeypatch.setattr(layers, "TILE", 5)
    monkeypatch.setattr(functional, "attend", lambda *args: (calls.append(1), ATTEND(*args))[1])
    build, modes, _ = PAIRS[name]
    torch.manual_seed(0)
    small = build(Place("cpu"))
    check(small, modes[-1], 1e-4)
    calls.clear()
    small.ours()
    assert calls
    calls.clear()
    small.theirs()
    # decoding is our layer beside itself
    assert bool(calls) == name.startswith("decode")


def test_rows_are_written_to_a_folder_that_is_made(monkeypatch, tmp_path, capsys):
    """Also those before a run that is cut off."""

    def cut(place):
        raise KeyboardInterrupt

    monkeypatch.setattr(layers, "PAIRS", dict(small=(lambda place: pair(), (FORWARD,), None), cut=(cut, (BOTH,), None)))
    with pytest.raises(KeyboardInterrupt):
        layers.main(["--device", "cpu", "--out", str(tmp_path / "new")])
    (row,) = json.loads((tmp_path / "new" / "layers-cpu.json").read_text())
    assert row["name"] == "small" and row["status"] == "ok" and row["wall_ratio"] > 0
