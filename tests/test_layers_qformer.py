"""A Q-Former layer against transformers' `Blip2QFormerLayer`."""

import pytest
import torch
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerLayer

from crossattn_kernels import Mask, cross_attention
from crossattn_kernels.layers import bert
from crossattn_kernels.layers.qformer import QFormerLayer
from tests.against import assert_same, draw_weights, results, worst

DIM, HEADS, CONTEXT, HIDDEN = 24, 3, 20, 40
B, M, N = 3, 6, 9


def pair(layer_idx=0, text=False, dtype=torch.float64, implementation="eager", **dropout):
    """(ours, theirs) on one state dict."""
    config = Blip2QFormerConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        encoder_hidden_size=CONTEXT,
        intermediate_size=HIDDEN,
        use_qformer_text_input=text,
        attn_implementation=implementation,
    )
    theirs = draw_weights(Blip2QFormerLayer(config, layer_idx)).to(dtype).eval()
    ours = QFormerLayer(DIM, HEADS, CONTEXT, HIDDEN, layer_idx=layer_idx, text_feed_forward=text, **dropout)
    ours.to(dtype).load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(dtype=torch.float64, batch=B):
    g = torch.Generator().manual_seed(2)
    shapes = dict(hidden_states=(batch, M, DIM), encoder_hidden_states=(B, N, CONTEXT))
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def keep(n):
    """Bool (B, n): one entry whole, one with holes, one short."""
    kept = torch.ones(B, n, dtype=torch.bool)
    kept[1, ::2], kept[2, 2:] = False, False
    return kept


def additive(kept, dtype=torch.float64):
    return torch.zeros(kept.shape, dtype=dtype).masked_fill(~kept, torch.finfo(dtype).min)[:, None, None]


@pytest.mark.parametrize("padded", [False, True], ids=["whole images", "padded images"])
@pytest.mark.parametrize("layer_idx", [0, 1], ids=["cross", "no cross"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
def test_queries(dtype, tolerance, layer_idx, padded):
    ours, theirs = pair(layer_idx, dtype=dtype)
    mask, their_mask = (Mask.key_padding(keep(N)), additive(keep(N), dtype)) if padded else (None, None)
    got = results(ours, inputs(dtype), encoder_attention_mask=mask)
    want = results(theirs, inputs(dtype), encoder_attention_mask=their_mask, query_length=M)
    assert_same(got, want, tolerance)


@pytest.mark.parametrize("query_length", [0, 4, M])
def test_queries_and_text(query_length):
    """Both with padding; queries and text have a feed-forward each, and text does not see the image."""
    ours, theirs = pair(text=True)

    def run(module, mask):
        given = dict(attention_mask=mask(keep(M)), encoder_attention_mask=mask(keep(N)), query_length=query_length)
        return results(module, inputs(), **given)

    assert_same(run(ours, Mask.key_padding), run(theirs, additive))


def test_no_rows_at_all():
    ours, _ = pair()
    x, image = inputs().values()
    assert ours(x[:, :0], None, image).shape == x[:, :0].shape


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_transformers_masks_are_understood(form):
    ours, _ = pair()
    mask = keep(N)[:, None, None] if form == "bool" else additive(keep(N))
    want = results(ours, inputs(), encoder_attention_mask=Mask.key_padding(keep(N)))
    assert_same(results(ours, inputs(), encoder_attention_mask=mask), want)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_image_of_padding_only(implementation):
    """A bool mask gives 0, as SDPA does; an additive one the mean, as the eager implementation does."""
    ours, theirs = pair(implementation=implementation)
    kept = keep(N)
    kept[0] = False
    mask = kept[:, None, None].expand(-1, -1, M, -1) if implementation == "sdpa" else additive(kept)
    given = dict(encoder_attention_mask=mask, query_length=M)
    assert_same(results(ours, inputs(), **given), results(theirs, inputs(), **given))


def test_learned_queries_are_shared_by_the_batch():
    """One entry of queries for a batch of images: the same as a copy for each, and the gradient is the sum."""
    ours, theirs = pair()
    given = inputs(batch=1)
    got = results(ours, given)
    assert got["output 0"].shape == (B, M, DIM)
    assert_same(got, results(theirs, given, query_length=M))
    copied = results(ours, given | {"hidden_states": given["hidden_states"].repeat(B, 1, 1)})
    copied["input hidden_states"] = copied["input hidden_states"].sum(0, keepdim=True)
    assert_same(got, copied)


# ---- the layer as a module ----


def test_dropout_is_for_training():
    ours, _ = pair(attention_dropout=0.5, dropout=0.5)
    assert not torch.equal(ours(**inputs()), ours(**inputs()))
    ours.eval()
    assert torch.equal(ours(**inputs()), ours(**inputs()))


def test_compiles_in_one_graph():
    ours, _ = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, inputs()), results(ours, inputs()))


def test_bf16():
    ours, _ = pair(dtype=torch.bfloat16)
    y = ours(**inputs(torch.bfloat16))
    exact = ours.double()(**{name: x.double() for name, x in inputs(torch.bfloat16).items()})
    assert y.dtype == torch.bfloat16 and (y - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_state_dict_that_does_not_fit_is_named():
    ours, _ = pair(layer_idx=1)
    _, other = pair(layer_idx=0)
    with pytest.raises(RuntimeError, match='Unexpected key.*"crossattention.attention.query.weight"'):
        ours.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match='Missing key.*"crossattention.attention.query.weight"'):
        pair()[0].load_state_dict(pair(layer_idx=1)[1].state_dict())


def test_says_what_it_is():
    assert "cross_attention=False, text_feed_forward=True" in repr(pair(layer_idx=1, text=True)[0])


def test_initialisation():
    layer = draw_weights(QFormerLayer(64, 4))
    layer.reset_parameters()
    assert abs(layer.crossattention.attention.key.weight.std() - 0.02) < 0.002
    assert not layer.crossattention.attention.key.bias.any() and (layer.output_query.LayerNorm.weight == 1).all()


def test_wrong_calls():
    ours, _ = pair()
    x, image = inputs().values()
    with pytest.raises(ValueError, match="encoder_hidden_states must be given"):
        ours(x)
    with pytest.raises(ValueError, match=r"\(3, 6, 24\) has 2 rows of text after query_length=4 queries"):
        ours(x, None, image, query_length=4)
    for count in (-1, 7):
        with pytest.raises(ValueError, match=f"query_length must be from 0 to 6, got {count}"):
            ours(x, None, image, query_length=count)
    with pytest.raises(TypeError, match=r"query_length must be an integer, got 2\.5"):
        ours(x, None, image, query_length=2.5)
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got dim=24 and heads=5"):
        QFormerLayer(24, 5)


def test_these_tests_can_fail(monkeypatch):
    """An error of 1 % in attention is found."""
    monkeypatch.setattr(bert, "cross_attention", lambda *args, **rest: 1.01 * cross_attention(*args, **rest))
    ours, theirs = pair(dtype=torch.float32)
    x = inputs(torch.float32)
    assert worst(results(ours, x), results(theirs, x, query_length=M))[0] > 50 * 2e-5
