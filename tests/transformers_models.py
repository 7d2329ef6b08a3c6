"""Tiny models of transformers with large random weights, and what it takes to compare two ways of running one.

    model, inputs = build("t5")                      a model in fp64, on sdpa, and the arguments of a call with a loss
    before = results(model, inputs)                  {"loss": ..., "output.logits": ..., "grad.lm_head.weight": ...}
    apply(model)
    with counted() as calls:                         calls[0]: how often cross_attention ran here
        after = results(model, inputs)
    assert_same(after, before)

`CASES` names the models; a test of other models adds its own with `@case("name")`.  `enlarge(model)` draws the weights.
`same_with_package(name)` does all of the above with "apply" and with "restore".  Not a test file.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as tf
from torch import nn

from crossattn_kernels.integrations import transformers as integration
from crossattn_kernels.integrations.transformers import interface

TOLERANCE = 2e-6  # of the largest value, in fp64: what is left comes from norms that upstream computes in fp32
SINGLE = 2e-5  # the same in fp32
CASES: dict[str, Callable[[str], tuple[nn.Module, dict]]] = {}


def case(name):
    def add(build):
        CASES[name] = build
        return build

    return add


def build(name, implementation="sdpa", dtype=torch.float64, seed=0):
    """(model in training mode with dropout 0, keyword arguments of its forward), the same for the same seed."""
    torch.manual_seed(seed)
    model, inputs = CASES[name](implementation)
    enlarge(model)
    floats = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return model.to(dtype).train(), floats


def enlarge(model, seed=1, gain=1.0):
    """Draw weights so large that attention is far from uniform and gates are open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            if p.ndim >= 2 and "embed" not in name:
                p.copy_(gain * noise * p[0].numel() ** -0.5)
            elif p.ndim >= 2:
                p.copy_(noise)
            else:
                opened = 0.7 if "gate" in name or "alpha" in name else 0.0
                p.add_(opened + 0.2 * noise)


# ---- comparison ----


def results(model, inputs, grad=True, **more):
    """Outputs, the loss, and the gradients of all parameters for a random projection of every output."""
    model.zero_grad()
    arguments = {k: v.clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v) for k, v in inputs.items()}
    with torch.set_grad_enabled(grad):
        outputs = model(**arguments, **more)
        found = dict(_tensors("output", outputs))
        assert found, "nothing to compare"
        if grad:
            sum(_projection(t) for t in found.values() if t.requires_grad).backward()
    found = {name: t.detach().clone() for name, t in found.items()}
    if grad:
        found |= {f"grad.{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found


def _tensors(name, value) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(f"{name}.{key}", inner)
    elif isinstance(value, (tuple, list)):
        for i, inner in enumerate(value):
            yield from _tensors(f"{name}.{i}", inner)


def _projection(t):
    wave = torch.arange(t.numel(), dtype=t.dtype, device=t.device).mul(0.7).cos().view(t.shape)
    return (t * wave).sum() / t.numel() ** 0.5


def differences(ours, theirs):
    """{name: error relative to the largest value}; gradients that should be 0 count by all others."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    floor = 1e-2 * max((t.abs().max().item() for name, t in theirs.items() if name.startswith("grad.")), default=0.0)
    found = {}
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        least = floor if name.startswith("grad.") else 1e-12
        found[name] = ((ours[name] - expected).abs().max() / max(expected.abs().max().item(), least)).item()
    return found


def assert_same(ours, theirs, tolerance=TOLERANCE):
    wrong = {name: error for name, error in differences(ours, theirs).items() if not error <= tolerance}
    assert not wrong, wrong


@contextlib.contextmanager
def counted(module=interface):
    """Counts how often a module of the package calls `cross_attention`: calls[0]."""
    calls = [0]
    real = module.cross_attention

    def counting(*args, **kwargs):
        calls[0] += 1
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "cross_attention", counting)
        yield calls


def same_with_package(name, implementation="sdpa", module=interface, dtype=torch.float64, train=True, **more):
    """Before `apply`, after it and after `restore`: the same outputs and gradients; returns the worst error."""
    model, inputs = build(name, implementation, dtype)
    model.train(train)
    keys = list(model.state_dict())
    before = results(model, inputs, **more)
    integration.apply(model)
    with counted(module) as calls:
        after = results(model, inputs, **more)
    assert calls[0] > 0, "the package was not called"
    assert_same(after, before, TOLERANCE if dtype == torch.float64 else SINGLE)
    assert list(model.state_dict()) == keys
    integration.restore(model)
    with counted(module) as calls:
        again = results(model, inputs, **more)
    assert calls[0] == 0
    assert all(torch.equal(again[key], before[key]) for key in before)
    return max(differences(after, before).values())


def same_when_named(name, **more):
    """A model made with `attn_implementation="crossattn"` against one on sdpa; returns the worst error."""
    model, inputs = build(name)
    before = results(model, inputs, **more)
    integration.register()
    model, inputs = build(name, "crossattn")
    with counted() as calls:
        after = results(model, inputs, **more)
    assert calls[0] > 0, "the package was not called"
    assert_same(after, before)
    return max(differences(after, before).values())


def same_training(name, steps=30):
    """A short training in fp32, with and without the package: the same losses."""
    expected, found = losses(name, steps), losses(name, steps, applied=True)
    assert expected[-1] < 0.8 * expected[0], "nothing was learned"
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=SINGLE, atol=0.0)


def losses(name, steps, applied=False):
    """The losses of a short training in fp32."""
    model, inputs = build(name, dtype=torch.float32)
    if applied:
        integration.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    with counted() as calls:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert bool(calls[0]) == applied
    return found


# ---- decoders ----

TEXT = dict(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)


def tokens(*shape):
    return torch.randint(3, 50, shape)


def padding(batch, length):
    """1 for a token; the first entry is whole, the others end in padding."""
    return (torch.arange(length) < (length - 2 * torch.arange(batch)).clamp(min=1)[:, None]).long()


@case("bart")
def bart(implementation):
    config = tf.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        max_position_embeddings=40, forced_eos_token_id=None, **TEXT,
    )  # fmt: skip
    model = tf.BartForConditionalGeneration._from_config(config, attn_implementation=implementation)
    return model, dict(input_ids=tokens(3, 9), attention_mask=padding(3, 9), labels=tokens(3, 7))


@case("t5")
def t5(implementation):
    config = tf.T5Config(
        d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=2, num_decoder_layers=2, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, **TEXT,
    )  # fmt: skip
    model = tf.T5ForConditionalGeneration._from_config(config, attn_implementation=implementation)
    return model, dict(input_ids=tokens(3, 9), attention_mask=padding(3, 9), labels=tokens(3, 7))


@case("whisper")
def whisper(implementation):
    config = tf.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=12, max_target_positions=20,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, suppress_tokens=None, begin_suppress_tokens=None,
        **TEXT,
    )  # fmt: skip
    model = tf.WhisperForConditionalGeneration._from_config(config, attn_implementation=implementation)
    return model, dict(input_features=torch.randn(2, 8, 24), labels=tokens(2, 7))


@case("ved")
def vision_encoder_decoder(implementation):
    encoder = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    decoder = tf.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=20, vocab_size=50, add_cross_attention=True, is_decoder=True,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = tf.VisionEncoderDecoderModel._from_config(config, attn_implementation=implementation)
    return model, dict(pixel_values=torch.randn(2, 3, 8, 8), labels=tokens(2, 7))


# ---- vision and language ----


@case("mllama")
def mllama(implementation):
    text = dict(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, cross_attention_layers=[1], max_position_embeddings=64, dropout=0.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    )  # fmt: skip
    vision = dict(
        hidden_size=16, num_hidden_layers=1, num_global_layers=1, attention_heads=2, intermediate_size=32,
        vision_output_dim=32, image_size=8, patch_size=4, max_num_tiles=2, supported_aspect_ratios=[[1, 1], [1, 2]],
        intermediate_layers_indices=[0],
    )  # fmt: skip
    config = tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=49)
    model = tf.MllamaForConditionalGeneration._from_config(config, attn_implementation=implementation)
    batch, length, images = 2, 9, 2
    seen = torch.zeros(batch, length, images, 2, dtype=torch.long)
    # no image before token 2; then the first, in one tile or two; then both
    seen[:, 2:, 0, 0] = 1
    seen[1, 2:, 0, 1] = 1
    seen[:, 5:, 1] = 1
    ids = tokens(batch, length)
    return model, dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, cross_attention_mask=seen,
        pixel_values=torch.randn(batch, images, 2, 3, 8, 8), aspect_ratio_ids=torch.tensor([[1, 2], [2, 2]]),
        aspect_ratio_mask=torch.tensor([[[1, 0], [1, 1]], [[1, 1], [1, 1]]]),
    )  # fmt: skip


class Module(nn.Module):
    """What an attention function sees of a module."""

    def __init__(self, **attributes):
        super().__init__()
        self.config, self.num_key_value_groups = tf.BartConfig(), 2
        for name, value in attributes.items():
            setattr(self, name, value)
