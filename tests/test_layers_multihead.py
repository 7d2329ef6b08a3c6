"""`MultiheadCrossAttention` against `nn.MultiheadAttention`: outputs, weights and all gradients, in fp64."""

from math import prod

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from crossattn_kernels import Mask
from crossattn_kernels.layers import multihead
from crossattn_kernels.layers.multihead import MultiheadCrossAttention

B, H, M, N, DIM = 3, 4, 5, 7, 32

CONSTRUCTORS = {
    "one width": {},
    "own widths": dict(kdim=24, vdim=16),
    "no bias": dict(bias=False),
    "no bias, own widths": dict(bias=False, kdim=24),
    "bias_kv": dict(add_bias_kv=True),
    "zero_attn": dict(add_zero_attn=True),
    "both added": dict(add_bias_kv=True, add_zero_attn=True, vdim=16),
}


def bits(*shape):
    hidden = torch.rand(*shape, generator=torch.Generator().manual_seed(2)) < 0.4
    hidden[..., 0] = False
    return hidden


def floats(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()


CAUSAL = torch.ones(M, N).bool().triu(1)
# b: (B,), or () without a batch
MASKS = {
    "none": lambda b: {},
    "bool padding": lambda b: dict(key_padding_mask=bits(*b, N)),
    "float padding": lambda b: dict(key_padding_mask=floats(*b, N)),
    "bool, one for all": lambda b: dict(attn_mask=bits(M, N)),
    "float, one for all": lambda b: dict(attn_mask=floats(M, N)),
    "bool, one a head": lambda b: dict(attn_mask=bits(prod(b) * H, M, N)),
    "float, one a head": lambda b: dict(attn_mask=floats(prod(b) * H, M, N)),
    "bools": lambda b: dict(attn_mask=bits(prod(b) * H, M, N), key_padding_mask=bits(*b, N)),
    "floats": lambda b: dict(attn_mask=floats(M, N), key_padding_mask=floats(*b, N)),
    "-inf": lambda b: dict(attn_mask=torch.zeros(M, N).double().masked_fill(CAUSAL, -torch.inf)),
    "causal": lambda b: dict(attn_mask=CAUSAL, is_causal=True),
    "causal and padding": lambda b: dict(attn_mask=CAUSAL, is_causal=True, key_padding_mask=bits(*b, N)),
}
FORMS = ["batch first", "sequence first", "no batch"]
WEIGHTS = {"no weights": (False, True), "averaged": (True, True), "per head": (True, False)}


def pair(dtype=torch.float64, **constructor):
    """(theirs, ours), with parameters large enough that a small error in attention is a large one in the output."""
    theirs = nn.MultiheadAttention(DIM, H, dtype=dtype, **constructor)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.4, generator=generator)
    ours = MultiheadCrossAttention(DIM, H, dtype=dtype, **constructor)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def draw(layer, form="sequence first", dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def tokens(length, width):
        shape = {"batch first": (B, length, width), "sequence first": (length, B, width), "no batch": (length, width)}
        return torch.randn(shape[form], dtype=dtype, generator=generator).requires_grad_()

    return tokens(M, DIM), tokens(N, layer.kdim), tokens(N, layer.vdim)


def everything(layer, inputs, masks, **asked):
    """Output, weights and gradients of parameters, inputs and masks."""
    output, weights = layer(*inputs, **masks, **asked)
    loss = (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(-1, 1, weights.numel(), dtype=weights.dtype).view_as(weights)).sum()
    named = dict(layer.named_parameters()) | dict(zip(("query", "key", "value"), inputs))
    named |= {name: t for name, t in masks.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {"output": output, "weights": weights, **dict(zip(named, gradients))}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        if t is None:
            assert got[name] is None or not got[name].any(), name
        else:
            assert_close(got[name], t, msg=lambda words, name=name: f"{name}: {words}")


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_all_results(constructor, mask, form, weights):
    theirs, ours = pair(batch_first=form == "batch first", **constructor)
    masks = mask(() if form == "no batch" else (B,))
    asked = dict(zip(("need_weights", "average_attn_weights"), weights))
    inputs = draw(theirs, form)
    got = everything(ours, inputs, masks, **asked)
    if "add_bias_kv" in constructor or "add_zero_attn" in constructor:
        # where torch relies on the hint, it hides the added keys too; attn_mask, which hides none of them, is meant
        masks.pop("is_causal", None)
    assert_same(got, everything(theirs, inputs, masks, **asked))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_key_is_value(bias, batch_first):
    theirs, ours = pair(bias=bias, batch_first=batch_first)
    query, key, _ = draw(theirs, "batch first" if batch_first else "sequence first")
    for inputs in ((query, key, key), (key, key, key)):
        got, expected = (layer(*inputs, need_weights=False)[0] for layer in (ours, theirs))
        assert_close(got, expected)
        assert got.shape == expected.shape
        tensors = [*theirs.parameters(), key], [*ours.parameters(), key]
        a, b = (torch.autograd.grad(y.pow(2).sum(), t) for y, t in zip((expected, got), tensors))
        assert_close(b, a)


# ---- what differs, and why it may ----


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_that_sees_nothing_takes_nothing(need_weights):
    theirs, ours = pair()
    inputs = draw(ours)
    masks = dict(attn_mask=torch.zeros(M, N).bool(), key_padding_mask=torch.zeros(B, N).bool())
    masks["attn_mask"][2] = True
    masks["key_padding_mask"][1] = True
    got = everything(ours, inputs, masks, need_weights=need_weights)
    assert not [name for name, t in got.items() if t is not None and t.isnan().any()]
    assert_close(got["output"][2], ours.out_proj.bias.expand(B, DIM))
    assert_close(got["output"][:, 1], ours.out_proj.bias.expand(M, DIM))
    expected = everything(theirs, inputs, masks, need_weights=need_weights)
    if need_weights:
        assert expected["output"][2].isnan().all() and expected["weights"][1].isnan().all()
        assert not got["weights"][1].any() and not got["weights"][:, 2].any()
        seen = ~expected["output"].isnan()
        assert_close(got["output"][seen], expected["output"][seen])
    else:
        assert_same(got, expected)


def test_the_softmax_is_not_written_out_unless_weights_are_asked_for(monkeypatch):
    _, ours = pair()
    monkeypatch.setattr(multihead, "attention_weights", None)
    ours(*draw(ours), need_weights=False)
    with pytest.raises(TypeError, match="NoneType"):
        ours(*draw(ours))


def test_a_query_of_batch_one_serves_all():
    theirs, ours = pair(batch_first=True)
    query, key, value = draw(ours, "batch first")
    masks = dict(key_padding_mask=bits(B, N), attn_mask=bits(B * H, M, N))
    expected = theirs(query[:1].expand(B, -1, -1), key, value, **masks)
    assert_close(ours(query[:1], key, value, **masks), expected)


def test_an_empty_batch_may_share_a_query():
    ours = pair()[1]
    query, key, value = draw(ours)
    output, _ = ours(query[:, :1], key[:, :0], value[:, :0], key_padding_mask=bits(0, N))
    assert output.shape == (M, 0, DIM)


def test_dropout_in_training_only():
    theirs, ours = pair(dropout=0.5)
    inputs = draw(ours)
    first, weights = ours(*inputs)
    assert not torch.equal(first, ours(*inputs)[0])
    ours.eval(), theirs.eval()
    assert_same(everything(ours, inputs, {}), everything(theirs, inputs, {}))
    # weights are returned as they were before dropout
    assert_close(weights, theirs(*inputs)[1])


# ---- as a module ----


def test_a_live_module_becomes_one_and_back():
    """Also within the layers that own it, which pass -inf masks and is_causal."""
    layer = nn.TransformerDecoderLayer(DIM, H, 16, dropout=0, dtype=torch.float64)
    target, memory = (t.detach() for t in draw(pair()[0])[:2])
    given = dict(memory_mask=CAUSAL, memory_key_padding_mask=bits(B, N), memory_is_causal=False)
    calls = []
    layer.multihead_attn.register_forward_hook(lambda *_: calls.append(1))
    state = layer.state_dict()
    expected = layer(target, memory, **given)
    layer.multihead_attn.__class__ = MultiheadCrossAttention
    assert isinstance(layer.multihead_attn, nn.MultiheadAttention)
    assert_close(layer(target, memory, **given), expected)
    assert len(calls) == 2 and layer.state_dict().keys() == state.keys()
    layer.multihead_attn.__class__ = nn.MultiheadAttention
    assert torch.equal(layer(target, memory, **given), expected)


def test_an_old_checkpoint_of_the_module_loads():
    layer = pair()[1]
    state = layer.__dict__ | {}
    del state["_qkv_same_embed_dim"]
    old = MultiheadCrossAttention.__new__(MultiheadCrossAttention)
    old.__setstate__(state)
    inputs = draw(layer)
    assert torch.equal(old(*inputs)[0], layer(*inputs)[0])


@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_state_dict_goes_both_ways(constructor):
    theirs, ours = pair(**constructor)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*out_proj\.weight.*Unexpected.*o_proj\.weight"):
        ours.load_state_dict({name.replace("out_proj", "o_proj"): t for name, t in theirs.state_dict().items()})


@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_initialisation_is_that_of_torch(constructor):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(DIM, H, **constructor)
    torch.manual_seed(0)
    ours = MultiheadCrossAttention(DIM, H, **constructor)
    assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), rtol=0, atol=0)
    drawn = {name: p.clone() for name, p in ours.named_parameters()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(9)
    ours.reset_parameters()
    for name, p in ours.named_parameters():
        assert torch.equal(p, drawn[name]) if name.endswith("bias") else p.std() < 2 * drawn[name].std(), name


def test_out_proj_is_called():
    layer = pair()[1]
    inputs = draw(layer)
    expected = layer(*inputs)[0]
    calls = []
    plain = layer.out_proj

    class Adapter(nn.Module):
        def forward(self, x):
            calls.append(x.shape)
            return 2 * plain(x)

    layer.out_proj = Adapter()
    assert_close(layer(*inputs)[0], 2 * expected)
    assert calls == [(M, B, DIM)]


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("mask", ["none", "bools", "floats", "causal"])
def test_compiles_into_one_graph(mask, weights):
    ours = pair(add_zero_attn=True, batch_first=True)[1]
    asked = dict(zip(("need_weights", "average_attn_weights"), weights))
    query, key, _ = draw(ours, "batch first")
    masks = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in MASKS[mask]((B,)).items()}
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    inputs = query, key, key
    results = []
    for layer in (ours, compiled):
        output, attention = layer(*inputs, **masks, **asked)
        gradients = torch.autograd.grad(output.pow(2).sum(), [*ours.parameters(), query, key])
        results.append((output, attention if weights[0] else output, gradients))
    assert_close(results[1], results[0])


def test_compiles_for_every_length():
    ours = pair(batch_first=True)[1]
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    query, key, value = draw(ours, "batch first")
    for length in (M, M - 2):
        inputs = query[:, :length], key, value
        assert_close(compiled(*inputs), ours(*inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype, autocast):
    theirs, ours = pair(dtype=torch.float32)
    inputs = [t.detach() for t in draw(ours, dtype=torch.float32)]
    expected, seen = theirs(*inputs, key_padding_mask=bits(B, N))
    if not autocast:
        ours, inputs = ours.to(dtype), [t.to(dtype) for t in inputs]
    with torch.autocast("cpu", dtype, enabled=autocast):
        output, weights = ours(*inputs, key_padding_mask=bits(B, N))
    assert output.dtype == dtype
    assert (output - expected).abs().max() < 16 * torch.finfo(dtype).eps * expected.abs().max()
    assert (weights - seen).abs().max() < 16 * torch.finfo(dtype).eps


def test_repr():
    said = repr(MultiheadCrossAttention(DIM, H, 0.1, bias=False, add_bias_kv=True, kdim=24, batch_first=True))
    assert "32, 4, kdim=24, vdim=32, dropout=0.1, bias=False, add_bias_kv=True, batch_first=True" in said


def test_wrong_calls():
    layer = pair(kdim=24)[1]
    query, key, value = draw(layer)
    hidden = torch.zeros(B, N).bool()
    for arguments, masks, error, message in [
        ((query, key, value), dict(is_causal=True), ValueError, "is_causal=True is a hint about attn_mask"),
        ((query, value, value), {}, ValueError, r"the last size of key must be 24: .*key is \(7, 3, 32\)"),
        ((query[0], key, value), {}, ValueError, r"all have 3 dimensions.*query is \(3, 32\)"),
        ((query, key, value[:4]), {}, ValueError, r"one batch and one length.*value is \(4, 3, 32\)"),
        ((query[:, :2], key, value), {}, ValueError, r"the batch of query must be .*query is \(5, 2, 32\)"),
        (
            (query, key, value),
            dict(key_padding_mask=hidden.T),
            ValueError,
            r"key_padding_mask .*\(3, 7\), got \(7, 3\)",
        ),
        ((query, key, value), dict(key_padding_mask=hidden.long()), TypeError, "key_padding_mask .*torch.int64"),
        ((query, key, value), dict(attn_mask=Mask.causal(M, N)), TypeError, "attn_mask must be a tensor .* got Mask"),
        ((query[0, 0], key, value), {}, ValueError, r"all have 3 dimensions.*query is \(32,\)"),
        (
            (query[:, 0], key[:, 0], value[:, 0]),
            dict(key_padding_mask=Mask.causal(M, N)),
            TypeError,
            "key_padding_mask must be a tensor .* got Mask",
        ),
        ((query, key, value), dict(attn_mask=hidden), ValueError, r"\(5, 7\) or \(12, 5, 7\), got \(3, 7\)"),
        (
            (torch.nested.nested_tensor([key[0]], layout=torch.jagged),) * 3,
            {},
            ValueError,
            "nested tensors are not supported",
        ),
    ]:
        with pytest.raises(error, match=message):
            layer(*arguments, **masks)
