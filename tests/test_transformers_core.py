"""register, apply, restore and report: what they change, what they leave alone, and what they say."""

import copy
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

from crossattn_kernels.integrations import transformers as integration
from crossattn_kernels.integrations import versions
from crossattn_kernels.integrations.transformers import changes, interface
from crossattn_kernels.integrations.transformers.kinds import kind_of
from crossattn_kernels.masks import Mask
from tests.transformers_models import Module, assert_same, build, counted, results, same_with_package


def names_of(model):
    """What each configuration of a model names as its attention implementation."""
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config") and m.config is not None]


# ---- the tests themselves ----


def test_the_tests_can_fail(monkeypatch):
    """An error of 1 % in what cross-attention returns is found in outputs, loss and gradients."""
    real = interface.cross_attention
    monkeypatch.setattr(interface, "cross_attention", lambda *args, **kwargs: 1.01 * real(*args, **kwargs))
    for name in ("bart", "t5", "mllama"):
        with pytest.raises(AssertionError, match=r"output.loss.*output.logits.*grad"):
            same_with_package(name)


# ---- apply and restore ----


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_apply_twice_changes_nothing_more(implementation):
    model, inputs = build("t5", implementation)
    fired = []
    handle = model.decoder.block[0].layer[1].EncDecAttention.register_forward_hook(lambda *_: fired.append(1))
    before, names = dict(model.state_dict()), names_of(model)
    rows = integration.apply(model).rows
    expected = results(model, inputs)
    assert integration.apply(model).rows == rows == integration.report(model).rows
    assert_same(results(model, inputs), expected, 0)
    assert len(fired) == 2 and handle.id in model.decoder.block[0].layer[1].EncDecAttention._forward_hooks
    after = model.state_dict()
    assert list(after) == list(before) and all(
        after[key] is before[key] or torch.equal(after[key], before[key]) for key in before
    )
    integration.restore(model)
    assert names_of(model) == names
    assert not any("crossattn" in key for module in model.modules() for key in vars(module))
    integration.restore(model)
    assert names_of(model) == names


def test_a_model_on_eager_keeps_eager_self_attention(monkeypatch):
    """Only the cross-attention is redirected: the rest of the model, its masks and its configuration do not notice."""
    from transformers.models.bart import modeling_bart

    model, inputs = build("bart", "eager")
    integration.apply(model)
    assert model.config._attn_implementation == model.model.decoder.config._attn_implementation == "eager"
    seen = []
    real = modeling_bart.eager_attention_forward
    monkeypatch.setattr(
        modeling_bart, "eager_attention_forward", lambda module, *a, **k: seen.append(module) or real(module, *a, **k)
    )
    with counted() as calls:
        results(model, inputs)
    assert calls == [2] and len(seen) == 3
    assert not any(module is layer.encoder_attn for module in seen for layer in model.model.decoder.layers)


def test_a_model_on_flex_attention_stays_there():
    """Its `BlockMask`s could only be handed back to it, and the table would say otherwise."""
    model, _ = build("bart")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="^nothing to replace in BartForConditionalGeneration"):
        integration.apply(model)
    assert {row.runs for row in integration.report(model).rows} == {"flex_attention"}
    assert "set_attn_implementation('sdpa') first" in str(integration.report(model))
    model.set_attn_implementation("sdpa")
    assert len(integration.apply(model).here) == 2


def test_what_cross_attention_cannot_do_goes_back_to_eager():
    model, _ = build("bart", "eager")
    integration.apply(model)
    module = model.model.decoder.layers[0].encoder_attn
    q = torch.randn(1, 2, 3, 8)
    with counted() as calls:
        out, weights = interface.attention(module, q, q, q, None, scaling=1.0, sliding_window=2)
    assert calls == [0] and weights.shape == (1, 2, 3, 3)


def test_nothing_half_applied(monkeypatch):
    model, _ = build("mllama")
    state = [dict(vars(module), kind=type(module)) for module in model.modules()]
    real, made = changes.Change.make, []

    def failing(self):
        made.append(self)
        if len(made) == 5:
            raise RuntimeError("no")
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no"):
        patch.setattr(changes.Change, "make", failing)
        integration.apply(model)
    assert len(made) == 9  # five forward, of which the last failed, and four back
    assert [dict(vars(module), kind=type(module)) for module in model.modules()] == state
    assert "crossattn" not in names_of(model)


def test_nothing_to_replace_is_said():
    config = tf.BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    model = tf.BertModel(config)
    expected = "^nothing to replace in BertModel: none of its 2 attention modules is cross-attention that can run here$"
    with pytest.raises(ValueError, match=expected):
        integration.apply(model)
    assert names_of(model) == names_of(tf.BertModel(config))
    with pytest.raises(ValueError, match="^nothing to replace in Linear: no attention module is cross-attention"):
        integration.apply(nn.Linear(2, 2))
    integration.restore(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_applied_model(implementation, copied):
    model, inputs = build("mllama", implementation)
    integration.apply(model)
    expected = results(model, inputs)
    twin = copied(model)
    with counted() as calls:
        assert_same(results(twin, inputs), expected, 0)
    assert calls == [1]
    integration.restore(twin)
    assert names_of(twin) == [implementation] * len(names_of(twin))
    assert len(integration.report(model).here) == 1


def test_saved_and_loaded(tmp_path):
    model, inputs = build("t5")
    integration.apply(model)
    expected = results(model, inputs)
    model.save_pretrained(tmp_path)
    assert "crossattn" not in (tmp_path / "config.json").read_text()
    again = tf.T5ForConditionalGeneration.from_pretrained(tmp_path).train()
    assert again.config._attn_implementation == "sdpa"
    assert_same(results(again, inputs), expected)
    integration.apply(again)
    assert_same(results(again, inputs), expected, 0)


def test_a_lora_wrapped_model():
    peft = pytest.importorskip("peft")
    model, inputs = build("t5")
    config = peft.LoraConfig(r=2, target_modules=["q", "k", "v", "o"], lora_dropout=0.0, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).double()
    before = results(wrapped, inputs)
    assert all("lora" in name for name in before if name.startswith("grad."))
    integration.apply(wrapped)
    with counted() as calls:
        assert_same(results(wrapped, inputs), before)
    assert calls == [2]
    integration.restore(wrapped)
    assert_same(results(wrapped, inputs), before, 0)


@pytest.mark.parametrize("name, implementation", [("mllama", "sdpa"), ("bart", "eager")])
def test_a_model_that_accelerate_has_hooked(name, implementation):
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = build(name, implementation)
    before = results(model, inputs)
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    integration.apply(model)
    masks = []
    real = interface.cross_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interface, "cross_attention", lambda *a, **k: masks.append(a[3]) or real(*a, **k))
        assert_same(results(model, inputs), before)
    assert masks and (name != "mllama" or isinstance(masks[0], Mask))
    integration.restore(model)
    hooks.remove_hook_from_module(model, recurse=True)
    assert_same(results(model, inputs), before, 0)


# ---- what is said ----


@pytest.mark.parametrize("call", [integration.apply, integration.restore, integration.report])
def test_what_is_no_module_is_refused(call):
    with pytest.raises(TypeError, match="^expected a torch module, got str; a pipeline of transformers has a .model$"):
        call("bart")


@pytest.mark.parametrize(
    "path, own, parent, kind",
    [
        ("decoder.layers.0.encoder_attn", "MoonshineAttention", "MoonshineDecoderLayer", "cross"),
        ("decoder.layers.0.self_attn", "MoonshineAttention", "MoonshineDecoderLayer", "self"),
        (
            "encoder.layer.0.crossattention.attention",
            "Blip2QFormerMultiHeadAttention",
            "Blip2QFormerAttention",
            "cross",
        ),
        ("layer.0.attention.attention", "Blip2QFormerMultiHeadAttention", "Blip2QFormerAttention", None),
        ("bert.encoder.layer.0.crossattention.self", "BertCrossAttention", "BertAttention", "cross"),
        ("encoder.layer.0.attention.self", "BertSelfAttention", "BertAttention", "self"),
        ("image_to_text_projection.x_attn", "KosmosTextAttention", "Kosmos2ImageToTextProjection", "cross"),
        ("decoder.layer.0.encoder_decoder_attention.attention", "Pix2StructTextAttention", "X", "cross"),
        ("transformer.final_attn_token_to_image", "Sam2Attention", "Sam2TwoWayTransformer", "cross"),
        ("encoder.cross_attention.attention.self", "PerceiverSelfAttention", "PerceiverAttention", "cross"),
        ("cross_modal_image_layers.0.attention.self", "BridgeTowerSelfAttention", "BridgeTowerAttention", "self"),
    ],
)
def test_kinds_by_name(path, own, parent, kind):
    module, holder = (type(name, (nn.Module,), {})() for name in (own, parent))
    assert kind_of(path, module, holder) == kind


def test_self_attention_of_a_decoder_that_is_not_called_causal():
    for path, kind in (("decoder.layers.0.self_attn", "self"), ("decoder.layers.0.cross_attention", "cross")):
        assert kind_of(path, Module(is_decoder=True, is_causal=False), nn.Module()) == kind
    latents = type("Idefics2PerceiverAttention", (nn.Module,), {})()
    assert kind_of("perceiver_resampler.layers.0.self_attn", latents, nn.Module()) == "cross"


def test_report_names_every_attention_module():
    model, _ = build("mllama")
    before = integration.report(model)
    assert [row.kind for row in before.rows] == ["self", "self", "self", "cross", "self"]
    assert {row.runs for row in before.rows} == {"sdpa"} and not before.here
    assert before.rows[3].why == "apply() moves it"
    after = integration.apply(model)
    assert [row.name for row in after.here] == ["model.language_model.layers.1.cross_attn"]
    assert after.here[0].runs == "crossattn (torch)" and after.here[0].why == ""
    lines = str(after).splitlines()
    assert lines[-1] == "MllamaForConditionalGeneration: 1 of 5 attention modules run on crossattn"
    assert len(lines) == 7 and "self-attention stays" in lines[1]


def test_report_of_classes_that_do_not_ask_the_interface():
    class OwnAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(2, 2), nn.Linear(2, 2)

    model = nn.ModuleDict(dict(cross=OwnAttention(), self_attn=nn.MultiheadAttention(4, 2)))
    cross, own = integration.report(model).rows
    assert (cross.kind, cross.runs, cross.why) == (
        "cross", "its own code", "its class does not ask the attention interface"
    )  # fmt: skip
    assert (own.kind, own.why) == ("self", "self-attention stays")


def test_versions(monkeypatch):
    extra = re.search(r'"transformers>=(\S+),<(\S+)"', (Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert extra.groups() == integration.SUPPORTED
    calls = [integration.register, *(partial(f, nn.Linear(2, 2)) for f in (integration.apply, integration.report))]
    for installed in ("4.57.1", "5.16.9", "6.0.0", "6.1.dev0"):
        monkeypatch.setattr(versions, "version", lambda _, installed=installed: installed)
        for call in calls:
            with pytest.raises(ImportError, match=f"^this needs transformers >= 5.17, < 6, but {installed} is inst"):
                call()
    monkeypatch.setattr(versions, "version", lambda _: "5.17.0rc1")
    integration.register()
