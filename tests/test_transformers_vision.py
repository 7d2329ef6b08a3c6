"""Models that look at pictures: BLIP-2 and InstructBLIP, Idefics 1 and 2, DETR and Conditional DETR."""

from functools import partial

import pytest
import torch
import transformers as tf

from crossattn_kernels.integrations import transformers as integration
from tests.transformers_models import (
    CASES,
    assert_same,
    build,
    case,
    counted,
    padding,
    results,
    same_training,
    same_when_named,
    same_with_package,
    tokens,
)

VIT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4)
OPT = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, vocab_size=50, word_embed_proj_dim=16,
    max_position_embeddings=40, dropout=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
QFORMER = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, encoder_hidden_size=16,
    vocab_size=50, cross_attention_frequency=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def with_pictures(batch, length, count):
    """Ids that begin with `count` places for what the Q-Former makes of a picture."""
    return torch.cat([torch.full((batch, count), 49), tokens(batch, length) % 46 + 3], 1)


@case("blip2")
def blip2(implementation):
    config = tf.Blip2Config(
        vision_config=VIT, qformer_config=QFORMER, text_config=dict(model_type="opt", **OPT), num_query_tokens=3,
        image_token_index=49,
    )  # fmt: skip
    model = tf.Blip2ForConditionalGeneration._from_config(config, attn_implementation=implementation)
    ids = with_pictures(2, 5, 3)
    return model, dict(
        pixel_values=torch.randn(2, 3, 8, 8), input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids
    )


@case("instructblip")
def instructblip(implementation):
    config = tf.InstructBlipConfig(
        vision_config=VIT, qformer_config=QFORMER, text_config=dict(model_type="opt", **OPT), num_query_tokens=3,
        image_token_index=49,
    )  # fmt: skip
    model = tf.InstructBlipForConditionalGeneration._from_config(config, attn_implementation=implementation)
    ids = with_pictures(2, 5, 3)
    return model, dict(
        pixel_values=torch.randn(2, 3, 8, 8), input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids,
        qformer_input_ids=tokens(2, 4), qformer_attention_mask=padding(2, 4),
    )  # fmt: skip


@case("idefics")
def idefics(implementation, **changes):
    config = tf.IdeficsConfig(**dict(
        vocab_size=50, additional_vocab_size=0, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, cross_layer_interval=1, qk_layer_norms=True, dropout=0.0, alpha_initializer="ones",
        alpha_type="vector", use_resampler=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        vision_config=dict(
            embed_dim=12, image_size=8, patch_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            attention_dropout=0.0,
        ),
    ) | changes)  # fmt: skip
    model = tf.IdeficsForVisionText2Text._from_config(config, attn_implementation=implementation)
    ids = tokens(2, 7)
    seen = torch.zeros(2, 7, 2, dtype=torch.long)
    # tokens 0 and 1 see no picture: their row of attention is a mean, which the gate of the layer closes
    seen[:, 2:, 0] = 1
    seen[:, 5:, 1] = 1
    return model, dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, pixel_values=torch.randn(2, 2, 3, 8, 8),
        image_attention_mask=seen,
    )  # fmt: skip


@case("idefics2")
def idefics2(implementation):
    config = tf.Idefics2Config(
        vision_config=VIT, image_token_id=49,
        perceiver_config=dict(
            hidden_size=16, resampler_n_latents=3, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=8,
            num_key_value_heads=2, attention_dropout=0.0,
        ),
        text_config=dict(
            model_type="mistral", vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, intermediate_size=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
    )  # fmt: skip
    model = tf.Idefics2ForConditionalGeneration._from_config(config, attn_implementation=implementation)
    ids = with_pictures(2, 5, 3)
    # the second picture is half padding, so that the resampler gets a mask
    pixels = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    pixels[1, :, :, 4:] = False
    return model, dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, pixel_values=torch.randn(2, 1, 3, 8, 8),
        pixel_attention_mask=pixels,
    )  # fmt: skip


def detector(config_class, model_class, implementation):
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = config_class(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, use_pretrained_backbone=False, d_model=16,
        num_queries=5, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    # the backbone convolves
    model = model_class._from_config(config, attn_implementation={"": implementation, "backbone_config": "eager"})
    seen = torch.ones(2, 48, 40, dtype=torch.long)
    seen[1, 32:] = 0
    seen[1, :, 24:] = 0
    return model, dict(pixel_values=torch.randn(2, 3, 48, 40), pixel_mask=seen)


@case("detr")
def detr(implementation):
    return detector(tf.DetrConfig, tf.DetrForObjectDetection, implementation)


@case("conditional_detr")
def conditional_detr(implementation):
    return detector(tf.ConditionalDetrConfig, tf.ConditionalDetrForObjectDetection, implementation)


NAMES = ["blip2", "instructblip", "idefics", "idefics2", "detr", "conditional_detr"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_loss_and_gradients(name, implementation):
    # upstream's eager Idefics takes a softmax in fp32 of a mask that only fp64 can hold
    dtype = torch.float32 if (name, implementation) == ("idefics", "eager") else torch.float64
    same_with_package(name, implementation, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_in_eval_mode(name):
    same_with_package(name, train=False)


@pytest.mark.parametrize("name", NAMES)
def test_named_in_the_configuration(name):
    same_when_named(name)


@pytest.mark.parametrize("changes", [dict(use_resampler=True), dict(alpha_type="float", qk_layer_norms=False)])
def test_kinds_of_idefics(changes, monkeypatch):
    changes = dict(changes)
    if changes.get("use_resampler"):
        changes["perceiver_config"] = dict(
            resampler_n_latents=3, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8
        )
    monkeypatch.setitem(CASES, "idefics", partial(idefics, **changes))
    same_with_package("idefics")


def test_idefics_text_that_sees_no_picture():
    """Its rows are a mean over all keys, which the gate of the layer makes 0: nothing flows into them or back."""
    model, inputs = build("idefics")
    inputs["image_attention_mask"][0] = 0
    before = results(model, inputs)
    integration.apply(model)
    assert_same(results(model, inputs), before)


def test_idefics_generates_the_same_tokens():
    model, inputs = build("idefics", dtype=torch.float32)
    del inputs["labels"]
    arguments = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, no_repeat_ngram_size=1)
    with torch.no_grad():
        expected = model.eval().generate(**inputs, **arguments)
        integration.apply(model)
        with counted() as calls:
            found = model.generate(**inputs, **arguments)
    assert torch.equal(found, expected) and calls == [12]


@pytest.mark.parametrize("name", ["blip2", "detr", "conditional_detr"])
def test_weights_are_exact_and_on_demand(name):
    model, inputs = build(name)
    eager, _ = build(name, "eager")
    with torch.no_grad():
        expected = cross_weights(eager, inputs)
        integration.apply(model)
        found = cross_weights(model, inputs)
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)


def cross_weights(model, inputs):
    if hasattr(model, "qformer"):  # BLIP-2 does not ask it for weights
        states = model.vision_model(inputs["pixel_values"]).last_hidden_state
        model, inputs = model.qformer, dict(query_embeds=model.query_tokens, encoder_hidden_states=states)
    return model(**inputs, output_attentions=True).cross_attentions


def test_training_gives_the_same_losses():
    same_training("blip2")
