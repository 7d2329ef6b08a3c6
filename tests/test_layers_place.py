"""Every layer takes device and dtype, as the modules of PyTorch do, and `reset_parameters` fills what meta left out."""

import pytest
import torch

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


def test_every_layer_is_here():
    assert LAYERS.keys() == set(layers.__all__) - {"ContextCache"}


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
