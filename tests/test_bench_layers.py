"""The benchmark of layers: what is wrong or missing gets a row and no time, and rows are written at once."""

import json
import sys
from functools import partial

import pytest
import torch

from bench import layers
from bench.layers import BOTH, FORWARD, PAIRS, Pair, checked, timed
from crossattn_kernels import functional

ATTEND = functional.attend


def pair(place, factor=1.0, gradient=1.0, of=2):
    """softmax(x w) twice, ours times `factor`, and with its gradient of w times `gradient`."""
    x, w = place.randn(4, 8), place.randn(8, 8)

    def ours():
        same = w.view_as(w)
        if same.requires_grad:
            same.register_hook(lambda grad: gradient * grad)
        return factor * (x @ same).softmax(-1)

    return Pair(ours, lambda: (x @ w).softmax(-1), [x, w][:of], [x, w])


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
def test_an_error_of_one_percent_is_found(mode):
    checked(pair, mode, "cpu")
    with pytest.raises(AssertionError, match="the worst output is off by 1.0e-02"):
        checked(partial(pair, factor=1.01), mode, "cpu")


def test_an_error_in_one_gradient_is_found():
    checked(partial(pair, gradient=1.01), FORWARD, "cpu")
    with pytest.raises(AssertionError, match="the worst gradient is off by 1.0e-02"):
        checked(partial(pair, gradient=1.01), BOTH, "cpu")


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
def test_not_a_number_is_found(mode):
    with pytest.raises(AssertionError, match="the worst output is off by nan"):
        checked(partial(pair, factor=torch.nan), mode, "cpu")


def test_a_gradient_that_one_side_lacks_is_found():
    with pytest.raises(ValueError, match="zip"):
        checked(partial(pair, of=1), BOTH, "cpu")


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(layers.clocks, "on_cpu", lambda run: pytest.fail("timed"))
    row = timed(partial(pair, factor=1.01), FORWARD, "cpu")
    assert row.keys() == {"status"} and row["status"].startswith("AssertionError: the worst output is off by")


def test_a_library_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "flamingo_pytorch", None)
    row = timed(PAIRS["Flamingo, block 512 wide"][0], FORWARD, "cpu")
    assert row.keys() == {"status"} and "flamingo_pytorch" in row["status"]


@pytest.mark.parametrize("name", PAIRS)
def test_both_sides_are_alike_and_ours_is_ours(name, monkeypatch):
    """So is the order of their gradients, else `checked` would fail."""
    calls = []
    monkeypatch.setattr(layers, "TILE", 5)
    monkeypatch.setattr(functional, "attend", lambda *args: (calls.append(1), ATTEND(*args))[1])
    build, modes, _ = PAIRS[name]
    small = checked(build, modes[-1], "cpu")
    calls.clear()
    small.ours()
    assert calls
    calls.clear()
    small.theirs()
    # decoding is our layer beside itself
    assert bool(calls) == name.startswith("decode")


def test_rows_are_written_to_a_folder_that_is_made(monkeypatch, tmp_path, capsys):
    """Also those before a run that is cut off, which does not take the place of a whole one."""

    def cut(place):
        raise KeyboardInterrupt

    monkeypatch.setattr(layers, "PAIRS", dict(small=(pair, (FORWARD,), None), cut=(cut, (BOTH,), None)))
    with pytest.raises(KeyboardInterrupt):
        layers.main(["--device", "cpu", "--out", str(tmp_path / "new")])
    (row,) = json.loads((tmp_path / "new" / "layers-cpu.part.json").read_text())
    assert row["name"] == "small" and row["status"] == "ok" and row["wall_ratio"] > 0
    monkeypatch.delitem(layers.PAIRS, "cut")
    assert layers.main(["--device", "cpu", "--out", str(tmp_path / "new")]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["layers-cpu.json"]
