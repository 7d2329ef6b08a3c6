"""What every layer does: device and dtype as in PyTorch, `reset_parameters` after meta, errors that name arguments."""

import re

import pytest
import torch
from torch import Tensor

from crossattn_kernels import layers

LAYERS = {
    "CrossAttention": lambda **place: layers.CrossAttention(16, 12, 2, bias=True, qk_norm=True, gate="head", **place),
    "MultiheadCrossAttention": lambda **place: layers.MultiheadCrossAttention(
        16, 2, kdim=12, add_bias_kv=True, **place
    ),
    "GatedCrossAttentionBlock": lambda **place: layers.GatedCrossAttentionBlock(16, 12, dim_head=8, heads=2, **place),
    "PerceiverResampler": lambda **place: layers.PerceiverResampler(
        16, 2, dim_head=8, heads=2, max_num_media=3, max_num_frames=2, **place
    ),
    "QFormerLayer": lambda **place: layers.QFormerLayer(16, 2, 12, text_feed_forward=True, **place),
    "BidirectionalCrossAttention": lambda **place: layers.BidirectionalCrossAttention(16, 2, **place),
    "BiMultiheadAttention": lambda **place: layers.BiMultiheadAttention(16, 12, 8, 2, **place),
    "AttentionPooling": lambda **place: layers.AttentionPooling(16, 12, 2, 3, **place),
    "ProbePooling": lambda **place: layers.ProbePooling(16, 2, **place),
    "AttentionPooling2d": lambda **place: layers.AttentionPooling2d(3, 16, 2, **place),
}
# the shapes of their tensors
INPUTS = {
    "CrossAttention": dict(x=(2, 5, 16), context=(2, 7, 12), residual=(2, 5, 16)),
    "MultiheadCrossAttention": dict(query=(5, 2, 16), key=(7, 2, 12), value=(7, 2, 16)),
    "GatedCrossAttentionBlock": dict(x=(2, 5, 16), media=(2, 3, 4, 12)),
    "PerceiverResampler": dict(x=(2, 7, 16)),
    "QFormerLayer": dict(hidden_states=(2, 5, 16), encoder_hidden_states=(2, 7, 12)),
    "BidirectionalCrossAttention": dict(language=(2, 5, 16), vision=(2, 7, 16)),
    "BiMultiheadAttention": dict(vision=(2, 5, 16), text=(2, 7, 12)),
    "AttentionPooling": dict(x=(2, 7, 12)),
    "ProbePooling": dict(hidden_state=(2, 7, 16)),
    "AttentionPooling2d": dict(x=(2, 16, 3, 3)),
}
# their norms and embeddings may widen what comes in, as may a residual
WIDENS = [("PerceiverResampler", "x"), ("AttentionPooling", "x"), ("ProbePooling", "hidden_state")]
WIDENS += [("CrossAttention", "residual")]
WRONG = {
    "list": (Tensor.tolist, TypeError),
    "integers": (Tensor.long, TypeError),
    "complex": (lambda t: t.to(torch.complex64), TypeError),
    "sparse": (Tensor.to_sparse, TypeError),
    "bf16": (Tensor.bfloat16, TypeError),
    "wide": (lambda t: torch.cat([t, t], -1), ValueError),
    "narrow": (lambda t: t[..., :1], ValueError),
    "flat": (lambda t: t[0], ValueError),
    "deep": (lambda t: t[None, None, None], ValueError),
    "number": (lambda t: t.sum(), ValueError),
}


def test_every_layer_is_here():
    assert LAYERS.keys() == INPUTS.keys() == set(layers.__all__) - {"ContextCache"}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("layer", "name"), [(layer, name) for layer in INPUTS for name in INPUTS[layer]])
def test_a_wrong_tensor_is_named(layer, name, wrong):
    if wrong == "bf16" and (layer, name) in WIDENS:
        return
    change, error = WRONG[wrong]
    tensors = {key: torch.randn(shape) for key, shape in INPUTS[layer].items()}
    with pytest.raises(error) as raised:
        LAYERS[layer]()(**tensors | {name: change(tensors[name])})
    message = str(raised.value)
    assert re.search(rf"\b{name}\b", message) and "must" in message and "\n" not in message


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: layers.CrossAttention(16.0), "dim must be an integer, got 16.0"),
        (lambda: layers.CrossAttention(16, context_dim=2.5), "context_dim must be an integer, got 2.5"),
        (lambda: layers.CrossAttention(16, heads=None), "heads must be an integer, got None"),
        (lambda: layers.GatedCrossAttentionBlock(16, heads=0), "heads must be positive, got 0"),
        (lambda: layers.GatedCrossAttentionBlock("16"), "dim must be an integer, got '16'"),
        (lambda: layers.PerceiverResampler(16, dim_head=0), "dim_head must be positive, got 0"),
        (lambda: layers.PerceiverResampler(16, -1), "depth must be at least 0, got -1"),
        (lambda: layers.PerceiverResampler(16, num_latents=-1), "num_latents must be positive, got -1"),
        (lambda: layers.QFormerLayer(16, 0), "heads must be positive, got 0"),
        (lambda: layers.QFormerLayer(16, 2, cross_attention_frequency=0), "cross_attention_frequency must be positive"),
        (lambda: layers.QFormerLayer(16, 2, hidden_dim=-1), "hidden_dim must be positive, got -1"),
        (lambda: layers.BidirectionalCrossAttention(16, 2.0), "heads must be an integer, got 2.0"),
        (lambda: layers.BiMultiheadAttention(16, 12, 8, -2), "heads must be positive, got -2"),
        (lambda: layers.BiMultiheadAttention(0, 12, 8, 2), "vision_dim must be positive, got 0"),
        (lambda: layers.AttentionPooling(16, 12, 2, 0), "n_queries must be positive, got 0"),
        (lambda: layers.ProbePooling(16, 2, -3), "intermediate_size must be positive, got -3"),
        (lambda: layers.AttentionPooling2d(-1, 16, 4), "spacial_dim must be positive, got -1"),
        (lambda: layers.AttentionPooling2d(3, 16, 0), "num_heads must be positive, got 0"),
    ],
)
def test_a_wrong_size_is_named(build, words):
    with pytest.raises((TypeError, ValueError), match=words):
        build()


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_is_made_on_meta_and_drawn_later(make):
    layer = make(device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
    layer = layer.to_empty(device="cpu")
    for p in layer.parameters():
        torch.nn.init.constant_(p, torch.nan)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    made = make(dtype=torch.float64)
    for (name, p), fresh in zip(layer.named_parameters(), made.parameters()):
        assert (p.std(correction=0) - fresh.std(correction=0)).abs() <= 0.5 * fresh.std(correction=0), name
