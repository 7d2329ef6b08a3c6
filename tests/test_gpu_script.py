"""`make gpu` without a GPU: what the script does with results, failures and a missing device."""

import json
import multiprocessing
import sys
import time
from functools import partial

import pytest
import torch

from bench import supervise
from crossattn_kernels import trial, tuning
from crossattn_kernels.problem import Problem
from crossattn_kernels.testing import Row, draw
from tests import gpu
from tests.gpu_models import NAMES, models


@pytest.fixture
def machine(monkeypatch):
    """A machine that says it has a GPU; the work itself is replaced in each test, and done by forked processes."""
    monkeypatch.setattr(gpu, "supervise", partial(supervise.supervise, method="fork"))
    monkeypatch.setattr(gpu, "answers", lambda device: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    monkeypatch.setattr(gpu, "CHECKS", {"bitwise": lambda: [Row("y", 0.0, 0.0)]})


def report_of(monkeypatch, tmp_path, check, *arguments):
    monkeypatch.setattr(gpu, "check", check)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--workers", "2", "--out", str(tmp_path), *arguments])
    status = gpu.main()
    (path,) = tmp_path.iterdir()
    part = f"-{arguments[1]}" if arguments[:1] == ("-k",) else ""  # which does not take the place of the whole
    assert path.name == f"nvidia-test-1-parity{part}.json"
    return status, json.loads(path.read_text())


def test_passing(machine, monkeypatch, tmp_path):
    status, report = report_of(monkeypatch, tmp_path, lambda case, backend, device: [Row("y", 1.0, 2.0)])
    assert status == 0 and report["failed"] == 0 and report["passed"] == len(gpu.cases()) + 1
    (plain,) = [case for case in report["cases"] if case["case"] == "plain-float32"]
    assert plain["seconds"] >= 0 and plain["ok"] and plain["failure"] is None
    assert plain["results"] == {"y": [1.0, 2.0]} and report["left_out"] == []


def test_over_budget_and_raising(machine, monkeypatch, tmp_path, capfd):
    def check(case, backend, device):
        if case.name == "plain":
            return [Row("y", float("nan"), 2.0)]
        if case.name == "softcap":
            raise RuntimeError("no such instruction")
        return [Row("y", 0.0, 1.0)]

    status, report = report_of(monkeypatch, tmp_path, check)
    failed = [c for c in report["cases"] if not c["ok"]]
    assert status == 1 and report["failed"] == len(failed) == 6
    assert "no such instruction" in next(c for c in failed if c["case"].startswith("softcap"))["failure"]
    assert "FAILED plain-float32" in capfd.readouterr().out


def test_a_dead_process_and_a_device_that_does_not_answer(machine, monkeypatch, tmp_path):
    """Each costs its case, and the cases after it are done by a process of their own."""
    answers = multiprocessing.Value("b", True)

    def check(case, backend, device):
        if case.name == "softcap":
            sys.exit(3)
        if case.name == "plain":
            answers.value = False
            raise RuntimeError("illegal address")
        return [Row("y", 0.0, 1.0)]

    def once(device):
        with answers:
            now, answers.value = answers.value, True
        return now

    monkeypatch.setattr(gpu, "answers", once)
    monkeypatch.setattr(gpu, "CHECKS", {})
    status, report = report_of(monkeypatch, tmp_path, check, "-k", "float16")
    failed = {c["case"]: c["failure"] for c in report["cases"] if not c["ok"]}
    assert status == 1 and set(failed) == {f"{n}-{d}float16" for n in ("softcap", "plain") for d in ("", "b")}
    assert "exit code 3" in failed["softcap-float16"] and "illegal address" in failed["plain-float16"]
    assert report["passed"] == len([n for n in gpu.CASES if "float16" in n]) - 4


def test_what_does_not_fit_the_budget_is_named(machine, monkeypatch, tmp_path, capsys):
    """And it is no success."""
    check = lambda case, backend, device: [Row("y", time.sleep(0.2) or 0.0, 1.0)]  # noqa: E731
    status, report = report_of(monkeypatch, tmp_path, check, "-k", "mask", "--budget", "0.3")
    left = len([n for n in gpu.CASES if "mask" in n]) - report["passed"]
    assert status == 1 and report["failed"] == 0 and 0 < left == len(report["left_out"])
    assert f"{left} left out" in capsys.readouterr().out


def test_hidden_values():
    """The check itself, with a backend that runs here."""
    assert all(row.ok for row in gpu.hidden_values("cpu", "torch", (64,)))


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2 and "needs an NVIDIA GPU" in capsys.readouterr().out


def configurations(problem):
    """(kernel, tiles, warps, stages) of all kernels that a call launches, without the number of splits."""
    plan = tuning.plan(problem)
    kernels = {"short keys": ["dkv"], "short queries": ["short_queries"], "two-pass": ["dq", "dkv"]}[
        plan.backward_schedule
    ]
    return {(problem.dtype.itemsize, plan.backward_schedule, k, getattr(plan, k)[:4]) for k in (*kernels, "forward")}


def test_every_configuration_is_among_the_cases():
    """Each schedule, dtype and padded head size, plain and not, at the sizes that use its tiles whole."""
    seen = set()
    for case in gpu.cases():
        seen |= configurations(trial.problem_of(case, torch.device("meta"))) if case.M * case.N else set()
    for dtype in (torch.float32, torch.bfloat16):
        for D in (64, 128, 256):
            for M, N in ((4096, 4096), (4096, 128), (4096, 32), (32, 4096), (1, 4096)):
                for kind in (dict(), dict(masked=True), dict(masked=True, plain=False)):
                    problem = Problem(2, 8, 4, M, N, D, D, dtype, torch.device("meta"), **kind)
                    assert configurations(problem) <= seen, (dtype, D, M, N, kind)
    options = [
        dict(extras=1), dict(extras=1, pairwise=True), dict(extras=1, pairwise=True, scattered=True), dict(extras=2),
        dict(extras=1, drops=True), dict(extras=2, pairwise=True, scattered=True, drops=True), dict(extras=4),
    ]  # fmt: skip
    for D in (64, 128, 256):
        for M, N in ((4096, 4096), (4096, 77), (32, 4096)):
            for kind in options:
                problem = Problem(2, 8, 4, M, N, D, D, torch.bfloat16, torch.device("meta"), plain=False, **kind)
                assert configurations(problem) <= seen, (D, M, N, kind, configurations(problem) - seen)


def test_cases_can_be_drawn():
    """Names are unique and each case draws (at a small size)."""
    cases = gpu.cases()
    assert len({str(c) for c in cases}) == len(cases)
    for case in cases[:: len(cases) // 40]:
        small = {"M": min(case.M, 20), "N": min(case.N, 20)}
        assert draw(type(case)(**{**vars(case), **small})).tensors["q"].shape[2] == small["M"]


def test_models_on_a_device_against_fp64():
    rows = models("cpu")
    assert [row.name for row in rows] == [f"{name} {kind}" for name in NAMES for kind in ("output", "gradient")]
    assert all(row.ok for row in rows), rows
    assert all(0 < row.error < 1e-4 for row in rows)
