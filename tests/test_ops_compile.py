"""The border with PyTorch: torch.compile and torch.export."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from crossattn_kernels import Mask, cross_attention, tiled
from crossattn_kernels.problem import Problem
from crossattn_kernels.testing import draw
from tests.border import (
    EVERYTHING,
    SMALL,
    Reader,
    attend,
    backends,
    cases,
    close,
    compiled,
    leaves,
    reader_arguments,
    results,
    same,
)

forward = torch.ops.crossattn.forward


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


# ---- torch.compile ----


@pytest.mark.parametrize("backend, dynamic", [("torch", False), ("torch", True), ("triton", True)])
def test_compile(dynamic, backend):
    tensors = list(leaves(EVERYTHING).values())
    f = attend(EVERYTHING, backend)
    same(results(compiled(f, dynamic), tensors), results(f, tensors))


@cases
def test_compile_cases(case):
    tensors, f = list(leaves(case).values()), attend(case, "torch")
    same(results(compiled(f, dynamic=case.N == 0), tensors), results(f, tensors))


def test_compile_once_for_all_sizes():
    torch._dynamo.config.error_on_recompile, before = True, torch._dynamo.config.error_on_recompile
    try:
        f = compiled(partial(cross_attention, backend="torch"), dynamic=True)
        for B, M, N in ((3, 5, 7), (4, 6, 9), (5, 130, 1300)):
            tensors = leaves(replace(SMALL, B=B, Hk=2, M=M, N=N)).values()
            same(results(f, tensors), results(partial(cross_attention, backend="torch"), tensors))
    finally:
        torch._dynamo.config.error_on_recompile = before


def test_what_schedules_look_at_is_not_traced(monkeypatch):
    """torch 2.11 cannot add the symbolic bools that sizes of unknown value make of a `Problem`."""
    monkeypatch.setattr(Problem, "of", lambda *_: pytest.fail("traced"))
    tensors, f = list(leaves(EVERYTHING).values()), attend(EVERYTHING, "torch")
    results(compiled(f, dynamic=True), tensors)


@backends
def test_compile_with_a_mask_built_inside(backend):
    def f(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
        mask = Mask.lengths(lengths) & Mask.causal(q.shape[2], k.shape[2]) & Mask.key_padding(keep)
        return cross_attention(q, k, v, mask, empty_rows="uniform", backend=backend)

    tensors = (*leaves(SMALL).values(), torch.tensor([6, 0]), torch.rand(2, 7) < 0.8)
    same(results(compiled(f, dynamic=backend == "torch"), tensors), results(f, tensors))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_with_a_mask_passed_in(dynamic):
    """One graph serves other masks of the same kind."""
    f = compiled(partial(cross_attention, backend="torch"), dynamic)
    tensors = leaves(SMALL).values()
    for seed in range(3):
        mask = draw(replace(SMALL, mask="all fields"), seed=seed).mask
        same(
            results(lambda *t, mask=mask: f(*t, mask), tensors),
            results(lambda *t, mask=mask: cross_attention(*t, mask, backend="torch"), tensors),
        )


@pytest.mark.parametrize("side, dynamic", [("q", False), ("kv", True)])
def test_compile_with_a_stride_0_batch(side, dynamic):
    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t[:1].expand(3, -1, -1, -1) if n in side else t for n, t in zip("qkv", (q, k, v)))
        return cross_attention(q, k, v, backend="torch")

    tensors = leaves(replace(SMALL, B=3)).values()
    same(results(compiled(inside, dynamic), tensors), results(inside, tensors))
    graph = compiled(partial(cross_attention, backend="torch"), dynamic)

    def outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return graph(*(t[:1].expand(3, -1, -1, -1) if n in side else t for n, t in zip("qkv", (q, k, v))))

    same(results(outside, tensors), results(inside, tensors))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_with_numbers_as_arguments(dynamic):
    def f(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
        return cross_attention(q, k, v, scale=scale, softcap=3 * scale, dropout_p=dropout_p, backend="torch")

    tensors, g = leaves(SMALL).values(), compiled(f, dynamic)
    for numbers in ((0.5, 0.1), (0.7, 0.2)):
        same(results(lambda *t, n=numbers: g(*t, *n), tensors), results(lambda *t, n=numbers: f(*t, *n), tensors))


@backends
def test_compile_draws_fresh_dropout(backend):
    q, k, v = leaves(SMALL).values()
    f = compiled(partial(cross_attention, k=k, v=v, dropout_p=0.5, backend=backend))
    torch.manual_seed(1)
    first, second = f(q), f(q)
    torch.manual_seed(1)
    again = f(q)
    assert torch.equal(first, again) and not torch.equal(first, second)
    # the backward drops what the forward dropped
    same(torch.autograd.grad(first.sum(), q), torch.autograd.grad(again.sum(), q))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_compile_under_autocast(where):
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if where == "inside" else nullcontext():
            return cross_attention(q, k, v, backend="torch")

    tensors = leaves(SMALL).values()
    with torch.autocast("cpu", torch.bfloat16) if where == "outside" else nullcontext():
        found, exact = results(compiled(f), tensors), results(f, tensors)
    assert found[0].dtype == torch.bfloat16
    same(found, exact)


def test_compile_with_lse():
    tensors = leaves(SMALL).values()

    def f(*tensors: Tensor) -> Tensor:
        y, lse = cross_attention(*tensors, return_lse=True, backend="torch")
        return y + lse[..., None]

    same(results(compiled(f), tensors), results(f, tensors))


def test_a_lse_that_is_not_used_costs_nothing_when_compiled(monkeypatch):
    """Compiled code asks for the same gradients as eager code: without that of lse, the flash kernel can serve."""
    seen = []
    original = tiled.backward
    monkeypatch.setattr(tiled, "backward", lambda dy, dlse, *rest: seen.append(dlse) or original(dy, dlse, *rest))
    results(compiled(partial(cross_attention, backend="torch")), leaves(SMALL).values())
    assert seen == [None]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor():
    call = draw(EVERYTHING)
    rest = {n: t.requires_grad_() for n, t in call.tensors.items() if n not in "qkv"}

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(cross_attention(q * 2, k + 1, v, call.mask, **rest, **call.options, backend="torch"))

    tensors, g = leaves(EVERYTHING), compiled(f, backend="inductor")
    q, k, v = (tensors[n] for n in "qkv")
    # without the cache on disk, which does not see that our operators changed
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        close(results(g, (q, k, v)), results(f, (q, k, v)))
        assert not torch.equal(g(q, k, v), g(q, k, v))


def test_compiled_autograd():
    """The backward of an eager forward, compiled."""
    tensors, f = list(leaves(EVERYTHING).values()), attend(EVERYTHING, "torch")
    eager = results(f, tensors)
    with torch._dynamo.compiled_autograd._enable(partial(torch.compile, fullgraph=True, backend="aot_eager")):
        same(results(f, tensors), eager)


# ---- torch.export ----


@backends
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict, backend):
    model = Reader(backend)
    program = torch.export.export(model, reader_arguments(), strict=strict)
    assert [n.target for n in program.graph.nodes].count(forward.default) == 1
    exported = program.module()
    same([exported(*reader_arguments())], [model(*reader_arguments())])
    # an exported model can be trained on
    parameters = dict(exported.named_parameters())
    found = torch.autograd.grad(exported(*reader_arguments()).square().sum(), list(parameters.values()))
    own = dict(model.named_parameters())
    same(found, torch.autograd.grad(model(*reader_arguments()).square().sum(), [own[n] for n in parameters]))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_dynamic_lengths(strict):
    model = Reader("torch").eval()
    lengths = ({1: torch.export.Dim("M")}, {1: torch.export.Dim("N")}, {})
    program = torch.export.export(model, reader_arguments(), dynamic_shapes=lengths, strict=strict)
    for M, N in ((5, 7), (1, 2), (40, 1300)):
        same([program.module()(*reader_arguments(M, N))], [model(*reader_arguments(M, N))])


class Masked(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return cross_attention(q, k, v, mask, backend="torch")


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_a_mask_as_input(strict, tmp_path):
    """The program takes other masks of the same kind, also when it comes from a file."""
    tensors, masks = leaves(SMALL).values(), [draw(replace(SMALL, mask="all fields"), seed=i).mask for i in range(2)]
    program = torch.export.export(Masked(), (*tensors, masks[0]), strict=strict)
    torch.export.save(program, tmp_path / "masked.pt2")
    for each in (program, torch.export.load(tmp_path / "masked.pt2")):
        same([each.module()(*tensors, m) for m in masks], [Masked()(*tensors, m) for m in masks])


def test_export_with_a_mask_of_dynamic_length():
    def arguments(N: int) -> tuple[Tensor, Tensor, Tensor, Mask]:
        return *leaves(replace(SMALL, N=N)).values(), Mask.key_padding(torch.arange(2 * N).view(2, N) % 3 > 0)

    N = torch.export.Dim("N", min=2)
    lengths = ({}, {2: N}, {2: N}, [{1: N}, None, None])  # of keys, query_group and key_group
    program = torch.export.export(Masked(), arguments(7), dynamic_shapes=lengths)
    same([program.module()(*arguments(30))], [Masked()(*arguments(30))])


def test_an_exported_program_can_be_saved(tmp_path):
    model = Reader("torch").eval()
    torch.export.save(torch.export.export(model, reader_arguments()), tmp_path / "reader.pt2")
    loaded = torch.export.load(tmp_path / "reader.pt2").module()
    same([loaded(*reader_arguments())], [model(*reader_arguments())])
