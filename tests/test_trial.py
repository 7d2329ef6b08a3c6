"""What `tune` tries, and how one configuration is checked and timed."""

import pytest
import torch

from crossattn_kernels import trial, tune, tuning
from crossattn_kernels.testing import Case, run
from crossattn_kernels.trial import Machine
from crossattn_kernels.tuning import Config, tables

CPU = torch.device("cpu")
SHAPE = "2,8,8,1024,1024,128"


@pytest.fixture(autouse=True)
def no_tables(tmp_path_factory, monkeypatch):
    """The package has none, so that the rule is in use."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path_factory.mktemp("tables"))
    tuning._plan.cache_clear()
    yield
    tuning._plan.cache_clear()


# ---- what is tried ----


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_configurations_are_launched_as_plan_would(dtype):
    """On every named workload; so what is timed is what a table with this entry makes of the call."""
    for job in trial.jobs(tune.workloads((), (), dtype), tuple(trial.LAUNCHES), CPU):
        first = next(iter(job.configs.values()))
        (field,) = trial.forcing(job.kernel, first).keys() - {"backward_schedule"}
        assert first == getattr(tuning.plan(job.problem), field), (job.case, job.kernel)
        assert len(job.configs) > 5
        for config in job.configs.values():
            with tuning.force(**trial.forcing(job.kernel, config)):
                assert getattr(tuning.plan(job.problem), field) == config  # it fits


def test_named_workloads_meet_every_kernel_head_size_and_kind():
    seen = {job.key for job in trial.jobs(tune.workloads((), (), "bfloat16"), tuple(trial.LAUNCHES), CPU)}
    assert {key[2] for key in seen} == trial.LAUNCHES.keys()
    assert {key[1] for key in seen} == {64, 128, 256}
    assert {key[3] for key in seen} > {"plain", "ragged plain", "ragged padded plain", "ranges", "other"}


def test_descriptors_are_tried_where_rows_are_aligned():
    def tried(shape, arch="sm_90"):
        with tuning.assumed(arch):
            (job,) = trial.jobs(tune.workloads((), (shape,), "bfloat16"), ("forward",), CPU)
        return any(config.descriptors for config in job.configs)

    assert tried(SHAPE) and not tried("2,8,8,1024,1024,100") and not tried(SHAPE, "sm_80")


@pytest.mark.parametrize(("kernel", "size"), [("short_keys", "BLOCK_N"), ("short_queries", "BLOCK_M")])
def test_the_tile_that_says_how_long_a_short_call_may_be_stays(kernel, size):
    for job in trial.jobs(tune.workloads((), (), "bfloat16"), (kernel,), CPU):
        assert len({getattr(config, size) for config in job.configs}) == 1


def test_a_small_call_ends_within_a_tile_where_the_large_one_does():
    small = trial.reduced(Case("", 8, 32, 8, 4096, 6404, 128), Config(128, 64, 8, 2))
    assert (small.B, small.Hq, small.Hk, small.M, small.N) == (2, 8, 2, 512, 4 * 64 + 6404 % 64)
    assert trial.reduced(small, Config(128, 64, 8, 2)) == small


# ---- one configuration, under the interpreter ----

SMALL = {
    "forward": Case("", 1, 2, 1, 1, 300, 16),  # split: one query
    "dq": Case("", 1, 2, 1, 40, 40, 16),
    "dkv": Case("", 1, 2, 1, 40, 40, 16),
    "short_keys": Case("", 1, 2, 1, 40, 20, 16),
    "short_queries": Case("", 1, 2, 1, 5, 100, 16),
    "bias_grad": Case("", 1, 2, 1, 40, 40, 16, bias=(0, 1, 1, 1)),
}


@pytest.fixture
def launched(monkeypatch):
    """[(kernel, configuration)] of all that is launched."""
    from crossattn_kernels.kernels import launch

    seen, original = [], launch.Launcher.__call__

    def keep(self, kernel, *args, label=""):
        seen.append((kernel.__name__, getattr(self.plan, launch.CONFIGS[kernel.__name__])))
        original(self, kernel, *args, label=label)

    monkeypatch.setattr(launch.Launcher, "__call__", keep)
    return seen


@pytest.mark.parametrize("kernel", SMALL)
def test_the_check_runs_the_kernel_by_the_configuration(kernel, launched):
    (job,) = trial.jobs([SMALL[kernel]], (kernel,), CPU)
    config = next(c for c in reversed(job.configs.values()) if not c.descriptors)
    assert trial.check(job.case, kernel, config, CPU) == ""
    # whatever the tile, the schedule is the one that the kernel belongs to
    assert ("dq_kernel" in dict(launched)) == (kernel in ("dq", "dkv", "bias_grad"))
    jitted = "dkv_kernel" if kernel == "short_keys" else f"{kernel}_kernel"
    assert {c for name, c in launched if name == jitted} == {config._replace(splits=min(config.splits, 2))}


def test_the_check_names_what_is_wrong(monkeypatch):
    def doubled(call, backend, *rest):
        results = run(call, backend, *rest)
        return results | {"dq": results["dq"] * (2 if backend == "triton" else 1)}

    monkeypatch.setattr(trial.testing, "run", doubled)
    said = trial.check(Case("", 1, 1, 1, 20, 20, 16), "dq", Config(16, 16, 4, 1), CPU)
    assert said.startswith("dq: error ") and ";" not in said


@pytest.mark.parametrize("kernel", SMALL)
def test_only_the_kernel_in_question_is_launched_again(kernel, launched):
    (job,) = trial.jobs([SMALL[kernel]], (kernel,), CPU)
    changes = trial.forcing(kernel, next(iter(job.configs.values())))
    again = trial.launches(job.case, trial.LAUNCHES[kernel], changes, CPU)
    part = [one for one in launched if one[0] in trial.LAUNCHES[kernel]]
    assert 0 < len(part) < len(launched)
    launched.clear()
    again()
    again()
    assert launched == 2 * part


def test_times_are_medians_of_turns(monkeypatch):
    """A fake GPU: each launch takes its time, clearing the cache ten, and every seventh launch stumbles."""
    now, order = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    def launches(case, names, changes, device):
        config = changes["dq"]

        def launch():
            order.append(config)
            now[0] += config.BLOCK_M * (100 if len(order) % 7 == 0 else 1)

        return launch

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(trial, "launches", launches)
    monkeypatch.setattr(trial, "CLEARED", 16)
    first, second = Config(2, 2, 2, 2), Config(1, 1, 1, 1)
    assert trial.cuda_times(Case(""), "dq", [first, second], CPU) == [2, 1]
    assert order[::2] == [first] * (len(order) // 2) and len(order) >= 2 * 10


def test_the_present_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 1")
    found = Machine.present()
    assert (found.gpu, str(found.device), found.torch) == ("NVIDIA Test 1", "cuda:0", torch.__version__)
    assert tuple(map(int, found.triton.split(".")[:2])) == tables._triton()
    monkeypatch.setattr(trial.metadata, "packages_distributions", dict)
    with pytest.raises(ValueError, match="tune needs Triton, which is not installed"):
        Machine.present()
