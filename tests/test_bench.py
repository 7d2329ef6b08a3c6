"""The benchmark suite without a GPU: floors, workloads, verdicts, rows, reports."""

import sys
from dataclasses import replace

import pytest
import torch

from bench import clocks, jobs, providers, report, rows, verdict
from bench.floors import MODES, Cost, cost, floor, total, visible
from bench.measure import Quantiles
from bench.named import BATCH, DENSE, KEYS, MASKED, NAMED
from bench.parts import Job
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
