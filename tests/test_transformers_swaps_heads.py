"""Users of nn.MultiheadAttention, Mask2Former, OneFormer, Aria and the pooling heads, against the library's."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers as tf
from transformers.models.aria.modeling_aria import AriaCrossAttention
from transformers.models.idefics2.modeling_idefics2 import Idefics2MultiheadAttentionPoolingHead
from transformers.models.mask2former.modeling_mask2former import Mask2FormerMaskedAttentionDecoderLayer
from transformers.models.oneformer import modeling_oneformer as oneformer
from transformers.models.phi4_multimodal import modeling_phi4_multimodal as phi4

from crossattn_kernels.integrations import transformers as integration
from crossattn_kernels.integrations.transformers import swaps
from tests.swapping import Calls, applied, assert_rounding, attending_modules, drawn, worst


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def normal(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- Mask2Former ----


@pytest.fixture(scope="module", params=[False, True], ids=["post-norm", "pre-norm"])
def mask2former(request):
    config = tf.Mask2FormerConfig(
        backbone_config=tf.SwinConfig(
            image_size=32, patch_size=2, window_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
            out_features=["stage1", "stage2", "stage3", "stage4"], drop_path_rate=0.0, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=24, dim_feedforward=24,
        encoder_layers=1, decoder_layers=4, num_attention_heads=4, num_queries=5, pre_norm=request.param,
    )  # fmt: skip
    return drawn(tf.Mask2FormerModel(config))


def picture():
    return dict(pixel_values=normal(2, 3, 32, 32))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_mask2former(mask2former, calls, train):
    errors = worst(mask2former, picture(), train)
    assert_rounding(errors)
    assert (calls.count, calls.weights) == (3, 0)
    assert "grad.transformer_module.decoder.layers.2.cross_attn.in_proj_weight" in errors


def layer_inputs():
    hidden = torch.rand(8, 5, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    hidden[0, 0] = False
    hidden[:, :, 3] = False
    return dict(
        hidden_states=normal(5, 2, 32), level_index=0, position_embeddings=[normal(16, 2, 32, seed=3)],
        query_position_embeddings=normal(5, 2, 32, seed=4), encoder_hidden_states=[normal(16, 2, 32, seed=5)],
        encoder_attention_mask=hidden,
    )  # fmt: skip


def test_mask2former_output_attentions(mask2former, calls):
    """The model returns the weights of self-attention only; its layers return both."""
    assert_rounding(worst(mask2former, picture(), output_attentions=True))
    assert calls.weights == 3
    errors = worst(mask2former.transformer_module.decoder.layers[0], layer_inputs(), output_attentions=True)
    assert_rounding(errors)
    assert "output.2" in errors


def test_mask2former_compile():
    """In one graph: whether weights are wanted is known when it is traced."""
    config = tf.Mask2FormerConfig(hidden_dim=32, dim_feedforward=24, num_attention_heads=4)
    layer = applied(drawn(Mask2FormerMaskedAttentionDecoderLayer(config)))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for asked in (False, True):
        expected, got = (one(**layer_inputs(), output_attentions=asked) for one in (layer, compiled))
        torch.testing.assert_close(got, expected)
        assert len(got) == (3 if asked else 1)


def test_the_tests_can_fail(mask2former, calls):
    calls.error = 0.01
    with pytest.raises(AssertionError):
        assert_rounding(worst(mask2former, picture()))


def test_what_is_swapped(mask2former):
    ours = applied(mask2former)
    assert attending_modules(ours) == [f"transformer_module.decoder.layers.{i}.cross_attn" for i in range(3)]
    assert list(ours.state_dict()) == list(mask2former.state_dict())
    integration.restore(ours)
    assert [type(one) for one in ours.modules()] == [type(one) for one in mask2former.modules()]


def test_another_class_in_its_place_is_left_alone(mask2former):
    class Adapted(nn.MultiheadAttention):
        pass

    model = copy.deepcopy(mask2former)
    name = "transformer_module.decoder.layers.0.cross_attn"
    model.get_submodule(name).__class__ = Adapted
    found = swaps.find(model)[name]
    assert found.replacement is None
    assert found.reason.endswith("Adapted, not torch.nn.modules.activation.MultiheadAttention")


# ---- OneFormer ----


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])
def test_oneformer_layers(calls, pre_norm):
    config = tf.OneFormerConfig(hidden_dim=16, num_attention_heads=4, dim_feedforward=24, pre_norm=pre_norm)
    hidden = torch.zeros(8, 5, 9, dtype=torch.bool)
    hidden[:, 1, 4:] = True
    hidden[2, 3] = True  # sees nothing, and is reset to see everything
    given = dict(
        index=0, output=normal(5, 2, 16), multi_stage_features=[normal(9, 2, 16, seed=3)],
        multi_stage_positional_embeddings=[normal(9, 2, 16, seed=4)], attention_mask=hidden,
        query_embeddings=normal(5, 2, 16, seed=5),
    )  # fmt: skip
    layer = drawn(oneformer.OneFormerTransformerDecoderLayer(config))
    assert_rounding(worst(layer, dict(given, output_attentions=False)))
    assert (calls.count, calls.weights) == (1, 0)
    errors = worst(layer, dict(given, output_attentions=True))
    assert_rounding(errors)
    assert "output.2" in errors and calls.weights == 1

    query_layer = oneformer.OneFormerTransformerDecoderQueryTransformerDecoderLayer(
        16, 4, 24, dropout=0.0, normalize_before=pre_norm
    )
    calls.count = calls.weights = 0
    assert_rounding(worst(drawn(query_layer), dict(output=normal(5, 2, 16), memory=normal(9, 2, 16, seed=3))))
    assert (calls.count, calls.weights) == (1, 0)
    assert attending_modules(query_layer) == ["multihead_attn"]


# ---- pooling heads ----


VISION = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=3, patch_size=4)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_siglip(calls, train):
    text = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=3, vocab_size=30)
    model = drawn(tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=dict(VISION, image_size=16))))
    ids = torch.randint(30, (2, 6), generator=torch.Generator().manual_seed(3))
    assert_rounding(worst(model, dict(input_ids=ids, pixel_values=normal(2, 3, 16, 16)), train))
    assert (calls.count, calls.weights) == (1, 0)
    calls.error = 0.01
    with pytest.raises(AssertionError):
        assert_rounding(worst(model, dict(input_ids=ids, pixel_values=normal(2, 3, 16, 16)), train))


def test_siglip2_with_padded_pictures(calls):
    model = drawn(tf.Siglip2VisionModel(tf.Siglip2VisionConfig(**VISION, num_patches=9)))
    given = dict(
        pixel_values=normal(2, 9, 48), pixel_attention_mask=torch.tensor([[1] * 9, [1] * 4 + [0] * 5]),
        spatial_shapes=torch.tensor([[3, 3], [2, 2]]),
    )  # fmt: skip
    assert_rounding(worst(model, given))
    assert (calls.count, calls.weights) == (1, 0)


def test_a_hook_sees_the_weights_that_the_head_drops(calls):
    head, seen = Idefics2MultiheadAttentionPoolingHead(tf.Idefics2VisionConfig(**VISION)), []
    given = dict(hidden_state=normal(2, 7, 24))
    assert_rounding(worst(drawn(head), given))
    assert (calls.count, calls.weights) == (1, 0)
    head.attention.register_forward_hook(lambda module, args, output: seen.append(output[1].detach()))
    assert_rounding(worst(head, given))
    ours, theirs = seen
    torch.testing.assert_close(ours, theirs)
    assert calls.weights == 1


def test_phi4_and_aria(calls):
    head = phi4.Phi4MultimodalVisionMultiheadAttentionPoolingHead(tf.Phi4MultimodalVisionConfig(**VISION))
    seen = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    assert_rounding(worst(drawn(head), dict(hidden_state=normal(2, 7, 24), attention_mask=seen)))
    assert (calls.count, calls.weights) == (1, 0)

    attention = AriaCrossAttention(tf.AriaConfig(vision_config=dict(model_type="idefics3_vision", **VISION)))
    hidden = ~seen[:, None].expand(2, 4, 7).repeat_interleave(3, 0)
    given = dict(key_value_states=normal(2, 7, 24), hidden_states=normal(2, 4, 24, seed=3), attn_mask=hidden)
    assert_rounding(worst(drawn(attention), given))
    assert (calls.count, calls.weights) == (2, 0)
