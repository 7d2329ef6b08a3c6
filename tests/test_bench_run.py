"""Runs of the benchmark suite without a GPU: what goes wrong, processes, clocks."""

import atexit
import contextlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import clocks, jobs, providers, rows, run
from bench.floors import MODES, Cost
from bench.named import NAMED
from bench.parts import PARTS, Job, Part, jobs_of
from bench.supervise import supervise

RATES = Cost(790e12, 4.3e12, 3.8e12)

# ---- runs ----


def results_of(tmp_path, *arguments):
    assert run.main(["--device", "cpu", "--out", str(tmp_path), *arguments]) == 0
    return {(r["workload"], r["provider"], r["mode"]): r for r in rows.read(tmp_path / "cpu-1-thread.csv")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(jobs.ceilings, "on_cpu", lambda: Cost(1e11, 1e10, 1e9))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    on_cpu = clocks.on_cpu
    monkeypatch.setattr(clocks, "on_cpu", lambda work: on_cpu(work, budget=1e-3))


def test_a_run_writes_times_and_where_they_stand(tmp_path, capsys):
    found = results_of(tmp_path, "--workload", "W6", "Flamingo 5", "--provider", "ours", "sdpa auto")
    assert len(found) == 2 * 2 * 3 and all(r["status"] == "ok" for r in found.values())
    r = found["Flamingo 5", "sdpa auto", "backward"]
    assert r["wall_p20_us"] <= r["wall_p50_us"] <= r["wall_p80_us"]
    assert r["cold_p50_us"] is None and r["peak_mib"] is None, "a CPU has wall time only"
    assert r["over_floor"] == pytest.approx(r["wall_p50_us"] / r["floor_us"], rel=1e-3)
    assert (r["runs"], r["same_bits"], r["gate"], r["visible"]) == ("flash_attention", "True", "scalar", 0.2)
    assert {"torch", "commit", "date", "device"} <= {n for n, x in r.items() if x}
    assert "sdpa auto [flash_attention]" in capsys.readouterr().out


def test_wrong_failing_and_refusing_contenders_are_rows_without_times(tmp_path, monkeypatch):
    def wrong(call):
        forward = providers.ours(call)
        return lambda: forward() * 1.01

    def fails(call):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setitem(providers.PROVIDERS, "eager", wrong)
    monkeypatch.setitem(providers.PROVIDERS, "sdpa math", fails)
    who = ("eager", "sdpa math", "sdpa cudnn", "ours")
    found = results_of(tmp_path, "--workload", "W6", "--mode", "full", "--provider", *who)
    by_provider = {p: r for (_, p, _), r in found.items()}
    assert {p: r["status"] for p, r in by_provider.items()} == {
        "eager": "wrong", "sdpa math": "error", "sdpa cudnn": "refused", "ours": "ok",
    }  # fmt: skip
    assert "y: error" in by_provider["eager"]["detail"] and by_provider["eager"]["error_over_budget"] > 1
    assert by_provider["sdpa math"]["detail"] == "RuntimeError: no such instruction"
    for p in ("eager", "sdpa math", "sdpa cudnn"):
        assert not any(by_provider[p][c] for c in (*rows.CLOCKS, *rows.DERIVED)), p


def test_a_workload_that_cannot_be_drawn_costs_its_own_rows(tmp_path, monkeypatch):
    fails = replace(NAMED["W6"], mask=lambda c: 1 / 0)
    monkeypatch.setitem(NAMED, "W6", fails)
    found = results_of(tmp_path, "--workload", "W6", "LXMERT", "--mode", "fwd", "--provider", "ours")
    assert found["W6", "ours", "forward"]["status"] == "error"
    assert "ZeroDivisionError" in found["W6", "ours", "forward"]["detail"]
    assert found["LXMERT", "ours", "forward"]["status"] == "ok"


def test_a_budget_stops_and_says_what_was_left_out(tmp_path, capsys):
    run.main(["--device", "cpu", "--out", str(tmp_path), "--workload", "W6", "--provider", "ours", "--budget", "0"])
    said = capsys.readouterr().out
    assert "left out of chosen, 0 s were over (3): W6 forward ours, W6 backward ours" in said
    assert "0 rows, 3 left out" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--workload", "W10"], "no workload is named 'W10'; there are W1a, W1b"),
        (["--provider", "cudnn"], "no provider is named 'cudnn'; there are ours, sdpa"),
        (["--mode", "forward"], "no mode is named 'forward'; there are fwd, bwd, full"),
        (["--part", "all"], "no part is named 'all'; there are dense, masked, flex, batch, memory, host"),
    ],
)
def test_wrong_arguments_are_answered_in_one_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_without_a_gpu_or_with_a_file_of_other_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda"]) == 2 and "needs an NVIDIA GPU" in capsys.readouterr().out
    (tmp_path / "cpu-1-thread.csv").write_text("a,b\n")
    assert run.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "move it away" in capsys.readouterr().out


def test_parts_fit_nine_minutes_and_name_what_exists():
    assert sum(p.budget for p in PARTS.values()) + run.COMPILE_SECONDS <= 530
    for name, part in PARTS.items():
        for job in jobs_of(name, part):
            assert job.workload in NAMED and job.provider in providers.PROVIDERS and job.mode in MODES
    decode = jobs_of("dense", Part(("W7a",), ("ours",), MODES, 1.0))
    assert [j.mode for j in decode] == ["forward"]


# ---- processes: the target is given, so that no GPU is needed ----


def _worker(todo, states, deadlines, how):
    for i, job in enumerate(todo):
        if states[i] == jobs.PENDING:
            if job == "bad":
                how()
                return  # as after a fault on the device: this job is written, the process wants to be replaced
            states[i] = jobs.DONE


@pytest.mark.parametrize(
    "how, said",
    [(lambda: os._exit(7), "exit code 7"), (lambda: time.sleep(60), "was killed"), (lambda: None, "exit code 0")],
    ids=["dies", "hangs", "does nothing"],
)
def test_a_job_that_takes_its_process_along(how, said):
    deaths = []
    todo = ["first", "bad", "last"]
    limits = [time.monotonic() + 60] * 3
    states = supervise(_worker, todo, limits, (how,), lambda *death: deaths.append(death), method="fork", patience=0.5)
    assert [job for job, _ in deaths] == ["bad"] and said in deaths[0][1]
    assert list(states) == [jobs.DONE] * 3


def _breaks_while_it_ends(todo, states, deadlines):
    atexit.register(os.abort)
    threading._register_atexit(os.abort)
    _replaced(todo, states, deadlines)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_breaks_while_a_process_ends_is_no_job_s_fault(method):
    """As the destructors of a CUDA context after a fault."""
    states = supervise(_breaks_while_it_ends, "ab", [time.monotonic() + 60] * 2, (), pytest.fail, method=method)
    assert list(states) == [jobs.DONE] * 2


def _replaced(todo, states, deadlines):
    i = list(states).index(jobs.PENDING)
    states[i] = jobs.DONE


def test_a_process_that_asks_to_be_replaced_is():
    states = supervise(_replaced, "abc", [time.monotonic() + 60] * 3, (), pytest.fail, method="fork")
    assert list(states) == [jobs.DONE] * 3


def test_a_run_on_a_gpu_is_supervised(tmp_path, monkeypatch, capsys):
    """Up to the processes: here every one of them dies."""

    def supervise(target, todo, deadlines, arguments, died):
        assert target is jobs.work and deadlines == sorted(deadlines) and arguments[0].device == "cuda"
        for job in todo[:-1]:
            died(job, "it fell off the bus")
        return [jobs.DONE] * (len(todo) - 1) + [jobs.LEFT_OUT]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 1")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 1)  # of a torch for CUDA it would ask the GPU
    monkeypatch.setattr(run, "compile_ahead", lambda todo, setting: None)
    monkeypatch.setattr(run, "supervise", supervise)
    assert run.main(["--device", "cuda", "--out", str(tmp_path), "--part", "host", "masked", "--commit", "abc"]) == 0
    found = rows.read(tmp_path / "nvidia-test-1.csv")
    everything = sum(len(jobs_of(n, PARTS[n])) for n in ("host", "masked"))
    assert len(found) == everything - 1 and f"{everything - 1} rows, 1 left out" in capsys.readouterr().out
    assert {(r["status"], r["detail"], r["dtype"], r["commit"]) for r in found} == {
        ("died", "it fell off the bus", "bfloat16", "abc")
    }
    assert {r["M"] for r in found if r["workload"] == "W1c"} == {1024.0}, "whole sizes on a GPU"


# ---- clocks: the order of what a GPU is told ----


@pytest.fixture
def device(monkeypatch):
    """What a GPU would be told, in order; it answers that everything takes 2 ms."""
    said = []

    class Event:
        def __init__(self, enable_timing):
            self.name = "event"

        def record(self):
            said.append("record")

        def elapsed_time(self, end):
            return 2.0  # ms

    class Graph:
        def replay(self):
            said.append("replay")

    @contextlib.contextmanager
    def graph(g, stream):
        said.append("capture")
        yield

    for name, fake in dict(
        synchronize=lambda: said.append("wait"), _sleep=lambda cycles: said.append("spin"), Event=Event,
        CUDAGraph=Graph, graph=graph, current_stream=lambda: "stream", memory_allocated=lambda: 0,
        reset_peak_memory_stats=lambda: None, max_memory_allocated=lambda: 2**20,
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake, raising=False)
    return said


def test_the_device_is_held_flushed_and_then_timed(device, monkeypatch):
    said = device
    flush = SimpleNamespace(sum=lambda: said.append("flush"))
    seconds, host = clocks.between_events(lambda: said.append("work"), 1e-4, flush)
    assert said == ["wait", "spin", "flush", "record", "work", "record", "wait"]
    assert seconds == 2e-3 and host >= 0
    times, detail = clocks.on_cuda(lambda: None, flush, budget=1e-4)
    assert detail == "" and times.cold.p50 == 2e-3 and times.graph.p50 == pytest.approx(2e-3 / 10)
    assert None not in times and said.count("capture") == 1

    def refuse(g, stream):
        raise RuntimeError("capture is not allowed")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    times, detail = clocks.on_cuda(lambda: None, flush, budget=1e-4)
    assert times.graph is None and times.warm is not None and "capture is not allowed" in detail


def test_a_row_of_a_gpu_has_every_clock(device, tmp_path):
    """The path of a GPU over tensors on the CPU."""
    setting = jobs.Setting("cpu", True, tmp_path / "x.csv", dict(device="NVIDIA Test 1"))
    ready = jobs.prepare(NAMED["W6"], setting)
    flush = SimpleNamespace(sum=lambda: None)
    row, alive = jobs.result(Job("dense", "W6", "ours", MODES[2]), ready, RATES, setting, flush)
    assert alive and row["status"] == "ok" and row["peak_mib"] == 1.0 and not row["detail"]
    assert {c for c in rows.CLOCKS if row[c] > 0} == set(rows.CLOCKS)
    assert row["over_floor"] == pytest.approx(row["cold_p50_us"] / row["floor_us"])
    rows.append(setting.path, row)
    assert "cold 2000 warm 2000 graph 200" in jobs.line(row)


WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module(sys.argv[1], run_name='__main__')"


@pytest.mark.parametrize("module", ["bench.run", "bench.layers", "bench.experiments"])
def test_without_torch_one_sentence(module):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, module], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{module} needs a python3 with torch: ")
