"""Flamingo's gated block against open_flamingo (a file it wrote) and against flamingo-pytorch (installed)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flamingo_pytorch.flamingo_pytorch import GatedCrossAttentionBlock as FlamingoPytorchBlock

from crossattn_kernels import Mask, cross_attention
from crossattn_kernels.layers import gated
from crossattn_kernels.layers.gated import GatedCrossAttentionBlock
from tests.against import assert_same, draw_weights, results, worst

GOLDEN = np.load(Path(__file__).parent / "data" / "open_flamingo.npz")
MODES = {"latest": True, "all previous": False}
SITUATIONS = [
    "every text after a medium",
    "text before the first medium",
    "text after more media than given",
    "no text after a medium",
    "cached media",
]


def golden(prefix):
    """{rest of the name: tensor} of the golden file's entries below a prefix."""
    names = [name for name in GOLDEN.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): torch.from_numpy(GOLDEN[name]) for name in names}


def open_flamingo_block(mode):
    block = GatedCrossAttentionBlock(6, 8, dim_head=3, heads=2, ff_mult=2, only_attend_immediate_media=MODES[mode])
    block.double().load_state_dict(golden("gated/state/"))
    return block


def open_flamingo_pair(situation, mode):
    """(ours, open_flamingo's) output and gradients."""
    block, case = open_flamingo_block(mode), golden(f"gated/{situation}: {mode}/")
    assert case.pop("latest") == MODES[mode]
    x, media = (t.requires_grad_() for t in golden("gated/input/").values())
    y = block(x, media, case.pop("locations"), use_cached_media=bool(case.pop("cached")))
    (y * golden("gated/dy")[""]).sum().backward()
    grads = {f"grad/{name}": p.grad for name, p in block.named_parameters()}
    return {"output": y.detach(), "input/0": x.grad, "input/1": media.grad, **grads}, case


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_open_flamingo(situation, mode):
    assert_same(*open_flamingo_pair(situation, mode))


def flamingo_pytorch_pair(latest, dtype=torch.float64):
    """(ours, flamingo-pytorch's) block on one state dict."""
    sizes = dict(dim=16, dim_head=8, heads=2, ff_mult=2, only_attend_immediate_media=latest)
    theirs = draw_weights(FlamingoPytorchBlock(**sizes)).to(dtype)
    ours = GatedCrossAttentionBlock(**sizes).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(dtype=torch.float64, B=3, M=10, T=3, n=5, dim=16):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(B, M, dim, generator=g, dtype=torch.float64)
    return {"x": x.to(dtype), "media": torch.randn(B, T, n, dim, generator=g, dtype=torch.float64).to(dtype)}


def locations(mode):
    return dict(media_locations=golden(f"gated/text before the first medium: {mode}/")["locations"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("situation", [*SITUATIONS[:-1], "no locations"])
def test_flamingo_pytorch(situation, mode):
    """It knows no cached media."""
    ours, theirs = flamingo_pytorch_pair(MODES[mode])
    given = dict(media_locations=golden(f"gated/{situation}: {mode}/").get("locations"))
    assert_same(results(ours, inputs(), **given), results(theirs, inputs(), **given))


@pytest.mark.parametrize("mode", MODES)
def test_flamingo_pytorch_in_fp32(mode):
    ours, theirs = flamingo_pytorch_pair(MODES[mode], torch.float32)
    x, given = inputs(torch.float32), locations(mode)
    assert_same(results(ours, x, **given), results(theirs, x, **given), 2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gates_start_at_zero_with_a_gradient(mode):
    ours, theirs = flamingo_pytorch_pair(MODES[mode])
    for block in (ours, theirs):
        block.attn_gate.data.zero_()
    got = results(ours, inputs(), **locations(mode))
    assert_same(got, results(theirs, inputs(), **locations(mode)))
    assert got["attn_gate"].abs() > 0.1


def test_a_new_block_is_the_identity():
    block, given = GatedCrossAttentionBlock(16, dim_head=8, heads=2), inputs(torch.float32)
    assert torch.equal(block(**given), given["x"])
    draw_weights(block).reset_parameters()
    assert torch.equal(block(**given), given["x"])


# ---- the media mask ----


def test_the_mask_is_a_pair_of_ranges(monkeypatch):
    seen = []

    def spy(q, k, v, mask, **rest):
        seen.append((mask, rest["gate"]))
        return cross_attention(q, k, v, mask, **rest)

    monkeypatch.setattr(gated, "cross_attention", spy)
    for mode in MODES:
        test_open_flamingo("text after more media than given", mode)
        mask, gate = seen.pop()
        assert isinstance(mask, Mask) and mask.keys is mask.visible is None
        assert all(t is None or t.shape == (3, 1, 10) for t in (mask.start, mask.end))
        assert gate.numel() <= 3 * 10


@pytest.mark.parametrize("mode", MODES)
def test_cached_media_go_on_where_the_prompt_ended(mode):
    block, (x, media) = flamingo_pytorch_pair(MODES[mode])[0], inputs().values()
    given = golden(f"gated/every text after a medium: {mode}/")["locations"]
    whole = block(x, media, given)
    assert not given[:, 8:].any()
    rest = block(x[:, 8:], media, given, use_cached_media=True)
    torch.testing.assert_close(rest, whole[:, 8:], rtol=0, atol=1e-12)


# ---- the layer as a module ----


@pytest.mark.parametrize("mode", MODES)
def test_compiles_in_one_graph(mode):
    block, _ = flamingo_pytorch_pair(MODES[mode])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, inputs(), **locations(mode)), results(block, inputs(), **locations(mode)))


def test_bf16():
    ours, _ = flamingo_pytorch_pair(True, torch.bfloat16)
    x, given = inputs(torch.bfloat16), locations("latest")
    got = results(ours, x, **given)
    exact = results(ours.double(), {name: t.double() for name, t in x.items()}, **given)
    assert got["output 0"].dtype == torch.bfloat16
    assert worst({n: t.double() for n, t in got.items()}, exact)[0] < 0.1


def test_autocast():
    ours, _ = flamingo_pytorch_pair(True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(**inputs(torch.float32))
    assert (y - ours(**inputs(torch.float32))).abs().max() < 0.1 * y.abs().max()


def test_a_state_dict_that_does_not_fit_is_named():
    block = GatedCrossAttentionBlock(6, 8, dim_head=3, heads=2, ff_mult=2)
    state = golden("gated/state/")
    state["attn.to_key"] = state.pop("attn.to_q.weight")
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"attn.to_q.weight".*Unexpected.*"attn.to_key"'):
        block.load_state_dict(state)


def test_state_dict_goes_back():
    ours, theirs = flamingo_pytorch_pair(True)
    assert theirs.load_state_dict(ours.state_dict()) == torch.nn.modules.module._IncompatibleKeys([], [])


def test_says_what_it_is():
    said = repr(GatedCrossAttentionBlock(16))
    assert "only_attend_immediate_media=True" in said and "heads=8" in said


def test_wrong_shapes():
    block, (x, media) = GatedCrossAttentionBlock(16, dim_head=8, heads=2), inputs(torch.float32).values()
    locations = torch.zeros(3, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"media_locations must be \(B, M\), got \(3, 9\): x is \(3, 10, 16\)"):
        block(x, media, locations)
    with pytest.raises(ValueError, match=r"media_locations must be \(B, M\), got \(2, 10\): x is .*, media is \(3, "):
        block(x, media, torch.zeros(2, 10, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"media_locations must be \(B, M\), got \(3, 10\): x is \(2, 10, 16\), media"):
        block(x[:2], media, torch.zeros(3, 10, dtype=torch.bool))
    for wrong in (locations.tolist(), locations.to_sparse()):
        with pytest.raises(TypeError, match="media_locations must be a"):
            block(x, media, wrong)
    with pytest.raises(ValueError, match=r"media \(B, T, n, dim_visual\), got \(3, 10, 16\) and \(3, 15, 16\)"):
        block(x, media.flatten(1, 2), locations)
    with pytest.raises(ValueError, match="use_cached_media needs media_locations"):
        block(x, media, use_cached_media=True)


def test_these_tests_can_fail(monkeypatch):
    """An error of 1 % in attention is found by every comparison."""
    monkeypatch.setattr(gated, "cross_attention", lambda *args, **rest: 1.01 * cross_attention(*args, **rest))
    for mode in MODES:
        assert worst(*open_flamingo_pair(SITUATIONS[0], mode))[0] > 1e-3
        ours, theirs = flamingo_pytorch_pair(MODES[mode], torch.float32)
        x = inputs(torch.float32)
        assert worst(results(ours, x), results(theirs, x))[0] > 50 * 2e-5
