"""GroundingDINO and MM-GroundingDINO, whole models and their fusion of image and text, against the library's."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers import GroundingDinoConfig, GroundingDinoModel, MMGroundingDinoConfig, MMGroundingDinoModel
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoBiMultiHeadAttention

from crossattn_kernels.integrations import transformers as integration
from tests.swapping import Calls, applied, assert_rounding, attending_modules, drawn, worst

TINY = dict(
    backbone_config=dict(
        model_type="swin", image_size=32, patch_size=2, window_size=2, embed_dim=8, depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2], out_indices=[2, 3, 4], drop_path_rate=0.0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    text_config=dict(
        model_type="bert", vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ),
    d_model=32, num_queries=6, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=32,
    encoder_attention_heads=4, decoder_attention_heads=4, num_feature_levels=3, max_text_len=16, dropout=0.0,
    fusion_droppath=0.0, text_enhancer_dropout=0.0, encoder_n_points=2, decoder_n_points=2,
)  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


@pytest.fixture(scope="module", params=["plain", "mm"])
def model(request):
    if request.param == "mm":
        return drawn(MMGroundingDinoModel(MMGroundingDinoConfig(**TINY)))
    return drawn(GroundingDinoModel(GroundingDinoConfig(**TINY)))


def inputs(masked):
    generator = torch.Generator().manual_seed(2)
    pixel_values = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[101, 7, 8, 1012, 9, 1012, 102], [101, 5, 1012, 102, 0, 0, 0]])
    given = dict(pixel_values=pixel_values, input_ids=ids)
    if masked:
        pixel_mask = torch.ones(2, 32, 32, dtype=torch.long)
        pixel_mask[1, :, 20:] = 0
        given |= dict(pixel_mask=pixel_mask, attention_mask=(ids != 0).long())
    return given


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_outputs_and_gradients(model, calls, train, masked):
    errors = worst(model, inputs(masked), train)
    assert_rounding(errors)
    assert calls.count == 2 * 2 + 2, "both ways in each encoder layer, once in each decoder layer"
    assert calls.weights == 0, "though the library asks for them in every call"
    assert "grad.encoder.layers.0.fusion_layer.attn.text_proj.weight" in errors
    assert "grad.decoder.layers.1.encoder_attn_text.key.weight" in errors


def test_output_attentions(model, calls):
    errors = worst(model, inputs(True), output_attentions=True)
    assert_rounding(errors)
    assert calls.weights == 2 * 2 + 2
    assert {f"output.encoder_attentions.{i}.1" for i in range(4)} <= errors.keys()
    assert {f"output.decoder_attentions.{i}.1" for i in range(3)} <= errors.keys()


def test_the_tests_can_fail(model, calls):
    calls.error = 0.01
    errors = worst(model, inputs(True))
    assert errors["output.encoder_last_hidden_state_text"] > 1e-3
    with pytest.raises(AssertionError):
        assert_rounding(errors)


def test_what_is_swapped(model):
    ours = applied(model)
    assert attending_modules(ours) == [
        "encoder.layers.0.fusion_layer.attn",
        "encoder.layers.1.fusion_layer.attn",
        "decoder.layers.0.encoder_attn_text",
        "decoder.layers.1.encoder_attn_text",
    ]
    assert list(ours.state_dict()) == list(model.state_dict())
    integration.restore(ours)
    assert [type(one) for one in ours.modules()] == [type(one) for one in model.modules()]


# ---- the fusion by itself ----


@pytest.fixture(scope="module")
def fusion():
    """The published sizes: four heads of 256."""
    return drawn(GroundingDinoBiMultiHeadAttention(GroundingDinoConfig()))


def features():
    generator = torch.Generator().manual_seed(4)
    text_padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    vision_padding = torch.zeros(2, 21, dtype=torch.bool)
    vision_padding[0, 14:] = True
    return dict(
        vision_features=torch.randn(2, 21, 256, generator=generator, dtype=torch.float64),
        text_features=torch.randn(2, 5, 256, generator=generator, dtype=torch.float64),
        vision_attention_mask=vision_padding,
        text_attention_mask=text_padding,
    )


def test_fusion_returns_both_weights_when_called_by_itself(fusion, calls):
    errors = worst(fusion, features())
    assert_rounding(errors)
    assert {"output.0.0", "output.0.1", "output.1.0", "output.1.1"} <= errors.keys()
    assert (calls.count, calls.weights) == (2, 2)


def test_a_hook_sees_the_weights(model):
    ours, seen = applied(model), []
    ours.encoder.layers[0].fusion_layer.attn.register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        ours(**inputs(True))
    (_, to_text), (_, to_vision) = seen[0]
    assert to_text.shape[1:] == to_vision.shape[:0:-1]


def test_fusion_compiles_by_itself(fusion):
    """Below a caller that is not compiled, whose wishes compiled code cannot see: both weights are returned."""
    ours = applied(fusion)
    got = torch.compile(ours, backend="aot_eager", fullgraph=True)(**features())
    torch.testing.assert_close(got, ours(**features()))
    assert got[0][1] is not None


def test_scores_may_be_large(fusion):
    """The library subtracts the largest score and clamps at 50000, which changes no weight that counts."""
    large = copy.deepcopy(fusion)
    with torch.no_grad():
        large.vision_proj.weight *= 30
    assert_rounding(worst(large, features()))
