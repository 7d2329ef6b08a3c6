"""What is timed beside what ships: by which tiles and kernels, and what becomes of what fails; the log's page."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import experiments, variants
from bench.experiments import Job, measured, page, read, work
from bench.hypotheses import EXPERIMENTS, FORWARD, Experiment, Way, half, plan_of, ways_of
from bench.jobs import DONE, LEFT_OUT, PENDING
from crossattn_kernels import kernels, testing, trial, tuning
from crossattn_kernels.kernels.launch import LAUNCHERS
from crossattn_kernels.testing import Case, check
from crossattn_kernels.tuning import Config

CPU = torch.device("cpu")
CASE = Case("small", 1, 2, 1, 40, 70, 16)


def experiment(*ways, kernels=FORWARD):
    return Experiment("small one", "Why?", "Because.", CASE, kernels, lambda plan: list(ways))


@pytest.fixture
def timed(monkeypatch):
    """Runs each way once; what ships takes two milliseconds, everything else one."""

    def in_turns(ways, device):
        for way in ways:
            way()
        return [2.0, 1.0]

    monkeypatch.setattr(trial, "in_turns", in_turns)


def test_a_way_is_timed_beside_what_ships(timed):
    way = Way("other tile", 0.7, dict(forward=Config(16, 32, 4, 1)))
    row = measured(experiment(way), way, CPU)
    assert row == dict(predicted=0.7, status="ok", detail="", ms=1.0, base_ms=2.0, ratio=0.5)


def test_a_wrong_way_is_not_timed(timed, monkeypatch):
    run = testing.run

    def doubled(call, backend, *rest):
        results = run(call, backend, *rest)
        return results | {"dq": results["dq"] * (2 if backend == "triton" else 1)}

    monkeypatch.setattr(testing, "run", doubled)
    way = Way("other tile", 0.7, dict(forward=Config(16, 32, 4, 1)))
    row = measured(experiment(way), way, CPU)
    assert row["status"] == "wrong" and row["detail"].startswith("dq: error") and "ms" not in row


def test_a_way_that_cannot_be_is_recorded(timed):
    way = Way("no such schedule", 0.7, dict(backward_schedule="none"))
    row = measured(experiment(way), way, CPU)
    assert row["status"] == "error" and row["detail"].startswith("ValueError: backward_schedule must be one of")


PLANS = {"in order": {}, "specialised": dict(forward=Config(32, 32, 4, 2, descriptors=True))}


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_variants_are_held_to_the_budget_and_are_not_what_ships(variant):
    case, shipped, known = replace(CASE, N=192, dtype=torch.bfloat16), kernels.forward_here, dict(LAUNCHERS)
    with variants.forward_by(variant), tuning.force(**PLANS[variant]):
        assert kernels.forward_here is not shipped
        assert all(row.ok for row in check(case, "triton", "cpu"))
    assert kernels.forward_here is shipped and known == LAUNCHERS


@pytest.mark.parametrize("name", ["whole_tiles", "forward_kernel"])
def test_variants_run_in_place_of_what_ships(monkeypatch, name):
    monkeypatch.setitem(variants.VARIANTS, "none", SimpleNamespace(__name__=name))
    with variants.forward_by("none"), pytest.raises(Exception, match="'types.SimpleNamespace' object is not"):
        check(replace(CASE, N=200), "triton", "cpu")


SPECIALISED = """
import torch
from bench.hypotheses import EXPERIMENTS, half, ways_of
from bench.variants import forward_by
from crossattn_kernels import kernels, testing, tuning
from crossattn_kernels.aot.target import launched, standing_in
from crossattn_kernels.problem import canonical

for experiment in EXPERIMENTS:
    for way in ways_of(experiment, torch.device("meta")).values() if "specialised" in experiment.name else ():
        case = half(experiment.case)
        q, k = (torch.empty(1, 1, n, case.D, dtype=case.dtype, device="meta") for n in (case.M, case.N))
        with standing_in("sm_90"), forward_by(way.variant), tuning.force(**way.changes):
            kernels.forward_here(*canonical(q, k, k))
            print(*["setmaxnreg" in kernel.asm["ptx"] for *_, kernel in launched()])
"""


def test_warps_are_specialised():
    """Where Triton cannot, it compiles the plain loop and says nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SPECIALISED], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 4, done.stderr[-2000:]


def test_all_ways_can_be_planned_on_an_h200_and_are_not_what_ships():
    names = [e.name for e in EXPERIMENTS]
    assert len(set(names)) == len(names)
    for e in EXPERIMENTS:
        with tuning.assumed("sm_90"):
            ways, ships = ways_of(e, torch.device("meta")), plan_of(half(e.case), torch.device("meta"))
            assert ways and all(way.predicted > 0 for way in ways.values())
            for way in ways.values():
                with tuning.force(**way.changes):
                    assert plan_of(half(e.case), torch.device("meta")) != ships or way.variant, (e.name, way.name)


def test_what_is_late_is_left_out_and_lines_are_kept(tmp_path, monkeypatch):
    way = Way("other", 0.7)
    monkeypatch.setattr(experiments, "BY_NAME", {"small one": experiment(way)})
    monkeypatch.setattr(experiments, "ways_of", lambda e, device: {"other": way})
    monkeypatch.setattr(experiments, "measured", lambda e, way, device: dict(predicted=0.7, status="wrong", detail="x"))
    monkeypatch.setattr(experiments, "answers", lambda device: True)
    path, states, jobs = tmp_path / "a-experiments.jsonl", [PENDING, PENDING], [Job("small one", "other")] * 2
    work(jobs, states, [time.monotonic() + 100, time.monotonic() - 1], path, dict(device="a"))
    assert states == [DONE, LEFT_OUT]
    assert read(tmp_path)[jobs[0]]["detail"] == "x" and len(path.read_text().splitlines()) == 1
    states[:] = [PENDING, PENDING]
    monkeypatch.setattr(experiments, "answers", lambda device: False)  # another process goes on
    work(jobs, states, [time.monotonic() + 100] * 2, path, dict(device="a"))
    assert states == [DONE, PENDING]


def test_the_page_is_that_of_the_results():
    assert experiments.PAGE.read_text() == page(read(experiments.rows.FOLDER)), "python -m bench.experiments --page"


def test_the_page_shows_what_was_measured_and_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "EXPERIMENTS", (experiment(Way("one", 0.7), Way("two", 1.2)),))
    rows = [
        dict(experiment="small one", way="one", status="ok", ratio=0.5, base_ms=2.0, device="a", date="b", commit="c"),
        dict(experiment="small one", way="two", status="died", detail="killed"),
    ]
    (tmp_path / "a-experiments.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = page(read(tmp_path))
    assert "| one | 0.70 | 0.50 of 2 ms, a, b, c |" in text and "| two | 1.20 | died: killed |" in text


def test_without_a_gpu_it_says_so(capsys):
    assert experiments.main([]) == 2
    assert "there is none" in capsys.readouterr().out
