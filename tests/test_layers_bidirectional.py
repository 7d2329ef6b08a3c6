"""Attention both ways against transformers' LXMERT and GroundingDINO classes."""

import pytest
import torch
from torch import nn
from transformers import GroundingDinoConfig, LxmertConfig
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoBiMultiHeadAttention
from transformers.models.lxmert.modeling_lxmert import LxmertCrossAttentionLayer, LxmertXLayer

from crossattn_kernels import Mask, cross_attention
from crossattn_kernels.layers import bert, bidirectional
from crossattn_kernels.layers.bidirectional import BidirectionalCrossAttention, BiMultiheadAttention
from tests.against import assert_same, draw_weights, results, worst

B, M, N, DIM, HEADS = 3, 7, 11, 24, 3
DTYPES = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=["fp64", "fp32"]
)


def inputs(dtype=torch.float64):
    """(B, M, DIM) and (B, N, DIM)."""
    g = torch.Generator().manual_seed(2)
    return [torch.randn(B, n, DIM, generator=g, dtype=torch.float64).to(dtype) for n in (M, N)]


def keep(n, empty=False):
    """Bool (B, n): one entry whole, or nothing of it; one with holes, one short."""
    kept = torch.ones(B, n, dtype=torch.bool)
    kept[0], kept[1, ::2], kept[2, 2:] = not empty, False, False
    return kept


# ---- LXMERT ----

LXMERT = LxmertConfig(
    hidden_size=DIM,
    num_attention_heads=HEADS,
    intermediate_size=32,
    attention_probs_dropout_prob=0.0,
    hidden_dropout_prob=0.0,
)


class BothWays(nn.Module):
    """LXMERT's layer as `LxmertXLayer.cross_att` calls it."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, language, vision, language_mask=None, vision_mask=None):
        return self.wrapped(language, vision, vision_mask)[0], self.wrapped(vision, language, language_mask)[0]


def lxmert_pair(dtype=torch.float64):
    """(ours, theirs, theirs to be run both ways) on one state dict."""
    theirs = draw_weights(LxmertCrossAttentionLayer(LXMERT)).to(dtype)
    ours = BidirectionalCrossAttention(DIM, HEADS).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, BothWays(theirs)


def lxmert_results(module, dtype, **masks):
    return results(module, dict(zip(("language", "vision"), inputs(dtype))), **masks)


def additive(kept, dtype):
    """As `LxmertModel` makes its masks."""
    return (1 - kept.to(dtype))[:, None, None] * torch.finfo(dtype).min


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@DTYPES
def test_lxmert(dtype, tolerance, masked):
    ours, theirs = lxmert_pair(dtype)
    kept = dict(language_mask=keep(M), vision_mask=keep(N)) if masked else {}
    got = lxmert_results(ours, dtype, **{name: Mask.key_padding(k) for name, k in kept.items()})
    want = lxmert_results(theirs, dtype, **{name: additive(k, dtype) for name, k in kept.items()})
    assert_same(got, want, tolerance)


@pytest.mark.parametrize("empty", [False, True], ids=["padded", "padding only"])
@DTYPES
def test_lxmert_additive_masks_are_understood(dtype, tolerance, empty):
    ours, theirs = lxmert_pair(dtype)
    masks = dict(language_mask=additive(keep(M, empty), dtype), vision_mask=additive(keep(N, empty), dtype))
    assert_same(lxmert_results(ours, dtype, **masks), lxmert_results(theirs, dtype, **masks), tolerance)


@DTYPES
def test_lxmert_padding_only_gives_the_mean(dtype, tolerance):
    ours, theirs = lxmert_pair(dtype)
    kept = [keep(M, empty=True), keep(N, empty=True)]
    got = ours(*inputs(dtype), *map(Mask.key_padding, kept))
    for y, want in zip(got, theirs(*inputs(dtype), *(additive(k, dtype) for k in kept))):
        torch.testing.assert_close(y, want, rtol=0, atol=tolerance)


def test_lxmert_whole_layer():
    """Its cross-attention is taken from the state of the whole layer, alone or inside a model."""
    whole = draw_weights(LxmertXLayer(LXMERT), seed=3).double()
    ours = BidirectionalCrossAttention(DIM, HEADS).double()
    ours.load_state_dict(whole.state_dict())
    got, want = ours(*inputs()), whole.cross_att(inputs()[0], None, inputs()[1], None)
    for y, (expected,) in zip(got, want):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    model = nn.ModuleDict({"fusion": BidirectionalCrossAttention(DIM, HEADS).double()})
    model.load_state_dict({f"fusion.{name}": t for name, t in whole.state_dict().items()})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), ours.parameters()))


def test_lxmert_state_dict_that_does_not_fit_is_named():
    state = LxmertXLayer(LXMERT).state_dict()
    state["visual_attention.att.keys.weight"] = state.pop("visual_attention.att.key.weight")
    state["other.weight"] = state["lang_inter.dense.weight"]
    with pytest.raises(RuntimeError) as error:
        BidirectionalCrossAttention(DIM, HEADS).load_state_dict(state)
    missing, unexpected = str(error.value).split("Unexpected")
    assert '"att.key.weight"' in missing
    assert '"att.keys.weight"' in unexpected and '"other.weight"' in unexpected and "lang_inter" not in unexpected


def test_lxmert_initialisation():
    layer = draw_weights(BidirectionalCrossAttention(64, 4))
    layer.reset_parameters()
    assert abs(layer.att.key.weight.std() - 0.02) < 0.002 and not layer.output.dense.bias.any()


# ---- GroundingDINO ----

GROUNDING = GroundingDinoConfig(d_model=DIM, encoder_ffn_dim=2 * 32, encoder_attention_heads=2 * 4, fusion_dropout=0.0)


class OutputsOnly(nn.Module):
    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, vision, text, vision_attention_mask=None, text_attention_mask=None):
        (vision, _), (text, _) = self.wrapped(vision, text, vision_attention_mask, text_attention_mask)
        return vision, text


def grounding_pair(dtype=torch.float64):
    theirs = draw_weights(GroundingDinoBiMultiHeadAttention(GROUNDING)).to(dtype)
    ours = BiMultiheadAttention(DIM, DIM, 32, 4).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, OutputsOnly(theirs)


def grounding_results(module, dtype, **masks):
    return results(module, dict(zip(("vision", "text"), inputs(dtype))), **masks)


@pytest.mark.parametrize("masked", ["", "text", "vision", "both"])
@DTYPES
def test_grounding_dino(dtype, tolerance, masked):
    """True is padding."""
    ours, theirs = grounding_pair(dtype)
    masks = dict(vision_attention_mask=~keep(M), text_attention_mask=~keep(N))
    masks = {name: padding for name, padding in masks.items() if masked in ("both", name.partition("_")[0])}
    assert_same(grounding_results(ours, dtype, **masks), grounding_results(theirs, dtype, **masks), tolerance)


def test_grounding_dino_padding_only_gives_the_bias_not_nan():
    ours, theirs = grounding_pair()
    masks = dict(text_attention_mask=~keep(N, empty=True))
    got, want = ours(*inputs(), **masks), theirs(*inputs(), **masks)
    assert want[0][0].isnan().all()
    torch.testing.assert_close(got[0][0], ours.out_vision_proj.bias.expand(M, -1))
    torch.testing.assert_close(got[0][1:], want[0][1:], rtol=0, atol=1e-11)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-11)
    assert all(g.isfinite().all() for g in grounding_results(ours, torch.float64, **masks).values())


def test_grounding_dino_two_widths():
    layer = BiMultiheadAttention(24, 16, 32, 4)
    vision, text = layer(torch.randn(2, 7, 24), torch.randn(2, 5, 16))
    assert vision.shape == (2, 7, 24) and text.shape == (2, 5, 16)


def test_grounding_dino_state_dict_that_does_not_fit_is_named():
    state = GroundingDinoBiMultiHeadAttention(GROUNDING).state_dict()
    state["extra"] = state.pop("text_proj.bias")
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"text_proj.bias".*Unexpected.*"extra"'):
        grounding_pair()[0].load_state_dict(state)


def test_grounding_dino_initialisation():
    layer = draw_weights(BiMultiheadAttention(64, 64, 64, 4))
    layer.reset_parameters()
    bound = (6 / 128) ** 0.5
    assert 0.9 * bound < layer.vision_proj.weight.abs().max() <= bound and not layer.text_proj.bias.any()


# ---- both ----


@pytest.mark.parametrize("make", [lxmert_pair, grounding_pair])
def test_bf16(make):
    ours, _ = make(torch.bfloat16)
    got = ours(*inputs(torch.bfloat16))
    for y, exact in zip(got, ours.double()(*(x.double() for x in inputs(torch.bfloat16)))):
        assert y.dtype == torch.bfloat16 and (y - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("make, run", [(lxmert_pair, lxmert_results), (grounding_pair, grounding_results)])
def test_compiles_in_one_graph(make, run):
    ours, _ = make()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, torch.float64), run(ours, torch.float64))


@pytest.mark.parametrize(
    "layer",
    [
        BidirectionalCrossAttention(DIM, HEADS, attention_dropout=0.5),
        BidirectionalCrossAttention(DIM, HEADS, dropout=0.5),
        BiMultiheadAttention(DIM, DIM, 32, 4, dropout=0.5),
    ],
    ids=["LXMERT, probabilities", "LXMERT, output", "GroundingDINO"],
)
def test_dropout_is_for_training(layer):
    draw_weights(layer)
    for y, again in zip(layer(*inputs(torch.float32)), layer(*inputs(torch.float32))):
        assert not torch.equal(y, again)
    layer.eval()
    for y, again in zip(layer(*inputs(torch.float32)), layer(*inputs(torch.float32))):
        assert torch.equal(y, again)


def test_they_say_what_they_are():
    assert "heads=3, dropout=0.1" in repr(BidirectionalCrossAttention(DIM, HEADS, attention_dropout=0.1))
    assert "heads=4, dropout=0.1" in repr(BiMultiheadAttention(DIM, DIM, 32, 4, dropout=0.1))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of heads, got embed_dim=32 and heads=5"):
        BiMultiheadAttention(DIM, DIM, 32, 5)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 4).bool(), torch.zeros(2, 5), torch.zeros(2, 5).long()])
def test_a_mask_that_does_not_fit_is_named(wrong):
    layer, vision, text = BiMultiheadAttention(16, 12, 8, 2), torch.randn(2, 3, 16), torch.randn(2, 5, 12)
    with pytest.raises(ValueError, match=r"text_attention_mask must be bool \(2, 5\), True for padding, got torch\."):
        layer(vision, text, text_attention_mask=wrong)
    with pytest.raises(TypeError, match="text_attention_mask must be a tensor, got Mask"):
        layer(vision, text, text_attention_mask=Mask.lengths(torch.tensor([3, 5])))


@pytest.mark.parametrize(
    "make, run, module", [(lxmert_pair, lxmert_results, bert), (grounding_pair, grounding_results, bidirectional)]
)
def test_these_tests_can_fail(make, run, module, monkeypatch):
    """An error of 1 % in attention is found."""
    monkeypatch.setattr(module, "cross_attention", lambda *args, **rest: 1.01 * cross_attention(*args, **rest))
    ours, theirs = make(torch.float32)
    assert worst(run(ours, torch.float32), run(theirs, torch.float32))[0] > 50 * 2e-5
