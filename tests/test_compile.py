"""What the compiler makes of the kernels, without a GPU: spills, shared memory, tensor cores, loads; and the reports.

The rest of the tests binds kernels to Triton's interpreter, so these compile in processes of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import crossattn_kernels
from crossattn_kernels import cli
from crossattn_kernels.aot import Call, Row, calls, choose, sweep, workers
from crossattn_kernels.aot.machine_code import Figures
from crossattn_kernels.aot.products import cycles
from crossattn_kernels.aot.report import SCHEMA
from crossattn_kernels.kernels.launch import CONFIGS
from crossattn_kernels.problem import Problem, canonical
from crossattn_kernels.tuning import CHIPS, Config, assumed, plan, tables

ROOT = Path(crossattn_kernels.__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
ARCHS = ("sm_80", "sm_90", "sm_100")
TENSOR = ("forward_kernel", "dq_kernel", "dkv_kernel", "short_queries_kernel", "bias_grad_kernel")
COMPILED = [("two-pass", kind) for kind in ("plain", "ranges")] + [("short keys", "plain"), ("short queries", "plain")]

COMPILE = """
import json, sys
from crossattn_kernels.aot import Call, compile_named
from crossattn_kernels.aot.report import records
for call in json.loads(sys.argv[2]):
    call = Call(*call)
    for row in records(call, compile_named(sys.argv[1], call)):
        print(json.dumps(row), flush=True)
"""


def without_interpreter(*command, status=0):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-2000:]
    return done.stdout if status == 0 else done.stderr


def compiled(arch, *named):
    """A dict a kernel, without those fields that are 0."""
    return [json.loads(line) for line in without_interpreter("-c", COMPILE, arch, json.dumps(named)).splitlines()]


def report(arch):
    return json.loads((RESULTS / f"compile-{arch}.json").read_text())


def name(row):
    return f"{row['kernel']} of {Call(*(row[field] for field in Call._fields))}"


def _today(found):
    return found["triton"].split(".")[:2] == tables.metadata.version("triton").split(".")[:2]


# ---- compiled here ----


@pytest.mark.parametrize("D", [64, 72, 128, 256])
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_keep_to_registers_and_use_the_tensor_cores(arch, D):
    reported = set(sweep())
    named = [call for shape, kind in COMPILED if (call := Call(shape, "bf16", D, kind)) in reported]
    rows = compiled(arch, *named)
    assert {row["kernel"] for row in rows} >= {"forward_kernel", "dq_kernel", "dkv_kernel", "delta_kernel"}
    for row in rows:
        check(arch, row)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_call_with_dropout_keeps_to_registers(arch):
    for row in compiled(arch, Call("two-pass", "bf16", 64, "dropout")):
        check(arch, row)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_call_with_every_option_keeps_to_registers(arch):
    for row in compiled(arch, Call("two-pass", "bf16", 64, "everything")):
        check(arch, row)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_the_last_tile_of_keys_does_not_serialise_the_products_of_the_others(D):
    rows = {row["kernel"]: row for row in compiled("sm_90", Call("ragged", "bf16", D, "plain"))}
    check("sm_90", rows["forward_kernel"])
    check("sm_90", rows["dq_kernel"])


def test_the_kernels_compile_for_amd():
    rows = compiled("gfx942", Call("two-pass", "bf16", 64, "plain"), Call("packed decode", "bf16", 128, "plain"))
    for row in rows:
        assert row["stack"] == 0 and row["shared"] <= CHIPS["gfx942"].shared, row
        assert row.get("mfma") or row["kernel"] not in TENSOR, row


def check(arch, row):
    """What holds for every kernel of aligned tensors."""
    config = Config(**row["config"])
    assert not row["stack"] and not row.get("spill_loads") and not row.get("spill_stores"), f"{name(row)} spills: {row}"
    assert row["shared"] <= CHIPS[arch].shared, row
    assert not row.get("narrow_loads") or row["kind"] == "everything", row
    if row["kernel"] not in TENSOR:
        return
    queries_down = row["kernel"] in ("forward_kernel", "dq_kernel", "bias_grad_kernel")
    tall = (config.BLOCK_M if queries_down else config.BLOCK_N) >= 64
    if arch == "sm_80" or not tall:
        assert row["hmma"], row
    elif arch == "sm_90":
        assert row["hgmma"] and not row.get("hmma"), row
        assert row["waits"] <= row["hgmma"] / 2, f"ptxas serialised the products: {row}"
        assert not row.get("overwritten"), f"ptxas overwrites what a product reads: {row}"
    elif arch == "sm_100":
        assert row["utchmma"] and not row.get("hmma"), row
    plain = ("two-pass", "ragged") if row["D"] <= 128 else ("two-pass",)
    if arch == "sm_90" and (row["kernel"], row["kind"]) == ("forward_kernel", "plain") and row["shape"] in plain:
        # up to D = 64 two programs share a multiprocessor, so that one multiplies while the other takes exponentials
        least, programs = (0.7, 2) if row["D"] <= 64 else (0.8, 1)
        assert row.get("overlapped", 0) >= least and row["programs"] == programs, row


# ---- reports ----


@pytest.mark.parametrize("arch", ARCHS)
def test_the_report_covers_the_sweep_and_the_plans_of_today(arch):
    found = report(arch)
    assert (found["schema"], found["arch"]) == (SCHEMA, arch)
    rows = {}
    for row in found["rows"]:
        rows.setdefault(Call(*(row[field] for field in Call._fields)), []).append(row)
    assert list(rows) == list(sweep())
    if not _today(found):
        pytest.skip(f"reported for Triton {found['triton']}")
    for call, of_call in rows.items():
        shape, (q, k, v), rest = calls.arguments(call)
        with assumed(arch):
            chosen = plan(Problem.of(*canonical(q, k, v, **rest)))
        assert "forward_kernel" in [row["kernel"] for row in of_call]
        for row in of_call:
            assert Config(**row["config"]) == getattr(chosen, CONFIGS[row["kernel"]]), name(row)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_report_has_no_spills(arch):
    rows = report(arch)["rows"]
    assert all(row["shared"] <= CHIPS[arch].shared for row in rows)
    assert all(row["waits"] <= row["hgmma"] / 2 for row in rows if row.get("hgmma")), "serialised products"
    spilled = [row for row in rows if row["stack"]]
    most = {name(row): max(r["stack"] for r in spilled if name(r) == name(row)) for row in spilled}
    assert most == SPILLS[arch]


@pytest.mark.parametrize("kernel", ["forward_kernel", "dq_kernel", "dkv_kernel"])
def test_four_probabilities_share_a_draw_of_dropout(kernel):
    """A draw for each of 128 x 128 would be 512 a lane; 10 rounds have 4 products or more each, on 4 schedulers."""
    found = {row["kind"]: row for row in report("sm_90")["rows"] if (row["kernel"], row["D"]) == (kernel, 64)
             and (row["shape"], row["dtype"]) == ("two-pass", "bf16")}  # fmt: skip
    assert found["dropout"]["issue_cycles"] - found["plain"]["issue_cycles"] < 128 * 128 / 32 * 10 * 4 / 4


# bytes a thread; docs/schedules.md says why
SPILLS = {
    "sm_80": {
        "forward_kernel of two-pass bf16 D128 channel gate": 24,
        "forward_kernel of short keys bf16 D128 channel gate": 32,
        "dq_kernel of short queries bf16 D128 blocks": 8,
    },
    "sm_90": {
        "dkv_kernel of two-pass bf16 D128 blocks": 8,
        "dkv_kernel of ragged bf16 D128 ranges": 16,
        "dkv_kernel of short keys bf16 D128 blocks": 8,
        "dkv_kernel of short keys bf16 D128 ranges, gate": 8,
        "dkv_kernel of short keys bf16 D128 ranges, softcap": 80,
        "dkv_kernel of short keys bf16 D128 keys, bias, dropout": 16,
        "forward_kernel of fewer keys bf16 D128 everything": 16,
        "dkv_kernel of short queries bf16 D128 blocks": 8,
        "dq_kernel of short queries bf16 D128 bits": 8,
        "forward_kernel of two-pass bf16 D256 everything": 24,
        "dq_kernel of short keys bf16 D256 keys": 16,
        "dkv_kernel of short queries bf16 D256 bits": 8,
        "dkv_kernel of short queries bf16 D256 bits, ranges": 16,
        "forward_kernel of short queries bf16 D256 everything": 24,
        "forward_kernel of split bf16 D256 everything": 8,
    },
    "sm_100": {
        "dq_kernel of short queries bf16 D128 keys, bias": 8,
        "forward_kernel of two-pass bf16 D256 dropout": 8,
        "dkv_kernel of short queries bf16 D256 bits": 16,
        "forward_kernel of short queries bf16 D256 everything": 48,
        "dq_kernel of split bf16 D256 blocks": 8,
        "forward_kernel of split bf16 D256 everything": 40,
        "forward_kernel of packed decode bf16 D256 everything": 24,
        "dq_kernel of two-pass bf16 D72 bits": 16,
        "dkv_kernel of two-pass bf16 D160 bits": 8,
        "forward_kernel of two-pass fp32 D128 plain": 24,
    },
}


# ---- the choice of tiles ----


DKV = ("half", 128, "dkv", "plain")


def costs(key, found):
    return [cycles(key[2], c, key[1], True) * (choose.ONE_STAGE if c.num_stages == 1 else 1) for c in found]


def test_candidates_come_in_the_order_of_what_their_products_cost():
    found = choose.candidates(DKV, Config(32, 64, 8, 2), "sm_90")
    assert costs(DKV, found) == sorted(costs(DKV, found)) and Config(32, 64, 8, 2) not in found
    assert {c.BLOCK_M for c in found} == {c.BLOCK_N for c in found} == {16, 32, 64, 128}
    assert found.index(Config(32, 128, 8, 2)) < found.index(Config(64, 128, 8, 1)) < found.index(Config(16, 64, 8, 3))


def test_a_good_tile_is_given_up_for_faster_products_only():
    found = choose.candidates(DKV, Config(32, 128, 8, 2), "sm_90", good=True)
    assert found[0] == Config(128, 128, 8, 3) and Config(64, 128, 8, 2) in found and Config(32, 128, 8, 3) not in found
    assert max(costs(DKV, found)) <= choose.GAIN * cycles("dkv", Config(32, 128, 8, 2), 128, True)


def test_in_fp32_candidates_are_large_tiles_first_and_a_good_one_stays():
    key = ("full", 64, "dq", "plain")
    found = choose.candidates(key, Config(32, 32, 8, 2), "sm_90")
    assert found[0][:2] == (128, 128) and found[-1] == Config(16, 16, 4, 1)
    assert choose.candidates(key, Config(32, 32, 8, 2), "sm_90", good=True) == []


@pytest.mark.parametrize(("kernel", "field"), [("short_keys", "BLOCK_N"), ("short_queries", "BLOCK_M")])
def test_candidates_first_serve_calls_as_long_as_now(kernel, field):
    key = ("half", 64, kernel, "plain")
    served = [getattr(c, field) for c in choose.candidates(key, Config(64, 64, 8, 2), "sm_90")]
    assert served == sorted(served, reverse=True) and served[0] == 64
    kept = choose.candidates(key, Config(64, 64, 8, 2), "sm_90", good=True)
    assert {getattr(c, field) for c in kept} <= {64}


@pytest.mark.parametrize(
    ("field", "value"), [("stack", 8), ("shared", 232_449), ("waits", 13), ("overwritten", 1), ("registers", 255)]
)
def test_a_tile_is_good_if_it_spills_nothing_fits_and_overlaps_its_products(field, value):
    figures = Figures(**dict.fromkeys(Figures._fields, 0) | dict(hgmma=24, waits=6, shared=232_448, programs=None))
    row = Row("dq_kernel", "two-pass", Config(128, 64, 8, 2), figures._replace(**{field: value}), 0.0)
    assert choose.good(row, CHIPS["sm_90"]) == (field == "registers")


CHOOSE = """
import sys
from pathlib import Path
from crossattn_kernels.aot import choose
from crossattn_kernels.tuning import tables
tables.FOLDER = Path(sys.argv[1])  # in the worker too
if __name__ == "__main__":
    entry = dict(triton="3.0", dtype="half", D=64, kernel="dq", kind="plain", source="test")
    tiles = dict(BLOCK_M=128, BLOCK_N=128, num_warps=4, num_stages=1)
    tables.save(tables.FOLDER / "sm_90.json", "sm_90", [entry | tiles])
    sys.exit(choose.run("sm_90", "two-pass bf16 D64 plain", False))
"""


def test_tiles_that_spill_are_replaced(tmp_path):
    script = tmp_path / "choose.py"
    script.write_text(CHOOSE)
    said = without_interpreter(str(script), str(tmp_path))
    old, *chosen = json.loads((tmp_path / "sm_90.json").read_text())["entries"]
    new = {entry["kernel"]: entry for entry in chosen}
    spilling, faster = sorted(said.splitlines(), reverse=True)
    assert spilling.startswith("half 64 dq plain (") and spilling.endswith("for two-pass bf16 D64 plain")
    assert faster.startswith("half 64 dkv plain (") and faster.endswith("for faster products")  # than the rule's tile
    assert old["triton"] == "3.0" and new.keys() == {"dq", "dkv"}
    assert new["dq"]["triton"] == ".".join(tables.metadata.version("triton").split(".")[:2])
    assert new["dq"]["BLOCK_M"] * new["dq"]["BLOCK_N"] >= 128 * 32


# ---- the command ----


def test_an_unknown_architecture_is_refused_in_one_sentence():
    said = without_interpreter("-m", "crossattn_kernels", "compile", "--arch", "sm_91", status=2)
    assert said == "arch must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_91'\n"


def test_the_interpreter_is_refused(capsys):
    assert cli.main(["compile"]) == 2
    assert "unset it" in capsys.readouterr().err


def test_without_triton_it_is_refused_in_one_sentence(monkeypatch, capsys):
    for module in [m for m in sys.modules if m.startswith("crossattn_kernels.aot")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delattr(crossattn_kernels, "aot", raising=False)
    assert cli.main(["compile"]) == 2
    assert capsys.readouterr().err == "compilation needs triton: pip install '.[triton]' in the checkout\n"


def test_the_command_prints_a_table_or_json():
    command = ("-m", "crossattn_kernels", "compile", "--arch", "sm_90", "-k", "packed decode bf16 D64 plain")
    heading, *lines = without_interpreter(*command).splitlines()
    assert heading.startswith("kernel ") and [line.split()[0] for line in lines] == ["forward_kernel", "merge_kernel"]
    once, again = (without_interpreter(*command, "--json", "--jobs", jobs) for jobs in ("1", "2"))
    assert once == again and [row["kernel"] for row in json.loads(once)["rows"]] == ["forward_kernel", "merge_kernel"]


DEAD = """
import os
from crossattn_kernels import aot
from crossattn_kernels.aot import workers
if __name__ == "__main__":
    calls = [aot.Call("packed decode", "bf16", 64, kind) for kind in ("plain", "no such kind", "plain")]
    first, second, third = workers.compile_all("sm_90", calls)
    assert first[0].figures == third[0].figures, (first, third)
    assert second == workers.Failure("no kernel", "KeyError: 'no such kind'"), second
    worker = workers.Worker("sm_90")
    worker.process.kill()
    died = worker.compile(calls[0])
    assert died.reason == "the compiler died with exit code -9", died
    assert worker.compile(calls[0])[0].kernel == "forward_kernel"
    worker.stop()
"""


def test_a_compiler_that_dies_is_a_row_and_the_sweep_goes_on(tmp_path):
    script = tmp_path / "dead.py"
    script.write_text(DEAD)
    without_interpreter(str(script))


def test_the_model_of_products_is_what_the_machine_code_does():
    found = {}
    for row in report("sm_90")["rows"]:
        if (row["kind"], row["dtype"]) == ("plain", "bf16") and row["D"] in calls.PADDED and row.get("hgmma"):
            kernel = row["kernel"].removesuffix("_kernel")
            kernel = "short_keys" if (kernel, row["schedule"]) == ("dkv", "short keys") else kernel
            key = row["shape"], kernel, row["D"], Config(**row["config"])
            found[key] = found.get(key, 0) + row["product_cycles"]  # dk and dv apart are two rows
    assert {key[1] for key in found} == {"forward", "dq", "dkv", "short_keys", "short_queries"}
    for (shape, kernel, D, config), counted in found.items():
        assert counted == round(cycles(kernel, config, D, True)), (shape, kernel, D, config)


def test_dk_and_dv_are_apart_above_128():
    rows = [row for row in report("sm_90")["rows"] if row["shape"] == "two-pass" and row["kernel"] == "dkv_kernel"]
    plain = [row["D"] for row in rows if (row["dtype"], row["kind"]) == ("bf16", "plain")]
    assert {D: plain.count(D) for D in plain} == {D: 2 if D > 128 else 1 for D in (*calls.PADDED, *calls.OTHERS)}


@pytest.mark.parametrize("arch", ARCHS)
def test_the_report_has_no_product_whose_operand_is_overwritten(arch):
    assert not [name(row) for row in report(arch)["rows"] if row.get("overwritten")]


def test_dead_workers_are_named():
    assert workers.Failure("dq_kernel", "died")._fields == ("kernel", "reason")


def test_named_calls_reach_every_schedule():
    with assumed("sm_90"):
        plans = {}
        for call in sweep():
            if call.dtype == "bf16" and call.kind == "plain":
                _, (q, k, v), rest = calls.arguments(call)
                plans[call.shape, call.D] = plan(Problem.of(*canonical(q, k, v, **rest)))
    for D in calls.PADDED:
        schedules = {(p.forward_schedule, p.backward_schedule) for (_, d), p in plans.items() if d == D}
        assert schedules >= {("stream", "two-pass"), ("stream", "short queries"), ("split", "short queries")}
        assert ("stream", "short keys") in schedules or D == 256  # whose tile holds 32 keys
        assert plans["packed decode", D].forward.packed and not plans["split", D].forward.packed
        assert plans["split", D].forward.splits > 1
    assert any(p.dkv.splits > 1 and p.backward_schedule == "two-pass" for p in plans.values())
    assert torch.bfloat16 in calls.DTYPES.values()
