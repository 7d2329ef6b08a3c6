"""Decoders that look at an encoder: BART, T5, Whisper, VisionEncoderDecoder, and T5Gemma, which caps its logits."""

import pytest
import torch
import transformers as tf

from crossattn_kernels.integrations import transformers as integration
from tests.transformers_models import (
    TEXT,
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

NAMES = ["bart", "t5", "whisper", "ved"]


@case("t5gemma")
def t5gemma(implementation):
    sizes = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=32, attn_logit_softcapping=3.0, final_logit_softcapping=None, attention_dropout=0.0,
        query_pre_attn_scalar=4, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=64,
    )  # fmt: skip
    config = tf.T5GemmaConfig(encoder=dict(sizes), decoder=dict(sizes), dropout_rate=0.0, vocab_size=50)
    model = tf.T5GemmaForConditionalGeneration._from_config(config, attn_implementation=implementation)
    keep = torch.ones(2, 9, dtype=torch.long)
    keep[1, 6:] = 0
    return model, dict(input_ids=tokens(2, 9), attention_mask=keep, labels=tokens(2, 7))


@case("pegasus_x")
def pegasus_x(implementation):
    config = tf.PegasusXConfig(
        d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        num_global_tokens=2, block_size=4, **{**TEXT, "decoder_start_token_id": 0},
    )  # fmt: skip
    model = tf.PegasusXForConditionalGeneration._from_config(config, attn_implementation=implementation)
    return model, dict(input_ids=tokens(3, 9), labels=tokens(3, 7))


@case("bigbird_pegasus")
def bigbird_pegasus(implementation):
    config = tf.BigBirdPegasusConfig(
        d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        max_position_embeddings=20, attention_type="original_full", **TEXT,
    )  # fmt: skip
    model = tf.BigBirdPegasusForConditionalGeneration._from_config(config, attn_implementation=implementation)
    return model, dict(input_ids=tokens(3, 9), attention_mask=padding(3, 9), labels=tokens(3, 7))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_loss_and_gradients(name, implementation, train):
    same_with_package(name, implementation, train=train)


@pytest.mark.parametrize("name", NAMES)
def test_named_in_the_configuration(name):
    same_when_named(name)


@pytest.mark.parametrize("name", NAMES)
def test_fp32(name):
    same_with_package(name, dtype=torch.float32)


@pytest.mark.parametrize("name", ["pegasus_x", "bigbird_pegasus"])
def test_models_that_are_not_for_sdpa(name):
    """Their decoders do not say that they are causal, and BigBird's encoder adds its masks by itself."""
    model, inputs = build(name, "eager")
    expected = results(model, inputs)
    integration.register()
    assert_same(results(build(name, "crossattn")[0], inputs), expected)
    assert [row.name for row in integration.apply(model).here] == [
        f"model.decoder.layers.{i}.encoder_attn" for i in range(2)
    ]
    assert_same(results(model, inputs), expected)


def test_capped_logits():
    """Upstream's sdpa refuses them; they are compared with eager, whose softmax is in fp32."""
    same_with_package("t5gemma", "eager")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_without_padding_and_with_nothing_but_padding(name, implementation):
    """An entry that is all padding: BART's sdpa returns 0 for it, T5's a mean, and so do all who run on eager."""
    for whole in (True, False):
        model, inputs = build(name, implementation)
        inputs["attention_mask"][:] = 1
        inputs["attention_mask"][1] = int(whole)
        # a gradient through a mean of padding means nothing, and T5's is not reproduced
        grad = whole or (name, implementation) != ("t5", "sdpa")
        before = results(model, inputs, grad)
        integration.apply(model)
        assert_same(results(model, inputs, grad), before)


# ---- generation ----


@pytest.mark.parametrize("more", [{}, dict(num_beams=3), dict(use_cache=False)])
@pytest.mark.parametrize("name", NAMES)
def test_generation_is_the_same_token_for_token(name, more):
    model, inputs = build(name, dtype=torch.float32)
    del inputs["labels"]
    # tiny models repeat themselves
    arguments = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, no_repeat_ngram_size=1) | more
    with torch.no_grad():
        expected = model.eval().generate(**inputs, **arguments)
        integration.apply(model)
        with counted() as calls:
            found = model.generate(**inputs, **arguments)
    assert torch.equal(found, expected)
    assert calls[0] >= 2 * 8  # two layers


# ---- weights ----


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_exact_and_on_demand(name):
    model, inputs = build(name)
    eager, _ = build(name, "eager")
    with torch.no_grad():
        expected = eager(**inputs, output_attentions=True).cross_attentions
        integration.apply(model)
        found = model(**inputs, output_attentions=True).cross_attentions
        assert not model(**inputs).cross_attentions
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)


def test_weights_that_the_configuration_asks_for():
    model, inputs = build("bart", "eager")
    model.config.output_attentions = True
    expected = model(**inputs).cross_attentions
    integration.apply(model)
    for ours, theirs in zip(model(**inputs).cross_attentions, expected):
        torch.testing.assert_close(ours, theirs)


def test_whisper_finds_the_time_of_words():
    """Upstream sets the whole model to eager for it; with the package it need not leave the kernels."""
    model, inputs = build("whisper", dtype=torch.float32)
    del inputs["labels"]
    arguments = dict(max_new_tokens=6, min_new_tokens=6, output_attentions=True, return_dict_in_generate=True)
    eager, _ = build("whisper", "eager", dtype=torch.float32)
    with torch.no_grad():
        expected = eager.eval().generate(**inputs, **arguments)
        integration.apply(model.eval())
        found = model.generate(**inputs, **arguments)
    for ours, theirs in zip(found.cross_attentions, expected.cross_attentions):
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---- training ----


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_gradient_checkpointing(name):
    model, inputs = build(name)
    expected = results(model, inputs, use_cache=False)
    integration.apply(model)
    model.gradient_checkpointing_enable()
    with counted() as calls:
        assert_same(results(model, inputs, use_cache=False), expected)
    assert calls == [4]


def test_dropout_is_the_package_s(monkeypatch):
    """Dropped weights are other ones than upstream's, of the same share; in eval mode there are none."""
    model, inputs = build("bart")
    integration.apply(model)
    for layer in model.model.decoder.layers:
        layer.encoder_attn.dropout = 0.5
    first, second = results(model, inputs, grad=False), results(model, inputs, grad=False)
    assert (first["output.logits"] - second["output.logits"]).abs().max() > 0.01
    model.eval()
    assert_same(results(model, inputs, grad=False), results(model, inputs, grad=False), 0)


def test_training_gives_the_same_losses():
    same_training("t5")
