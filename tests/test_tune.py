"""`python -m crossattn_kernels tune` without a GPU: times are invented, everything else is the command's own."""

import json
import math
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from crossattn_kernels import cli, trial, tune, tuning
from crossattn_kernels.trial import Machine
from crossattn_kernels.tuning import Config, tables

CPU = torch.device("cpu")
SHAPE = "2,8,8,1024,1024,128"
FAST = Config(64, 64, 4, 3)


@pytest.fixture(autouse=True)
def no_tables(tmp_path_factory, monkeypatch):
    """The package has none, so that the rule is in use."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path_factory.mktemp("tables"))
    tuning._plan.cache_clear()
    yield
    tuning._plan.cache_clear()


def right(case, kernel, config):
    return ""


def invented(case, kernel, configs):
    """FAST takes half of what all others do."""
    return [0.5 if config[:4] == FAST[:4] and not config.descriptors else 1.0 for config in configs]


class Counted:
    """A function that counts its calls, and is interrupted at one of them."""

    def __init__(self, f, stop=math.inf):
        self.f, self.calls, self.stop = f, [], stop

    def __call__(self, *args):
        if len(self.calls) >= self.stop:
            raise KeyboardInterrupt
        self.calls.append(args)
        return self.f(*args)


def machine(check=right, times=invented, **changes):
    made = Machine(CPU, "NVIDIA Test 1", "2.13.0", "3.7.1", check, times)
    return made._replace(**changes)


def tuned(out, *, on=None, shapes=(SHAPE,), kernels=("forward",), budget=math.inf, names=(), dtype="bfloat16"):
    return tune.run(names, shapes, dtype, kernels, out, budget, on or machine())


def table(out):
    return json.loads((out / "sm_90.json").read_text())["entries"]


def entry_of(out, kernel, D=128, dtype="half", kind="plain", triton="3.7"):
    wanted = dict(triton=triton, dtype=dtype, D=D, kernel=kernel, kind=kind)
    (found,) = [e for e in table(out) if wanted.items() <= e.items()]
    return found


def log_of(out):
    return [json.loads(line) for line in (out / "tune-nvidia-test-1.jsonl").read_text().splitlines()]


# ---- the sweep ----


def test_the_fastest_becomes_an_entry_and_is_used(tmp_path, monkeypatch):
    installed = ".".join(map(str, tables._triton()))
    assert tuned(tmp_path, on=machine(triton=f"{installed}.9")) == 0
    entry = entry_of(tmp_path, "forward", triton=installed)
    assert [entry[name] for name in Config._fields[:4]] == [*FAST[:4]] and "splits" not in entry
    assert entry["source"].startswith("measured on NVIDIA Test 1, 20") and entry["source"].endswith(f"{installed}.9")
    (job,) = trial.jobs(tune.workloads((), (SHAPE,), "bfloat16"), ("forward",), CPU)
    assert tuning.plan(job.problem).forward[:4] != FAST[:4]
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tuning._plan.cache_clear()
    assert tuning.plan(job.problem).forward[:4] == FAST[:4]


def test_what_is_in_use_stays_where_nothing_is_faster(tmp_path):
    tuned(tmp_path, on=machine(times=lambda case, kernel, configs: [1.0] * len(configs)))
    (job,) = trial.jobs(tune.workloads((), (SHAPE,), "bfloat16"), ("forward",), CPU)
    assert entry_of(tmp_path, "forward")["BLOCK_M"] == next(iter(job.configs)).BLOCK_M


def test_shapes_that_share_a_key_have_one_entry_by_the_geometric_mean(tmp_path):
    """FAST takes half the time on one shape and four times as long on the other; the second best 0.9 on both."""
    second = Config(128, 32, 8, 2)

    def times(case, kernel, configs):
        fast = 0.5 if case.B == 2 else 4.0
        return [{FAST[:4]: fast, second[:4]: 0.9}.get(c[:4], 1.0) for c in configs]

    assert tuned(tmp_path, on=machine(times=times), shapes=(SHAPE, "4,8,8,2048,1024,128")) == 0
    entry = entry_of(tmp_path, "forward")
    assert tuple(entry[name] for name in Config._fields[:4]) == second[:4]


def test_other_entries_of_the_table_stay(tmp_path):
    old = dict(triton="3.7", dtype="half", D=128, kernel="forward", kind="plain", source="", **FAST._asdict())
    others = [old | change for change in (dict(triton="3.6"), dict(D=64), dict(dtype="full"), dict(kind="ranges"))]
    tables.save(tmp_path / "sm_90.json", "sm_90", [old, *others])
    tuned(tmp_path)
    assert [e for e in table(tmp_path) if not e["source"]] == others and len(table(tmp_path)) == 5


def test_an_architecture_without_a_table_starts_from_the_one_that_served_it(tmp_path):
    served = dict(triton="3.7", dtype="half", D=64, kernel="dq", kind="plain", source="", **FAST._asdict())
    tables.save(tables.FOLDER / "sm_80.json", "sm_80", [served])
    tables._path_for.cache_clear()
    tuned(tmp_path)
    assert served in table(tmp_path) and len(table(tmp_path)) == 2


def test_every_measurement_is_logged_and_none_is_made_twice(tmp_path):
    first, second = (Counted(invented) for _ in range(2))
    tuned(tmp_path, on=machine(times=first), shapes=(SHAPE, SHAPE))
    lines = log_of(tmp_path)
    assert len(first.calls) == len(lines) == len({json.dumps(line["config"]) for line in lines}) > 20
    assert {line["shape"] for line in lines} == {SHAPE} and {line["dtype"] for line in lines} == {"bfloat16"}
    assert lines[0]["config"] == lines[0]["base"] and lines[0]["ratio"] == 1
    before = table(tmp_path)
    tuned(tmp_path, on=machine(times=second), shapes=(SHAPE,))
    assert not second.calls and table(tmp_path) == before


def test_what_ends_the_process_is_not_met_again(tmp_path):
    """As an abort of the compiler would: the log has a line for it already."""
    process = tmp_path / "process.py"
    process.write_text(ABORTS.format(path=[str(Path(tune.__file__).parents[1]), str(Path(__file__).parent)]))
    for _ in range(2):
        done = subprocess.run([sys.executable, process, tmp_path / "out"], capture_output=True, text=True)
        assert done.returncode == -signal.SIGABRT, done.stderr
    refused = [line for line in log_of(tmp_path / "out") if line["refused"]]
    assert [line["refused"] for line in refused] == ["it ended the process"] * 2
    assert refused[0]["config"] != refused[1]["config"]


ABORTS = """
import os, sys
from pathlib import Path
sys.path[:0] = {path}
import test_tune
test_tune.tuned(Path(sys.argv[1]), on=test_tune.machine(check=lambda *_: os.abort()))
"""


@pytest.mark.parametrize("change", [dict(gpu="NVIDIA Test-1"), dict(triton="3.7.2")])
def test_measurements_hold_for_one_gpu_and_one_triton(tmp_path, change):
    """The first has the same log."""
    tuned(tmp_path)
    again = Counted(invented)
    tuned(tmp_path, on=machine(times=again, **change))
    assert len(again.calls) == len(log_of(tmp_path)) / 2


def test_after_an_interruption_the_table_is_the_old_one_and_the_rest_is_measured(tmp_path, capsys):
    tables.save(tmp_path / "sm_90.json", "sm_90", [])
    old = (tmp_path / "sm_90.json").read_bytes()
    assert tuned(tmp_path, on=machine(times=Counted(invented, stop=5))) == 130
    said = capsys.readouterr().err
    assert "interrupted: what is measured stays in " in said and "the table is as it was" in said
    assert (tmp_path / "sm_90.json").read_bytes() == old and len(log_of(tmp_path)) == 5
    with (tmp_path / "tune-nvidia-test-1.jsonl").open("a") as log:
        log.write('{"gpu": "NVIDIA Te')  # a line that was cut short
    rest = Counted(invented)
    assert tuned(tmp_path, on=machine(times=rest)) == 0
    (job,) = trial.jobs(tune.workloads((), (SHAPE,), "bfloat16"), ("forward",), CPU)
    assert len(rest.calls) == len(set(job.configs.values())) - 5
    assert tuned(tmp_path, on=machine(times=Counted(invented, stop=0))) == 0  # nothing is left, the cut line's included
    # all compared with what was in use at first
    assert {configs[0] for _, _, configs in rest.calls} == {next(iter(job.configs.values()))}


def test_an_interruption_while_the_table_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    tables.save(tmp_path / "sm_90.json", "sm_90", [])
    old = (tmp_path / "sm_90.json").read_bytes()
    monkeypatch.setattr(tables.os, "replace", Counted(None, stop=0))
    assert tuned(tmp_path) == 130
    assert (tmp_path / "sm_90.json").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sm_90.json", "tune-nvidia-test-1.jsonl"]


def test_wrong_results_are_refused_and_never_timed(tmp_path, capsys):
    def check(case, kernel, config):
        return "y: error 1.0e+00 > 1.0e-03" if config[:4] == FAST[:4] else ""

    timed = Counted(invented)
    assert tuned(tmp_path, on=machine(check, timed)) == 0
    assert FAST[:4] not in [config[:4] for _, _, configs in timed.calls for config in configs]
    assert entry_of(tmp_path, "forward")["BLOCK_M"] != FAST.BLOCK_M
    refused = [line for line in log_of(tmp_path) if line["refused"]]
    assert len(refused) == 2 and {line["ms"] for line in refused} == {None}  # with descriptors and without
    assert "2 refused, 0 not measured" in capsys.readouterr().out
    assert tuned(tmp_path, on=machine(check, again := Counted(invented))) == 0 and not again.calls


def test_what_does_not_compile_is_refused(tmp_path):
    def times(case, kernel, configs):
        if configs[-1].num_stages == 4:
            raise RuntimeError("out of resource: shared memory\nand a long story")
        return invented(case, kernel, configs)

    assert tuned(tmp_path, on=machine(times=times)) == 0
    said = {line["refused"] for line in log_of(tmp_path) if line["config"]["num_stages"] == 4}
    assert said == {"RuntimeError: out of resource: shared memory"}


def test_where_what_is_in_use_is_wrong_the_first_right_one_is_the_measure(tmp_path):
    (job,) = trial.jobs(tune.workloads((), (SHAPE,), "bfloat16"), ("forward",), CPU)
    present, following, *_ = job.configs.values()
    assert tuned(tmp_path, on=machine(lambda case, kernel, config: "y" * (config == present))) == 0
    assert {Config(**line["base"]) for line in log_of(tmp_path)[1:]} == {following}
    assert entry_of(tmp_path, "forward")["BLOCK_M"] == FAST.BLOCK_M


def test_what_does_not_fit_into_memory_is_left_out(tmp_path, capsys):
    def times(case, kernel, configs):
        if case.B == 4:
            raise torch.OutOfMemoryError("no room")
        return invented(case, kernel, configs)

    assert tuned(tmp_path, on=machine(times=times), shapes=("4,8,8,1024,1024,128", SHAPE)) == 0
    assert {line["shape"] for line in log_of(tmp_path)} == {SHAPE}
    assert entry_of(tmp_path, "forward")["BLOCK_M"] == FAST.BLOCK_M
    assert capsys.readouterr().err.count("left out, as it does not fit into memory: 4,8,8,1024,1024,128 forward") == 1


def test_a_gpu_that_has_failed_ends_the_run(tmp_path, capsys):
    def times(case, kernel, configs):
        raise RuntimeError("an illegal memory access was encountered")

    def settle():
        raise torch.AcceleratorError("an illegal memory access was encountered\nCUDA kernel errors ...")

    assert tuned(tmp_path, on=machine(times=times, settle=settle)) == 1
    assert "the GPU has failed, an illegal memory access was encountered: what" in capsys.readouterr().err
    assert len(log_of(tmp_path)) == 1 and not (tmp_path / "sm_90.json").exists()


def test_the_budget_ends_the_sweep_with_the_best_so_far(tmp_path, capsys):
    now = iter(range(0, 10_000, 10))  # seconds, ten a measurement
    assert tuned(tmp_path, on=machine(clock=lambda: next(now)), budget=100) == 0
    assert len(log_of(tmp_path)) == 9 and len(table(tmp_path)) == 1
    said = capsys.readouterr()
    (job,) = trial.jobs(tune.workloads((), (SHAPE,), "bfloat16"), ("forward",), CPU)
    left = len(set(job.configs.values())) - 9
    assert f"0 refused, {left} not measured" in said.out
    assert f"9 done, {left} left, 0:01:40 {SHAPE} forward" in said.err


def test_a_table_that_cannot_be_read_is_not_written_over(tmp_path):
    for text in ("{", '{"schema": 9, "entries": []}', '{"schema": 1, "entries": [{"D": 64}]}'):
        (tmp_path / "sm_90.json").write_text(text)
        with pytest.raises(ValueError, match="sm_90.json cannot be read, move it away"):
            tuned(tmp_path)
        assert (tmp_path / "sm_90.json").read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_a_whole_run_under_the_interpreter(tmp_path, monkeypatch):
    """Real checks, real launches, and invented times."""
    few = dict(forward=[Config(32, 32, 4, 1), Config(16, 64, 4, 1)])
    few["short_queries"] = [Config(32, 32, 4, 1), Config(32, 64, 4, 1)]
    monkeypatch.setattr(trial, "candidates", lambda kernel, *_: few[kernel])

    def times(case, kernel, configs):
        for config in configs:
            trial.launches(case, trial.LAUNCHES[kernel], trial.forcing(kernel, config), CPU)()
        return [1 / config.BLOCK_N for config in configs]

    on = machine(partial(trial.check, device=CPU), times)
    assert tuned(tmp_path, on=on, shapes=("1,2,1,9,70,16",), kernels=(), dtype="float32") == 0
    assert {e["kernel"]: e["BLOCK_N"] for e in table(tmp_path)} == dict(forward=64, short_queries=64)
    assert all(e["D"] == 64 and e["dtype"] == "full" for e in table(tmp_path))


# ---- the command ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "tune needs a GPU that this torch can use; there is none"),
        (["sdxl", "wam"], "unknown workload 'wam': there are sdxl, pixart, wan, "),
        (["--kernels", "forward,dp"], "unknown kernel 'dp': there are forward, dq, dkv, short_keys, short_queries, "),
        (["--shape", "2,8,3,64,64,64"], "a shape is B,Hq,Hk,M,N,D, all positive, with Hk a divisor of Hq "),
        (["--shape", "2,8,8,64,64"], "a shape is B,Hq,Hk,M,N,D, all positive"),
        (["--shape", "2,8,8,64,64,x"], "a shape is B,Hq,Hk,M,N,D, all positive"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1


def test_a_kernel_that_no_call_runs_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=f"nothing to do: no call of {SHAPE} runs bias_grad"):
        tuned(tmp_path, kernels=("bias_grad",))


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Machine, "present", staticmethod(machine))
    (tmp_path / "file").touch()
    assert cli.main(["tune", "--out", str(tmp_path / "file" / "folder")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_hands_its_arguments_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Machine, "present", staticmethod(machine))
    asked = ["--shape", SHAPE, "--kernels", "dq,dkv", "--dtype", "float16", "--budget", "60", "--out", str(tmp_path)]
    assert cli.main(["tune", *asked]) == 0
    assert {(e["kernel"], e["dtype"]) for e in table(tmp_path)} == {("dq", "half"), ("dkv", "half")}
    assert {line["dtype"] for line in log_of(tmp_path)} == {"float16"}


def test_without_a_folder_results_go_to_the_package_or_else_here(tmp_path, monkeypatch):
    tuned(None)
    assert table(tables.FOLDER)
    monkeypatch.setattr(tables, "FOLDER", tables.FOLDER / "missing")
    monkeypatch.chdir(tmp_path)
    tuned(None)
    assert table(tmp_path)
