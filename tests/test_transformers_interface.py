"""What transformers calls: the two registries, and one call of the attention function."""

import pytest
import torch
import transformers as tf
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from crossattn_kernels.integrations import transformers as integration
from crossattn_kernels.integrations.transformers import interface
from tests.transformers_models import Module, assert_same, build, counted, padding, results


def names_of(model):
    """What each configuration of a model names as its attention implementation."""
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config") and m.config is not None]


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
