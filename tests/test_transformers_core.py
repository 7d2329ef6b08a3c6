"""register, apply, restore and report: what they change, what they leave alone, and what they say."""

import copy
import json
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from crossattn_kernels import cli
from crossattn_kernels.integrations import transformers as integration
from crossattn_kernels.integrations import versions
from crossattn_kernels.integrations.transformers import changes, interface
from crossattn_kernels.integrations.transformers.kinds import kind_of
from crossattn_kernels.masks import Mask
from tests.transformers_models import assert_same, build, counted, padding, results, same_with_package


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


# ---- the two registries ----


def test_padding_is_not_dropped():
    """An attention function without a mask function makes transformers drop every mask."""
    integration.register()
    integration.register()
    model, inputs = build("bart")
    expected = results(model, inputs)
    ours, _ = build("bart", "crossattn")
    assert_same(results(ours, inputs), expected)

    whole = results(model, inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])})
    assert (whole["output.logits"] - expected["output.logits"]).abs().max() > 0.1
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "crossattn")
        assert_same(results(ours, inputs), whole)


def test_set_attn_implementation_and_from_pretrained(tmp_path):
    integration.register()
    model, inputs = build("bart")
    expected = results(model, inputs)
    model.set_attn_implementation("crossattn")
    with counted() as calls:
        assert_same(results(model, inputs), expected)
    assert calls == [2]
    model.save_pretrained(tmp_path)
    assert "crossattn" not in (tmp_path / "config.json").read_text()
    again = tf.BartForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="crossattn").train()
    with counted() as calls:
        assert_same(results(again.double(), inputs), expected)
    assert calls == [2]


@pytest.mark.parametrize("length", [1, 7])
def test_padding_is_one_row_that_takes_no_memory(length):
    arguments = dict(
        batch_size=3, q_length=length, kv_length=9, mask_function=bidirectional_mask_function,
        attention_mask=padding(3, 9).bool(), allow_is_causal_skip=False, allow_is_bidirectional_skip=True,
    )  # fmt: skip
    found, expected = interface.mask(**arguments), sdpa_mask(**arguments)
    assert found.shape == expected.shape and torch.equal(found, expected)
    assert length == 1 or found.stride(2) == 0
    arguments["attention_mask"] = torch.ones(3, 9, dtype=torch.bool)
    assert interface.mask(**arguments) is None


def test_causal_masks_are_those_of_sdpa():
    arguments = dict(batch_size=2, q_length=5, kv_length=5, attention_mask=padding(2, 5).bool())
    for function in (causal_mask_function, lambda b, h, q, k: (q - k).abs() < 3):
        expected = sdpa_mask(mask_function=function, **arguments)
        assert torch.equal(interface.mask(mask_function=function, **arguments), expected)


# ---- one call ----


class Module(nn.Module):
    """What an attention function sees of a module."""

    def __init__(self, **attributes):
        super().__init__()
        self.config, self.num_key_value_groups = tf.BartConfig(), 2
        for name, value in attributes.items():
            setattr(self, name, value)


def one_call(module, mask=None, queries=4, keys=6, **more):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, queries, 8, dtype=torch.float64), torch.randn(2, 2, keys, 8, dtype=torch.float64)
    v = torch.randn(2, 2, keys, 6, dtype=torch.float64)
    with counted() as calls:
        out, weights = interface.attention(module, q, k, v, mask, **more)
    return q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), out, weights, calls[0]


def test_cross_attention_is_never_taken_for_causal():
    """Upstream's sdpa takes a module without `is_causal` for causal, and drops the keys beyond the queries."""
    for module in (Module(crossattn_kind="cross"), Module(crossattn_kind="cross", is_causal=True)):
        q, k, v, out, weights, calls = one_call(module)
        expected = ((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2)
        torch.testing.assert_close(out, expected)
        assert calls == 1 and out.is_contiguous() and weights is None


def test_heads_head_sizes_and_scale_come_from_the_tensors():
    q, k, v, out, weights, _ = one_call(Module(crossattn_kind="cross"), scaling=1.0, output_attentions=True)
    torch.testing.assert_close(weights, (q @ k.mT).softmax(-1))
    torch.testing.assert_close(out, (weights @ v).transpose(1, 2))


@pytest.mark.parametrize(
    "module, more",
    [
        (Module(is_causal=False, crossattn_kind="self"), {}),
        (Module(is_causal=True), {}),
        (Module(), {}),
        (Module(crossattn_kind="cross"), dict(is_causal=True)),
        (Module(crossattn_kind="cross", is_causal=False), dict(sliding_window=3)),
        (Module(crossattn_kind="cross", is_causal=False), dict(s_aux=torch.zeros(4))),
        (Module(is_causal=False), dict(keys=4)),
    ],
)
def test_what_is_not_served_goes_to_sdpa(module, more, monkeypatch):
    seen = []
    real = interface.ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        interface.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *a, **k: seen.append(k) or real(*a, **k)
    )
    *_, out, weights, calls = one_call(module, **more)
    assert calls == 0 and len(seen) == 1 and out.shape == (2, 4, 4, 6) and weights is None
    assert all(seen[0][name] is value for name, value in more.items() if name != "keys")


def test_a_module_of_either_kind_is_served_by_its_sizes():
    """Q-Formers use one class for both; a model that `apply` has not seen can only be told by queries and keys."""
    assert one_call(Module(is_causal=False))[-1] == 1
    assert one_call(Module(is_causal=False, is_cross_attention=False))[-1] == 0


def test_the_mask_of_flash_attention_is_key_padding():
    keep = padding(2, 6)
    q, k, v, out, *_ = one_call(Module(crossattn_kind="cross"), mask=keep)
    hidden = (keep == 0)[:, None, None]
    torch.testing.assert_close(
        out, ((q @ k.mT * 8**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    )


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
    for installed in ("4.57.1", "5.19.9", "6.0.0", "6.1.dev0"):
        monkeypatch.setattr(versions, "version", lambda _, installed=installed: installed)
        for call in calls:
            with pytest.raises(ImportError, match=f"^this needs transformers >= 5.20, < 6, but {installed} is inst"):
                call()
    monkeypatch.setattr(versions, "version", lambda _: "5.20.0rc1")
    integration.register()


def test_the_command(tmp_path, capsys):
    model, _ = build("bart")
    model.config.save_pretrained(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 0
    by_folder = capsys.readouterr().out
    assert (
        "BartForConditionalGeneration: 2 of 5 attention modules run on crossattn" in by_folder
        or "BartModel" in by_folder
    )
    assert cli.main(["report", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out == by_folder


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    for where in (tmp_path, tmp_path / "absent"):
        assert cli.main(["report", str(where)]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and str(where) in error
    tf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8).save_pretrained(
        tmp_path
    )
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "0 of 1 attention modules run on crossattn" in capsys.readouterr().out
