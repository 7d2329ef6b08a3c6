"""Perceiver's encoder and decoder cross-attention, and Idefics' resampler, against the library's."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import IdeficsConfig, PerceiverConfig, PerceiverForMaskedLM
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.perceiver.modeling_perceiver import PerceiverLayer

from crossattn_kernels.integrations.transformers import swaps
from tests.swapping import Calls, assert_rounding, drawn, worst


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


# ---- Perceiver ----


@pytest.fixture(scope="module")
def model():
    config = PerceiverConfig(
        num_latents=6, d_latents=24, d_model=32, num_self_attends_per_block=1, num_self_attention_heads=2,
        num_cross_attention_heads=2, qk_channels=16, v_channels=24, vocab_size=30, max_position_embeddings=9,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return drawn(PerceiverForMaskedLM(config))


def words(masked: bool) -> dict:
    ids = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(2))
    return dict(inputs=ids, attention_mask=torch.tensor([[1] * 6 + [0] * 3, [0] * 9])) if masked else dict(inputs=ids)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_perceiver(model, calls, train, masked):
    errors = worst(model, words(masked), train)
    assert_rounding(errors)
    assert (calls.count, calls.weights) == (2, 0), "the encoder's and the decoder's"
    assert "grad.perceiver.decoder.decoding_cross_attention.attention.self.query.weight" in errors


def test_perceiver_output_attentions(model, calls):
    errors = worst(model, words(True), output_attentions=True)
    assert_rounding(errors)
    assert "output.cross_attentions.0" in errors and calls.weights >= 1


def test_perceiver_self_attention_stays(model):
    found = swaps.find(model)
    reasons = {name: one.reason for name, one in found.items()}
    assert reasons == {
        "perceiver.encoder.cross_attention.attention.self": None,
        "perceiver.encoder.self_attends.0.attention.self": "self-attention",
        "perceiver.decoder.decoding_cross_attention.attention.self": None,
    }


@pytest.mark.parametrize("qk_channels, v_channels", [(160, 160), (300, 20), (7, 33)])
def test_perceiver_head_sizes(calls, qk_channels, v_channels):
    """One head of 160 is the default of the language model; vision models have larger ones, of keys or of values."""
    layer = PerceiverLayer(
        PerceiverConfig(attention_probs_dropout_prob=0.0), is_cross_attention=True, qk_channels=qk_channels,
        v_channels=v_channels, num_heads=1, q_dim=12, kv_dim=20,
    )  # fmt: skip
    latents, inputs = torch.randn(2, 5, 12).double(), torch.randn(2, 8, 20).double()
    assert_rounding(worst(drawn(layer), dict(hidden_states=latents, inputs=inputs)))
    assert calls.count == 1


# ---- Idefics ----


@pytest.mark.parametrize("qk_layer_norms", [False, True], ids=["plain", "qk norms"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_idefics_resampler(calls, train, qk_layer_norms):
    config = IdeficsConfig(
        perceiver_config=dict(qk_layer_norms_perceiver=qk_layer_norms), vision_config=dict(embed_dim=24)
    )
    resampler = IdeficsPerceiverResampler(config, embed_dim=24, depth=2, n_heads=3, head_dim=10, n_latents=4)
    context = torch.randn(2, 7, 24, dtype=torch.float64)
    errors = worst(drawn(resampler), dict(context=context), train)
    assert_rounding(errors)
    assert calls.count == 2
    assert ("grad.blocks.1.0.k_layer_norm.weight" in errors) == qk_layer_norms
    calls.error = 0.01
    assert worst(resampler, dict(context=context), train)["output"] > 1e-3
