"""The command line and the scripts of the Makefile: what they say of themselves, and one sentence for what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

import crossattn_kernels
from crossattn_kernels import cli

ROOT = Path(crossattn_kernels.__file__).parents[1]


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_version(capsys):
    assert said(capsys, "--version") == f"crossattn_kernels {crossattn_kernels.__version__}"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo", "Check parity on this machine, then teach a frozen"),
        ("compile", "Compile the kernels for a GPU that need not be here"),
        ("compile", "'short keys bf16 D64 plain'"),
    ],
)
def test_help(command, words, capsys):
    assert words in said(capsys, command, "--help")


@pytest.mark.parametrize("more", [[], ["--every"], ["--json"], ["--choose"]], ids=" ".join)
def test_calls_that_do_not_exist_are_refused(more, capsys):
    pytest.importorskip("triton")
    assert cli.main(["compile", "-k", "nosuchcall", *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("no call has 'nosuchcall' in its name; names are like 'two-pass bf16 D64 plain', '")
    assert error.count("\n") == 1


@pytest.mark.parametrize("where", ["absent/demo.png", "file/demo.png", "."])
def test_the_picture_needs_a_folder_before_anything_is_trained(where, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setitem(sys.modules, "crossattn_kernels.demo", None)  # importing it would fail
    assert cli.main(["demo", "--out", str(tmp_path / where)]) == 2
    assert capsys.readouterr().err == f"--out must be a file in a folder that exists, got {tmp_path / where}\n"


@pytest.mark.parametrize(
    ("script", "missing"), [("tests.gpu", "torch"), ("tests.gpu", "triton"), ("bench.run", "torch")]
)
def test_scripts_for_a_gpu_say_what_is_missing(script, missing):
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; runpy.run_module({script!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith(f"{sys.executable}, has no {missing}\n")
    assert done.stderr.count("\n") == 1
