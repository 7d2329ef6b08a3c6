"""Tables of configurations: which entry serves a call, and what happens where there is none or the file is damaged."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from crossattn_kernels import tuning
from crossattn_kernels.aot import products
from crossattn_kernels.masks import Mask
from crossattn_kernels.problem import Problem, canonical
from crossattn_kernels.tuning import CHIPS, Chip, Config, rules, tables

HALF = Problem(2, 8, 4, 4096, 4096, 72, 80, torch.bfloat16, torch.device("meta"))
FULL = HALF._replace(dtype=torch.float32)
H200 = CHIPS["sm_90"]


def entry(BLOCK_M, triton="3.7", **changes):
    given = dict(triton=triton, dtype="half", D=128, kernel="dq", kind="plain") | changes
    return given | dict(BLOCK_M=BLOCK_M, BLOCK_N=32, num_warps=4, num_stages=1, source="test")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tables are looked for here, by Triton 3.7."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr(tables, "_triton", lambda: (3, 7))
    caches = tables._read, tables._path_for, tuning._plan
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def test_an_entry_is_found_by_dtype_head_size_kernel_and_kind(folder):
    entries = [entry(16), entry(32, kind="ranges"), entry(64, kind="other"), entry(128, dtype="full")]
    tables.save(folder / "sm_90.json", "sm_90", entries)
    assert tables.lookup(H200, HALF, "dq") == Config(16, 32, 4, 1)
    assert tables.lookup(H200, HALF._replace(masked=True), "dq").BLOCK_M == 32
    assert tables.lookup(H200, HALF._replace(masked=True, plain=False), "dq").BLOCK_M == 64
    assert tables.lookup(H200, FULL, "dq").BLOCK_M == 128
    assert tables.lookup(H200, HALF, "dkv") is None
    assert tables.lookup(H200, HALF._replace(D=129), "dq") is None


@pytest.mark.parametrize(
    "asked, kind",
    [
        (dict(D=128, Dv=128), "plain"),
        (dict(), "padded plain"),
        (dict(masked=True), "padded ranges"),
        (dict(plain=False, extras=1), "other"),
        (dict(plain=False, extras=2), "several"),
        (dict(plain=False, extras=1, pairwise=True), "pairs"),
        (dict(plain=False, extras=2, pairwise=True), "several pairs"),
        (dict(plain=False, extras=1, pairwise=True, scattered=True), "scattered"),
        (dict(plain=False, extras=3, pairwise=True, scattered=True), "several scattered"),
        (dict(plain=False, extras=1, drops=True), "dropout"),
        (dict(plain=False, extras=3, pairwise=True, scattered=True, drops=True), "scattered dropout"),
        (dict(plain=False, extras=4), "many"),
    ],
)
def test_kinds(folder, asked, kind):
    """Each has an entry of its own where the table has one, else that of a coarser kind."""
    problem = HALF._replace(**asked)
    assert tables.kind_of(problem) == kind
    coarser = kind.split()[-1] if problem.plain else "other"
    tables.save(folder / "sm_90.json", "sm_90", [entry(16, kind=coarser)])
    assert tables.lookup(H200, problem, "dq").BLOCK_M == 16
    tables._read.cache_clear()
    tables.save(folder / "sm_90.json", "sm_90", [entry(16, kind=coarser), entry(32, kind=kind, triton="3.6")])
    assert tables.lookup(H200, problem, "dq").BLOCK_M == (16 if kind == coarser else 32)


def test_kinds_of_calls():
    """What is counted, on calls with 64 keys, in whole vectors and tiles, and with 65."""

    def kind(N=64, D=64, **rest):
        q, k = torch.empty(1, 1, 4, D, device="meta"), torch.empty(1, 1, N, D, device="meta")
        return tables.kind_of(Problem.of(*canonical(q, k, k, **rest)))

    def bias(N=64):
        return torch.empty(1, 1, 4, N, device="meta")

    keys = Mask.key_padding(torch.empty(1, 64, dtype=torch.bool, device="meta"))
    blocks = Mask.blocks(torch.empty(1, 1, 1, 1, dtype=torch.bool, device="meta"))
    assert [kind(64), kind(65), kind(64, 72), kind(65, 72)] == [
        "plain", "ragged plain", "padded plain", "ragged padded plain",
    ]  # fmt: skip
    assert kind(mask=keys) == kind(gate=bias()[..., :1]) == kind(softcap=3.0) == "other"
    assert kind(bias=bias()) == "pairs" and kind(65, bias=bias(65)) == kind(mask=blocks) == "scattered"
    assert kind(mask=keys, bias=bias()) == "several pairs" and kind(softcap=3.0, empty_rows="uniform") == "several"
    assert kind(dropout_p=0.1) == kind(dropout_p=0.1, bias=bias(), mask=keys) == "dropout"
    assert kind(dropout_p=0.1, bias=bias(), mask=keys, softcap=3.0) == "many"


def test_supposed_entries_stand_in_for_those_of_tables(folder):
    tables.save(folder / "sm_90.json", "sm_90", [entry(16)])
    key, supposed = tables.key_of(HALF, "dq"), Config(64, 64, 8, 2)
    assert tuning.plan(HALF).dq == Config(16, 32, 4, 1)
    with tuning.suppose({key: supposed}):
        assert tuning.plan(HALF).dq == supposed and tuning.plan(FULL).dq != supposed
    assert tuning.plan(HALF).dq == Config(16, 32, 4, 1)


@pytest.mark.parametrize(
    "arch, table",
    [("sm_80", 80), ("sm_86", 80), ("sm_89", 80), ("sm_90", 90), ("sm_103", 100), ("sm_75", None)],
)
def test_the_newest_table_that_is_not_newer_than_the_chip(folder, arch, table):
    for n in (80, 90, 100):
        tables.save(folder / f"sm_{n}.json", f"sm_{n}", [entry(n)])
    found = tables.lookup(Chip(arch, 100, 200_000), HALF, "dq")
    assert (found and found.BLOCK_M) == table
    assert tables.lookup(CHIPS["gfx942"], HALF, "dq") is None, "of another vendor"


@pytest.mark.parametrize(
    "versions, chosen", [(["3.7", "3.6"], "3.7"), (["3.6", "3.10", "3.2"], "3.6"), (["3.8"], None)]
)
def test_the_triton_that_is_installed_or_the_newest_before_it(folder, versions, chosen):
    tables.save(folder / "sm_90.json", "sm_90", [entry(int(v[2:]), triton=v) for v in versions])
    found = tables.lookup(H200, HALF, "dq")
    assert (found and found.BLOCK_M) == (chosen and int(chosen[2:]))


def test_what_does_not_fit_the_chip_is_left_to_the_rule(folder):
    tables.save(folder / "sm_100.json", "sm_100", [entry(128)])
    assert tables.lookup(Chip("sm_120", 170, 101_376), HALF, "dq") is not None
    assert tables.lookup(Chip("sm_120", 170, 50_000), HALF, "dq") is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"schema": 1}', '{"schema": 2, "entries": []}', '{"schema": 1, "entries": [{"D": 64}]}', "\udcff"],
)
def test_a_damaged_table_is_left_aside_with_one_warning(folder, text):
    (folder / "sm_90.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=r"sm_90\.json is left aside") as caught:
        for kernel in ("dq", "dkv"):
            assert tables.lookup(H200, HALF, kernel) is None
    assert len(caught) == 1


def test_the_rule_decides_where_tables_are_silent(folder):
    rule = rules.tiles("dq", HALF, H200)
    assert tuning.plan(HALF).dq == rule
    tables.save(folder / "sm_90.json", "sm_90", [entry(rule.BLOCK_M // 2)])
    for cache in (tables._read, tables._path_for, tuning._plan):
        cache.cache_clear()
    assert tuning.plan(HALF).dq == Config(rule.BLOCK_M // 2, 32, 4, 1)
    assert tuning.plan(HALF).dkv == rules.split_queries(rules.tiles("dkv", HALF, H200), HALF, H200)


def test_without_triton_the_rule_decides(folder, monkeypatch):
    tables.save(folder / "sm_90.json", "sm_90", [entry(16)])
    monkeypatch.setattr(tables, "_triton", lambda: None)
    assert tables.lookup(H200, HALF, "dq") is None


def test_the_version_is_known_without_importing_triton(monkeypatch):
    def version(name):
        if name != "pytorch-triton":
            raise tables.metadata.PackageNotFoundError(name)
        return "3.12.0+git1234"

    monkeypatch.setattr(tables.metadata, "version", version)
    assert tables._triton.__wrapped__() == (3, 12)


def test_save_replaces_a_table_whole_or_not_at_all(folder, monkeypatch):
    path = folder / "sm_90.json"
    tables.save(path, "sm_90", [entry(16)])
    before = path.read_text()

    def broken():
        yield entry(32)
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        tables.save(path, "sm_90", broken())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        tables.save(path, "sm_90", [entry(32)])
    assert path.read_text() == before
    assert [p.name for p in folder.iterdir()] == ["sm_90.json"], "nothing temporary is left"


SHIPPED = sorted(tables.FOLDER.glob("*.json"))


def test_tables_are_shipped():
    assert [path.stem for path in SHIPPED] == ["sm_100", "sm_80", "sm_90"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_are_whole(path):
    content = json.loads(path.read_text())
    assert (content["schema"], content["arch"]) == (tables.SCHEMA, path.stem)
    assert all(e["source"] and set(e) == {*entry(1)} for e in content["entries"])
    keys = [tuple(e[name] for name in ("triton", *tables.KEY)) for e in content["entries"]]
    assert len(set(keys)) == len(keys)
    kernels = {"forward", "dq", "dkv", "short_keys", "short_queries"}
    wanted = {("half", D, kernel, kind) for D in (64, 128, 256) for kernel in kernels
              for kind in ("plain", "ranges", "other")}  # fmt: skip
    wanted |= {("half", D, "bias_grad", "other") for D in (64, 128, 256)}
    assert wanted <= {key[1:] for key in keys}


def test_the_page_shows_the_tiles_of_dk_and_dv(monkeypatch):
    """Its table, against that of sm_90 with the Triton of this environment's torch."""
    monkeypatch.setattr(tables, "_triton", lambda: (3, 7))
    page = (Path(__file__).parents[1] / "docs" / "schedules.md").read_text()
    line = r"^\| (\d+) \| ([^|]+) \| (\d+) x (\d+)(?:, narrow)? \| (\d+) \| [\d.]+ \|$"
    rows = re.findall(line, page, re.MULTILINE)
    kinds = ["plain", "ranges", *tables.COARSER]
    kinds = {kind for kind in kinds if "padded" not in kind and "ragged" not in kind} | {"other"}
    shown = {}
    for D in (64, 128, 256):
        named = [kind for d, names, *_ in rows if d == str(D) for kind in names.split(", ")]
        for d, names, m, n, cycles in rows:
            if d == str(D):
                meant = kinds - set(named) if names.startswith("all but") else names.split(", ")
                shown |= {(D, kind): tuple(map(int, (m, n, cycles))) for kind in meant}
    found = {}
    for D, kind in shown:
        monkeypatch.setattr(tables, "kind_of", lambda problem, kind=kind: kind)
        config = tables.lookup(H200, HALF._replace(D=D, Dv=D), "dkv")
        found[D, kind] = config.BLOCK_M, config.BLOCK_N, int(products.cycles("dkv", config, D, True))
    assert shown == found and len(shown) == 3 * len(kinds)
