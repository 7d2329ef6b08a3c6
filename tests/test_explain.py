"""`explain`: which backend and schedule, every reason, the arguments of the call, and that it says what happens."""

import os
import subprocess
import sys
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crossattn_kernels import Mask, cross_attention, explain, functional
from crossattn_kernels.tiled import flash, loop

ROOT = str(Path(functional.__file__).parents[1])
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(name == "triton" and not find_spec("triton"), reason="no triton"))
    for name in functional.BACKENDS
]
B, HQ, HK, M, N, D, DV = 2, 2, 1, 5, 7, 16, 8
FLASH = "PyTorch's CPU flash kernel"


def qkv(n: int = N, dv: int = DV, **to) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = dict(q=(B, HQ, M, D), k=(B, HK, n, D), v=(B, HK, n, dv))
    return {name: torch.randn(shape, generator=g).to(**to) for name, shape in shapes.items()}


def test_explain_on_the_cpu():
    pytest.importorskip("triton")
    said = explain(**qkv())
    assert said.backend == "torch" and said.schedule == f"tiles, as {FLASH} does not do D and Dv that differ"
    assert list(said.reasons) == ["triton", "reference"]
    assert said.reasons["triton"] == ("it would run in Triton's interpreter, which is for tests",)
    assert said.reasons["reference"] == ("it is the definition, not an implementation",)
    assert str(said).splitlines() == [
        f"backend: torch, schedule: {said.schedule}",
        "not triton: it would run in Triton's interpreter, which is for tests",
        "not reference: it is the definition, not an implementation",
    ]


def test_explain_lists_every_reason():
    pytest.importorskip("triton")
    q = torch.zeros(1, 1, 1, 300, dtype=torch.float64, device="meta")
    reasons = explain(q, q, q).reasons["triton"]
    assert len(reasons) == 3
    for words, reason in zip(("on meta", "float64", "D = 300 and Dv = 300"), reasons):
        assert words in reason


def test_explain_without_the_interpreter():
    pytest.importorskip("triton")
    script = "import torch, crossattn_kernels as c; q = torch.zeros(1, 1, 1, 1); print(c.explain(q, q, q))"
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "not triton: the tensors are on cpu, not on a GPU\n" in done.stdout


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_explain_without_triton(monkeypatch, backend):
    monkeypatch.setattr(functional, "HAS_TRITON", False)
    said = explain(**qkv(), backend=backend)
    assert said.backend == (backend or "torch")
    assert said.reasons["triton"] == ("triton is not installed",)
    for door in (cross_attention, explain):
        with pytest.raises(NotImplementedError, match="backend='triton' cannot serve .*: triton is not installed"):
            door(**qkv(), backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_explain_an_explicit_backend(backend):
    said = explain(**qkv(), backend=backend)
    assert said.backend == backend
    others = [name for name in functional.BACKENDS if name != backend]
    assert said.reasons == dict.fromkeys(others, (f"backend={backend!r} was asked for",))


def test_explain_on_a_gpu(monkeypatch):
    """A meta tensor is not on the CPU either; the kernels are told to have no objection."""
    monkeypatch.setattr(functional, "unsupported", lambda kind, backend: ())
    said = explain(**qkv(device="meta"))
    assert said.backend == "triton" and said.schedule == "forward stream, backward short keys"
    assert said.reasons["torch"] == ("the Triton kernels can serve this call",)


def test_explain_takes_every_argument_and_computes_nothing(monkeypatch):
    def forbidden(*args):
        raise AssertionError("explain computed something")

    monkeypatch.setattr(functional, "attend", forbidden)
    options = dict(
        mask=torch.ones(M, N, dtype=torch.bool),
        bias=torch.randn(M, N),
        gate=torch.randn(HQ),
        scale=torch.randn(HQ),
        softcap=2.0,
    )
    options |= dict(dropout_p=0.1, generator=torch.Generator(), empty_rows="uniform", return_lse=True)
    state = torch.get_rng_state()
    assert explain(**qkv(), **options).backend == "torch"
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match=r"^explain\(\) got an unexpected keyword argument 'dropout'"):
        explain(**qkv(), dropout=0.1)
    door, said = (signature(f).parameters for f in (cross_attention, explain))
    assert {n: p.default for n, p in door.items()} == {n: p.default for n, p in said.items()}


def test_explain_says_what_the_call_does(monkeypatch):
    attend, chosen = functional.attend, []
    monkeypatch.setattr(
        functional, "attend", lambda x, options, backend: chosen.append(backend) or attend(x, options, backend)
    )
    for dtype in (torch.float32, torch.float64):
        cross_attention(**qkv(dtype=dtype))
        assert chosen.pop() == explain(**qkv(dtype=dtype)).backend


LEFT_OPEN = f"{FLASH} where it can, else tiles"
# what was asked for: (arguments, schedule)
ON_THE_CPU = {
    "nothing": ({}, FLASH),
    "few keys": (dict(n=15), f"forward {FLASH}, backward tiles, as N < 16"),
    "no keys": (dict(n=0), f"tiles, as {FLASH} does not do calls without keys"),
    "gate": (dict(gate=torch.ones(HQ)), FLASH),
    "Dv": (dict(dv=DV), f"tiles, as {FLASH} does not do D and Dv that differ"),
    "scale": (dict(scale=torch.ones(HQ)), f"tiles, as {FLASH} does not do a tensor as scale"),
    "softcap": (dict(softcap=2.0), f"tiles, as {FLASH} does not do softcap"),
    "both": (dict(softcap=2.0, dropout_p=0.1), f"tiles, as {FLASH} does not do softcap and dropout"),
    "lengths": (dict(mask=Mask.lengths(torch.tensor([20, 17]))), LEFT_OPEN),
    "padding": (dict(mask=Mask.key_padding(torch.arange(40).view(2, 20) % 7 > 0)), LEFT_OPEN),
    "bias": (dict(bias=torch.zeros(M, 20)), LEFT_OPEN),
    "learnt bias": (
        dict(bias=torch.zeros(M, 20, requires_grad=True)),
        f"forward {LEFT_OPEN}, backward tiles, as the bias wants a gradient",
    ),
}


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_explain_knows_who_computes_on_the_cpu(name, monkeypatch):
    """Of calls whose values are all finite, so that what the arguments leave open is the flash kernel's."""
    arguments, schedule = ON_THE_CPU[name]
    sizes = dict(n=20, dv=D) | {n: x for n, x in arguments.items() if n in ("n", "dv")}
    call = {n: x for n, x in arguments.items() if n not in sizes}
    tensors = {n: t.requires_grad_() for n, t in qkv(**sizes).items()}
    assert explain(**tensors, **call).schedule == schedule

    seen = []
    for engine in (flash, loop):
        for step in ("forward", "backward"):
            who, original = (engine, step), getattr(engine, step)
            monkeypatch.setattr(engine, step, lambda *a, f=original, who=who: seen.append(who) or f(*a))
    cross_attention(**tensors, **call).sum().backward()
    tiles = schedule.startswith("tiles"), "backward tiles" in schedule or schedule.startswith("tiles")
    assert set(seen) == {(loop if by_tiles else flash, step) for by_tiles, step in zip(tiles, ("forward", "backward"))}
