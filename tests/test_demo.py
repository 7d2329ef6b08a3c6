"""The demo in pieces: what it claims about gates, frozen weights, parity and its picture."""

import io
import subprocess
import sys

import pytest
import torch

from crossattn_kernels import cli

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from rich.console import Console

from crossattn_kernels import demo

CPU = torch.device("cpu")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def captioner():
    torch.manual_seed(0)
    return demo.Captioner(demo.LanguageModel())


@pytest.fixture(scope="module")
def digits():
    return demo.load(CPU)


def test_help_names_the_command_and_its_arguments(capsys):
    for arguments, expected in (["--help"], "demo"), (["demo", "--help"], "--backend"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 0
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["demo", "--steps", "0"], ["demo", "--backend", "unknown"]])
def test_wrong_arguments_exit_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize("missing", cli.DEMO_EXTRA)
def test_missing_extra_is_one_sentence(missing, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    monkeypatch.delitem(sys.modules, "crossattn_kernels.demo")
    monkeypatch.delattr("crossattn_kernels.demo")
    assert cli.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert missing in error and "pip install '.[demo]' in the checkout" in error and error.count("\n") == 1


def test_package_does_not_import_the_demo():
    code = "import sys, crossattn_kernels; sys.exit('crossattn_kernels.demo' in sys.modules or 'rich' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["demo", "demo.txt", "missing/demo.png", "."])
def test_a_picture_that_cannot_be_written_is_refused_before_training(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda *args: pytest.fail("it trains"))
    assert cli.main(["demo", "--out", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("--out must ") and error.count("\n") == 1


def test_backend_that_cannot_run_here_exits_2(monkeypatch, capsys):
    def refuse(*args):
        raise NotImplementedError("no GPU")

    monkeypatch.setattr(demo, "run", refuse)
    assert cli.main(["demo", "--backend", "triton"]) == 2
    assert capsys.readouterr().err == "no GPU\n"


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_parity_table(backend, console):
    table, agrees = demo.parity_table(CPU, backend)
    assert agrees and table.row_count == 6
    console.print(demo.machine_table(CPU, backend), table)
    assert "NO" not in console.file.getvalue()


def test_failing_parity_stops_before_training(monkeypatch, tmp_path):
    class Row:
        name, error, budget, ok = "dq", 1.0, 0.1, False

    monkeypatch.setattr(demo, "check", lambda *_: [Row])
    monkeypatch.setattr(demo, "load", pytest.fail)
    assert demo.run("torch", 1, 0, tmp_path / "demo.png") == 1


def test_gates_at_zero_leave_the_language_model_as_it_is(captioner, digits):
    tokens = demo.tokenize(demo.NAMES, CPU)[:, :-1]
    patches = captioner.encode(digits[1].images[:10])
    assert captioner.openings() == [0.0] * 4
    assert torch.equal(captioner(tokens, patches), captioner.language_model(tokens))
    captioner.gates()[0].data.fill_(0.1)
    assert not torch.equal(captioner(tokens, patches), captioner.language_model(tokens))


def test_training_opens_the_gates_and_keeps_the_language_model(captioner, digits, console):
    before = {name: p.clone() for name, p in captioner.named_parameters()}
    openings = demo.train_captioner(captioner, digits[0], 3, console)
    assert openings[0] == [0.0] * 4 and len(openings) == 4 and all(openings[-1])
    for name, p in captioner.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("language_model."), name
    console.print(demo.gate_table(openings))


def test_language_model_learns_to_spell(console):
    torch.manual_seed(0)
    model = demo.LanguageModel()
    demo.train_language_model(model, 100, console)
    assert set(demo.caption(demo.Captioner(model), torch.zeros(1, demo.SIDE, demo.SIDE))) < set(demo.NAMES)


def test_reading_maps_are_the_softmax_weights(captioner, digits):
    images, weights = digits[1].images[:3], []
    maps = demo.reading_maps(captioner, images, ["one", "two", "three"])
    assert maps.shape == (3, demo.CONTEXT, demo.GRID, demo.GRID)
    torch.testing.assert_close(maps.sum((-1, -2)), torch.ones(3, demo.CONTEXT))
    reader, patches = captioner.readers[0], captioner.encode(images)
    x = captioner.language_model.embed(demo.tokenize(["six"] * 3, CPU)[:, :-1])
    reader(x, patches, weights)
    q, k = (demo.split_heads(t, reader.heads) for t in (reader.to_q(reader.norm(x)), reader.to_k(patches)))
    torch.testing.assert_close(weights[0], torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1))


def test_pictures_and_tables_take_wrong_and_empty_names(digits, tmp_path, console):
    images, names = digits[1].images[:3], ["", "onezzz", "two"]
    maps = torch.full((3, demo.CONTEXT, demo.GRID, demo.GRID), demo.GRID**-2.0)
    demo.draw(images, demo.NAMES[:3], names, maps, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    console.print(demo.caption_table(images, demo.NAMES[:3], names, names))
    assert demo.accuracy(names, demo.NAMES[:3]) == pytest.approx(1 / 3)


def test_a_short_run_writes_its_picture_and_misses_the_accuracy(tmp_path, capsys):
    path = tmp_path / "demo.png"
    assert cli.main(["demo", "--backend", "torch", "--steps", "2", "--out", str(path)]) == 1
    assert path.exists()
    assert "unchanged" in capsys.readouterr().out
