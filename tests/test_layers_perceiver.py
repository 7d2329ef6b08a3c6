"""The Perceiver resampler against open_flamingo (a file it wrote) and against flamingo-pytorch (installed)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flamingo_pytorch import PerceiverResampler as FlamingoPytorchResampler

from crossattn_kernels import cross_attention
from crossattn_kernels.layers import perceiver
from crossattn_kernels.layers.perceiver import PerceiverResampler
from tests.against import assert_same, draw_weights, results, worst

GOLDEN = np.load(Path(__file__).parent / "data" / "open_flamingo.npz")
OPEN_FLAMINGO = {"perceiver": dict(max_num_media=3, max_num_frames=4), "perceiver without embeddings": {}}
SHAPES = {"one medium": (2, 7, 16), "media": (2, 3, 7, 16)}


def open_flamingo_pair(layer):
    """(ours, open_flamingo's) output and gradients."""
    found = {name.removeprefix(f"{layer}/"): torch.from_numpy(GOLDEN[name]) for name in GOLDEN.files}
    resampler = PerceiverResampler(6, 2, dim_head=3, heads=2, num_latents=3, ff_mult=2, **OPEN_FLAMINGO[layer])
    state = {name.removeprefix("state/"): t for name, t in found.items() if name.startswith("state/")}
    resampler.double().load_state_dict(state)
    x = found["input/0"].requires_grad_()
    y = resampler(x)
    (y * found["dy"]).sum().backward()
    grads = {f"grad/{name}": p.grad for name, p in resampler.named_parameters()}
    theirs = {name.removeprefix("all/"): t for name, t in found.items() if name.startswith("all/")}
    return {"output": y.detach(), "input/0": x.grad, **grads}, theirs


@pytest.mark.parametrize("layer", OPEN_FLAMINGO)
def test_open_flamingo(layer):
    assert_same(*open_flamingo_pair(layer))


def flamingo_pytorch_pair(dtype=torch.float64):
    """(ours, flamingo-pytorch's) resampler on one state dict."""
    sizes = dict(dim=16, depth=2, dim_head=8, heads=2, num_latents=5, ff_mult=2)
    theirs = draw_weights(FlamingoPytorchResampler(**sizes, num_media_embeds=3)).to(dtype)
    ours = PerceiverResampler(**sizes, max_num_media=3).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def renamed(found):
    return {name.replace("media_pos_emb", "media_time_embs"): t for name, t in found.items()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
def test_flamingo_pytorch(dtype, tolerance, shape):
    ours, theirs = flamingo_pytorch_pair(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    assert_same(results(ours, dict(x=x)), renamed(results(theirs, dict(x=x))), tolerance)


def test_one_media_embedding_serves_all_media():
    theirs = FlamingoPytorchResampler(dim=16, depth=1, num_latents=5, num_media_embeds=1)
    ours = PerceiverResampler(16, 1, num_latents=5, max_num_media=1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 7, 16)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_first_queries_are_shared_by_the_batch(monkeypatch):
    batches = []

    def spy(q, k, v):
        batches.append((q.shape[0], k.shape[0]))
        return cross_attention(q, k, v)

    monkeypatch.setattr(perceiver, "cross_attention", spy)
    flamingo_pytorch_pair()[0](torch.randn(2, 3, 7, 16, dtype=torch.float64))
    assert batches == [(1, 6), (6, 6)]


# ---- the layer as a module ----


def test_bf16():
    torch.manual_seed(0)  # or weights and error depend on what the process drew before
    ours, _ = flamingo_pytorch_pair(torch.bfloat16)
    x = torch.randn(2, 3, 7, 16).bfloat16()
    got, exact = results(ours, dict(x=x)), results(ours.double(), dict(x=x.double()))
    assert got["output 0"].dtype == torch.bfloat16
    assert worst({n: t.double() for n, t in got.items()}, exact)[0] < 0.1


def test_a_state_dict_that_does_not_fit_is_named():
    theirs = FlamingoPytorchResampler(dim=16, depth=1, num_media_embeds=3).state_dict()
    with pytest.raises(RuntimeError, match='Unexpected key.*"media_pos_emb"'):
        PerceiverResampler(16, 1).load_state_dict(theirs)
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"frame_embs".*"layers.1.0.to_q.weight"'):
        PerceiverResampler(16, 2, max_num_media=3, max_num_frames=4).load_state_dict(theirs)
    theirs["latent"] = theirs.pop("latents")
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"latents".*Unexpected key.*"latent"'):
        PerceiverResampler(16, 1, max_num_media=3).load_state_dict(theirs)


def test_a_state_dict_inside_a_model_is_renamed_too():
    ours, theirs = flamingo_pytorch_pair()
    state = {f"resampler.{name}": t for name, t in theirs.state_dict().items()}
    model = torch.nn.ModuleDict({"resampler": ours})
    ours.media_time_embs.data.zero_()
    model.load_state_dict(state)
    assert torch.equal(ours.media_time_embs, theirs.media_pos_emb)
    assert "resampler.media_pos_emb" in state, "the caller's dictionary stays as it was"


def test_initialisation():
    """Latents and embeddings from N(0, 1)."""
    resampler = PerceiverResampler(64, 1, num_latents=64, max_num_media=64, max_num_frames=64)
    for learned in (resampler.latents, resampler.media_time_embs, resampler.frame_embs):
        assert abs(learned.mean()) < 0.1 and abs(learned.std() - 1) < 0.1


def test_says_what_it_is():
    assert "dim=16, num_latents=64, max_num_media=3, max_num_frames=None" in repr(
        PerceiverResampler(16, 1, max_num_media=3)
    )


def test_wrong_shapes():
    resampler = PerceiverResampler(16, 1, max_num_media=3, max_num_frames=2)
    with pytest.raises(ValueError, match=r"x must be \(B, n, dim\).*got \(2, 1, 1, 1, 7, 16\)"):
        resampler(torch.randn(2, 1, 1, 1, 7, 16))
    with pytest.raises(ValueError, match=r"x \(2, 4, 7, 16\) holds 4 media, more than max_num_media=3"):
        resampler(torch.randn(2, 4, 7, 16))
    with pytest.raises(ValueError, match=r"x \(2, 3, 5, 7, 16\) holds 5 frames, more than max_num_frames=2"):
        resampler(torch.randn(2, 3, 5, 7, 16))


def test_these_tests_can_fail(monkeypatch):
    """An error of 1 % in attention is found by every comparison."""
    monkeypatch.setattr(perceiver, "cross_attention", lambda *args: 1.01 * cross_attention(*args))
    for layer in OPEN_FLAMINGO:
        assert worst(*open_flamingo_pair(layer))[0] > 1e-3
    ours, theirs = flamingo_pytorch_pair(torch.float32)
    x = torch.randn(2, 3, 7, 16)
    assert worst(results(ours, dict(x=x)), renamed(results(theirs, dict(x=x))))[0] > 50 * 2e-5
