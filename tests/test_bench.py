"""The benchmark suite without a GPU: floors, workloads, verdicts, rows, runs that go wrong, reports."""

import contextlib
import os
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import clocks, jobs, providers, report, rows, run, verdict
from bench.floors import MODES, Cost, cost, floor, total, visible
from bench.measure import Quantiles
from bench.named import BATCH, DENSE, KEYS, MASKED, NAMED
from bench.parts import PARTS, Job, Part, jobs_of
from bench.supervise import supervise
from crossattn_kernels.problem import Problem
from crossattn_kernels.testing import assert_within_budget

# ---- floors ----

RATES = Cost(790e12, 4.3e12, 16 * 132 * 1.8e9)
# microseconds on an H200 at RATES: products, memory, exponentials of the forward; products, memory of the backward
FLOORS = {
    "W1a": (2.0, 5.0, 1.7, 5.1, 10.0),
    "W1b": (8.2, 20.2, 6.6, 20.4, 40.1),
    "W1c": (1.0, 2.7, 0.8, 2.6, 5.3),
    "W1d": (4.1, 10.6, 3.3, 10.2, 21.1),
    "W2a": (434.8, 159.7, 176.5, 1090, 318.2),
    "W2b": (1000, 365.3, 407.3, 2510, 727.8),
    "W3": (174.0, 78.5, 70.6, 434.9, 156.6),
    "W4a": (272.0, 14.0, 110.4, 680.0, 27.9),
    "W4b": (1090, 55.9, 441.6, 2720, 111.5),
    "W4c": (4350, 150.2, 1770, 10880, 299.5),
    "W5a": (22.4, 66.4, 18.2, 56.1, 132.7),
    "W5b": (33.6, 99.5, 18.2, 84.1, 199.0),
    "W5c": (174.0, 501.4, 141.2, 434.9, 1000),
    "W5d": (695.9, 2000, 564.9, 1740, 4000),
    "W6": (2.0, 13.2, 1.7, 5.1, 26.5),
    "W7a": (0.1, 6.1, 0.1, 0.3, 12.2),
    "W7b": (1.1, 48.8, 0.4, 2.7, 97.7),
    "W7c": (8.5, 390.7, 3.4, 21.3, 781.3),
    "W8a": (69.7, 37.2, 56.6, 174.2, 74.4),
    "W8b": (0.0, 1.8, 0.0, 0.0, 3.6),
    "W8c": (0.3, 57.2, 0.3, 0.8, 114.4),
    "W9": (22270, 4000, 9040, 55670, 8000),
}


@pytest.mark.parametrize("name", FLOORS)
def test_floors_are_those_of_the_table(name):
    """Within the rounding of the table: 0.1 us, or 0.01 ms from 1 ms on."""
    case = NAMED[name].at("cuda", small=False)
    ways = [(mode, i) for mode, count in (("forward", 3), ("backward", 2)) for i in range(count)]
    found = [1e6 * cost(case, mode)[i] / RATES[i] for mode, i in ways]
    for got, expected in zip(found, FLOORS[name]):
        assert abs(got - expected) <= (5.01 if expected >= 1000 else 0.0501), (name, found)
    assert 1e6 * floor(case, "forward", RATES).seconds == pytest.approx(max(found[:3]))
    assert 1e6 * floor(case, MODES[2], RATES).seconds == pytest.approx(max(found[:3]) + max(found[2:]))


def test_costs_are_those_of_the_problem():
    """What the package says of its own calls, and what a mask leaves of it."""
    case = replace(NAMED["W4a"].at("cpu", small=True), Dv=24)
    problem = Problem(case.B, case.Hq, case.Hk, case.M, case.N, case.D, 24, case.dtype, torch.device("cpu"))
    for mode in MODES[:2]:
        assert cost(case, mode)[:2] == (problem.flops(mode), problem.bytes(mode))
    assert total(case, MODES[2]) == tuple(map(sum, zip(*(cost(case, m) for m in MODES[:2]))))
    call = NAMED["Whisper lengths"].inputs("cpu", small=True)
    seen, whole = visible(call), NAMED["Whisper lengths"].at("cpu", small=True)
    assert seen.pairs == pytest.approx(call.mask.end.double().mean().item() / whole.N) and seen.keys == seen.pairs
    masked, dense = cost(whole, "backward", seen), cost(whole, "backward")
    assert masked.exps == seen.pairs * dense.exps and masked.bytes < dense.bytes


# ---- workloads and verdicts ----


def known(name, count=None):
    return verdict.truths(lambda seed: NAMED[name].inputs("cpu", small=True, seed=seed))[:count]


@pytest.mark.parametrize("name", [w.name for w in (*DENSE, *MASKED, BATCH[3], KEYS[1])])
def test_ours_is_right_on_every_workload(name):
    exact = known(name)
    assert exact[0].call.tensors["q"].shape[1:3] == (NAMED[name].small.Hq, NAMED[name].small.M)
    if exact[0].call.mask is not None:
        q, k = (exact[0].call.tensors[n] for n in "qk")
        dense = exact[0].call.mask.as_dense(*q.shape[:3], k.shape[2])
        assert dense.any(-1).all() and not dense.all(), "every query sees a key, some see not all"
    for mode in MODES:
        assert_within_budget(verdict.judge(lambda c, m=mode: providers.bind("ours", c, m), exact, mode), mode)


def test_small_workloads_keep_the_shape_of_the_large():
    for w in NAMED.values():
        a, b = w.case, w.small
        assert (a.Hq // a.Hk, a.gate, a.layout, a.M > a.N) == (b.Hq // b.Hk, b.gate, b.layout, b.M > b.N), w.name
        assert w.source


@pytest.mark.parametrize("name", ["W4a", "Whisper lengths", "PixArt lengths"])
def test_pieces_of_a_large_call_say_what_the_whole_says(name, monkeypatch):
    whole = known(name, 1)[0]
    monkeypatch.setattr(verdict, "WHOLE", 0)
    monkeypatch.setattr(verdict, "BLOCK", 5000)
    pieces = known(name, 1)[0]
    assert len(pieces.pieces) == 2 or whole.call.tensors["k"].shape[:2] == (1, 1)
    for n, exact in pieces.exact.items():
        expected = torch.cat([p.cut(whole.exact[n])[:, p.heads(n)] for p in pieces.pieces])
        torch.testing.assert_close(exact, expected)
    rows_ = verdict.judge(lambda c: providers.bind("ours", c, MODES[2]), [pieces], MODES[2])
    assert_within_budget(rows_)
    assert [r.name for r in rows_] == ["y", "dq", "dk", "dv"]


def test_a_result_that_is_slightly_wrong_is_found():
    def bind(call):
        work = providers.bind("ours", call, MODES[2])
        return lambda: tuple(t * 1.001 for t in work())

    assert not any(r.ok for r in verdict.judge(bind, known("W6"), MODES[2]))


@pytest.mark.parametrize("name", ["W4a", "W3", "Flamingo 5", "PixArt lengths"])
def test_peers_are_right(name, monkeypatch):
    """Gates, masks and grouped heads mean the same to everybody; FlexAttention is not compiled here."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(providers, "compiled", lambda: (flex_attention, create_block_mask))
    exact = known(name)
    for who in ("sdpa", "sdpa auto", "sdpa math", "eager"):
        assert_within_budget(verdict.judge(lambda c, w=who: providers.bind(w, c, MODES[2]), exact, MODES[2]), who)
    for who in ("flex", "flex + block mask"):
        if who == "flex" or exact[0].call.mask is not None:
            rows_ = verdict.judge(lambda c, w=who: providers.bind(w, c, "forward"), exact, "forward")
            assert_within_budget(rows_, who)


def test_who_refuses_and_why():
    call = NAMED["W1a"].inputs("cpu", small=True)
    for who, why in (("xformers", "not installed"), ("flash-attn", "not installed"), ("flex + block mask", "no mask")):
        with pytest.raises(providers.Refused, match=why):
            providers.PROVIDERS[who](call)
    large = call._replace(tensors={n: t[:1, :1].expand(4096, 512, -1, -1) for n, t in call.tensors.items()})
    for who in ("eager", "sdpa math"):
        with pytest.raises(providers.Refused, match="scores would take"):
            providers.PROVIDERS[who](large)
    assert providers.chosen("ours", call) == "torch" and providers.chosen("sdpa auto", call) == "flash_attention"


def test_modes_give_gradients_of_what_there_is():
    call = NAMED["W3"].inputs("cpu", small=True)
    assert [len(providers.bind("ours", call, m)()) for m in MODES] == [1, 4, 5]
    backward = providers.bind("ours", call, "backward")
    assert verdict.same_bits(backward)
    drift = iter(range(9))
    assert not verdict.same_bits(lambda: (torch.tensor(next(drift)),))


# ---- rows ----


def row(**values):
    start = dict(part="dense", workload="W1a", B=2, Hq=10, Hk=10, M=4096, N=77, D=64, dtype="bfloat16", gate="")
    return start | dict(provider="ours", mode="forward", status="ok", device="NVIDIA H200", date="2026-01-01") | values


def test_rows_are_appended_to_the_file_of_their_device(tmp_path):
    h200, other = (rows.path_of(tmp_path, name) for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB"))
    assert (h200.name, other.name) == ("nvidia-h200.csv", "nvidia-a100-sxm4-80gb.csv")
    rows.append(h200, row(cold_p50_us=12.5))
    before = h200.read_bytes()
    rows.append(other, row())
    assert h200.read_bytes() == before
    rows.append(h200, row(cold_p50_us=11.5, detail='said "no", twice'))
    assert h200.read_bytes().startswith(before)
    (last,) = rows.read(h200)  # the later row of the same call counts
    assert last["cold_p50_us"] == 11.5 and last["B"] == 2 and last["detail"] == 'said "no", twice'
    assert last["warm_p50_us"] is None
    h200.write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.check_columns(h200)


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


# ---- the report ----


def fixture_csv(path):
    """Two workloads, a sweep of each kind, a refusal; ours wins one and loses one."""

    def add(workload, provider, mode, us, part="dense", **more):
        case = NAMED[workload].at("cuda", small=False)
        job = Job(part, workload, provider, mode)
        setting = jobs.Setting(
            "cuda", False, path, dict(device="NVIDIA Test 1", torch="2.11", commit="abc", date="today")
        )
        times = clocks.Times(*(Quantiles(us * f / 1e6, us * f / 1e6, us * f / 1e6) for f in (1, 0.9, 0.8, 1.5, 0.3)))
        least = floor(case, mode, RATES).seconds
        rows.append(path, jobs.heading(job, setting) | dict(
            status="ok", same_bits=provider == "ours", over_floor=us / least / 1e6, floor_us=1e6 * least, peak_mib=us,
            runs="cudnn_attention" if provider == "sdpa auto" else "", rate_tflops=790.0,
        ) | rows.times_columns(times) | more)  # fmt: skip

    for mode in MODES:
        for provider, us in (("ours", 20.0), ("sdpa auto", 35.0), ("eager", 400.0)):
            add("W1a", provider, mode, us)
            add("W4a", provider, mode, 2000 - us)
        add("W6", "ours", mode, 30.0, part="host")
        add("W6", "sdpa auto", mode, 10.0, part="host")
        for B in (1, 16, 256):
            add(f"batch {B}", "ours", mode, 6.0 * B + 5, part="batch")
            add(f"batch {B}", "sdpa auto", mode, 7.0 * B + 20, part="batch")
    for N in (1024, 32768):
        add(f"keys {N}", "ours", MODES[2], N / 50, part="memory")
        add(f"keys {N}", "eager", MODES[2], N / 5, part="memory")
    nothing = dict.fromkeys((*rows.CLOCKS, *rows.DERIVED), "")
    add("W1a", "sdpa flash", "forward", 1.0, status="refused", detail="no | mask", **nothing)
    add("W4a", "eager", "backward", 1.0, status="wrong", detail="dq: error 1 > budget 0.1", **nothing)


def test_the_report_shows_wins_losses_and_absences(tmp_path, capsys):
    path = tmp_path / "nvidia-test-1.csv"
    fixture_csv(path)
    assert report.main([str(path), "--plots", str(tmp_path / "plots")]) == 0
    said = capsys.readouterr().out
    assert "| W1a | 2 x 10 x 4096 x 77 x 64 | forward | 20 | sdpa auto (cudnn_attention) | 35 | 1.75 |" in said
    assert "| W4a | 1 x 32 / 8 x 2048 x 6404 x 128 | forward | 1,980 | eager | 1,600 | 0.81 |" in said
    assert "| W4a | 1 x 32 / 8 x 2048 x 6404 x 128 | backward | 1,980 | sdpa auto (cudnn_attention) | 1,965 |" in said
    assert "| W6 | forward | 9 / 9 / 9 | 3 / 3 / 3 |" in said
    assert "| sdpa flash | refused | no / mask | W1a (forward) |" in said
    assert "| eager | wrong | dq: error 1 > budget 0.1 | W4a (backward) |" in said
    drawn = sorted((tmp_path / "plots").iterdir())
    assert [p.name for p in drawn] == [f"nvidia-test-1-{n}.png" for n in ("batch", "floor", "memory", "ratio")]
    for picture in drawn:
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_the_report_without_matplotlib_or_without_results(tmp_path, monkeypatch, capsys):
    path = tmp_path / "nvidia-test-1.csv"
    fixture_csv(path)
    monkeypatch.setitem(sys.modules, "bench.plots", None)
    assert report.main([str(path)]) == 0 and "plots need matplotlib" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path / "none.csv")])
    assert "no results in" in capsys.readouterr().err
