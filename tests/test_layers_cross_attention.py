"""`CrossAttention` against Mllama's cross-attention layer and `nn.MultiheadAttention`; its folds and its cache."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from crossattn_kernels import Mask
from crossattn_kernels.layers.cross_attention import CrossAttention

B, M, N, DIM, CONTEXT = 2, 5, 7, 32, 24
GATES = [None, "scalar", "head", "channel"]
MASK = Mask.lengths(torch.tensor([7, 4]))


def loud(layer, seed=0):
    """Parameters drawn large enough that a small error in attention is a large one in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return layer


def draw(context_dim=CONTEXT, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, M, DIM, dtype=dtype, generator=generator).requires_grad_()
    return x, torch.randn(B, N, context_dim, dtype=dtype, generator=generator).requires_grad_()


def gradients(y, tensors):
    """By name, those of a sum with uneven weights."""
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return dict(zip(tensors, torch.autograd.grad((y * weight).sum(), list(tensors.values()), retain_graph=True)))


def double(gate=None, bias=False, **more):
    return loud(CrossAttention(DIM, CONTEXT, 4, 2, 8, bias, gate=gate, dtype=torch.float64, **more))


# ---- the same as others ----


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_of_mllama(masked):
    mllama = pytest.importorskip("transformers.models.mllama.modeling_mllama")
    config = mllama.MllamaTextConfig(
        hidden_size=DIM, num_attention_heads=4, num_key_value_heads=2, intermediate_size=8, rms_norm_eps=1e-6
    )
    config._attn_implementation = "eager"
    theirs = loud(mllama.MllamaCrossAttentionDecoderLayer(config, layer_idx=0))
    # leaves the attention, its gate and its residual
    nn.init.zeros_(theirs.cross_attn_mlp_gate)
    rms = partial(nn.RMSNorm, eps=1e-6)
    ours = CrossAttention(DIM, heads=4, kv_heads=2, qk_norm=True, gate="scalar", norm=rms, context_norm=None)
    parameters = {f"{name}.weight": p.weight for name, p in theirs.cross_attn.named_children()}
    parameters |= {"norm.weight": theirs.input_layernorm.weight, "gate": theirs.cross_attn_attn_gate}
    ours.load_state_dict(parameters)

    x, context = draw(DIM, torch.float32)
    keep = torch.ones(B, N).bool()
    if masked:
        keep[1, 4:] = False
    added = torch.zeros(B, 1, M, N).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
    expected = theirs(x, context, added, None, None)
    y = ours(x, context, Mask.key_padding(keep), residual=x)

    both = {"x": x, "context": context}
    wanted = {"y": expected, **gradients(expected, parameters | both)}
    got = {"y": y, **gradients(y, dict(ours.named_parameters()) | both)}
    assert got.keys() == wanted.keys()
    for name, t in wanted.items():
        assert_close(got[name], t, rtol=0, atol=2e-5 * t.detach().abs().max().item(), msg=name)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_gates_and_residual_around_multihead_attention(gate, bias):
    """`nn.MultiheadAttention` with its output projection called apart: a gate stands on either side of it."""
    ours = loud(CrossAttention(DIM, CONTEXT, 4, bias=bias, gate=gate, dtype=torch.float64))
    theirs = nn.MultiheadAttention(DIM, 4, bias=bias, kdim=CONTEXT, vdim=CONTEXT, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.out_proj.weight.copy_(torch.eye(DIM))
        for name in ("q", "k", "v"):
            getattr(theirs, f"{name}_proj_weight").copy_(getattr(ours, f"{name}_proj").weight)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([p.bias for p in (ours.q_proj, ours.k_proj, ours.v_proj)]))
            theirs.out_proj.bias.zero_()
    x, context = draw()
    read = ours.context_norm(context)
    heads = theirs(ours.norm(x), read, read, need_weights=False)[0]
    factor = 1 if gate is None else ours.gate.tanh()
    if gate == "head":
        expected = x + ours.o_proj(heads * factor.repeat_interleave(8))
    else:
        expected = x + factor * ours.o_proj(heads)
    y = ours(x, context, residual=x)
    assert_close(y, expected)
    assert_close(ours(x, context), expected - x)

    packed = {"q_proj": theirs.q_proj_weight, "k_proj": theirs.k_proj_weight, "v_proj": theirs.v_proj_weight}
    projections = {f"{name}.weight": getattr(ours, name).weight for name in packed}
    wanted = gradients(expected, {f"{name}.weight": weight for name, weight in packed.items()})
    assert_close(gradients(y, projections), wanted)
    if bias:
        biases = gradients(y, {name: getattr(ours, name).bias for name in packed})
        assert_close(torch.cat(list(biases.values())), gradients(expected, {"": theirs.in_proj_bias})[""])
    rest = {n: p for n, p in ours.named_parameters() if n.partition(".")[0] not in packed}
    rest |= {"x": x, "context": context}
    assert_close(gradients(y, rest), gradients(expected, rest))


# ---- folds ----


@pytest.mark.parametrize("gate", GATES)
def test_a_new_gate_is_closed(gate):
    layer = CrossAttention(DIM, CONTEXT, 4, bias=True, gate=gate, dtype=torch.float64)
    x, context = draw()
    y = layer(x, context, residual=x)
    assert torch.equal(y, x) == (gate is not None)


class Adapter(nn.Module):
    """What an adapter does to a projection: stands in its place and calls it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.base(x)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_projections_are_called(name, gate):
    layer = double(gate)
    x, context = draw()
    expected = layer(x, context, residual=x)
    setattr(layer, name, Adapter(getattr(layer, name)))
    assert_close(layer(x, context, residual=x), expected)
    assert getattr(layer, name).calls == 1


@pytest.mark.parametrize(
    ("gate", "bias", "folds"),
    [
        (None, False, True),
        ("scalar", False, True),
        ("head", False, True),
        ("channel", False, False),
        ("scalar", True, False),
    ],
)
def test_the_residual_is_added_within_the_projection(monkeypatch, gate, bias, folds):
    calls = []
    monkeypatch.setattr(torch, "addmm", lambda *given, addmm=torch.addmm: calls.append(given) or addmm(*given))
    x, context = draw()
    double(gate, bias)(x, context, residual=x)
    assert len(calls) == folds


def test_a_replaced_forward_of_the_output_projection_runs():
    layer = double()
    x, context = draw()
    layer.o_proj.forward = torch.zeros_like
    assert torch.equal(layer(x, context, residual=x), x)


def test_hooks_of_the_output_projection_run():
    layer = double()
    x, context = draw()
    expected = layer(x, context)
    for register in (layer.o_proj.register_forward_hook, layer.o_proj.register_full_backward_hook):
        seen = []
        handle = register(lambda *given, seen=seen: seen.append(given[0]))
        layer(x, context, residual=x).sum().backward()
        assert seen == [layer.o_proj]
        handle.remove()
    layer.o_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert_close(layer(x, context, residual=x), x + 2 * expected)


def test_a_parametrized_output_projection_is_called():
    layer = double()
    x, context = draw()
    expected = x - layer(x, context)

    class Negative(nn.Module):
        def forward(self, weight):
            return -weight

    nn.utils.parametrize.register_parametrization(layer.o_proj, "weight", Negative())
    assert_close(layer(x, context, residual=x), expected)


def test_lora():
    peft = pytest.importorskip("peft")
    layer = double("scalar")
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names), layer)
    loud(layer, seed=3)
    x, context = draw()
    y = layer(x, context, MASK, residual=x)
    merged = double("scalar")
    merged.load_state_dict(
        {
            name.replace(".base_layer", ""): p
            + (layer.get_submodule(name.partition(".")[0]).get_delta_weight("default") if "base_layer" in name else 0)
            for name, p in layer.named_parameters()
            if "lora" not in name
        }
    )
    assert_close(y, merged(x, context, MASK, residual=x))


def test_the_residual_keeps_its_precision_under_autocast():
    layer = CrossAttention(DIM, CONTEXT, 4)
    x, context = draw(dtype=torch.float32)
    x = x + 2**-20
    nn.init.zeros_(layer.o_proj.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x, context, residual=x), x)


# ---- a context that is projected once ----


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_cached_context_gives_the_same_bits(qk_norm):
    layer = double("head", qk_norm=qk_norm)
    x, context = draw()
    named = dict(layer.named_parameters()) | {"x": x, "context": context}
    y = layer(x, context, MASK, residual=x)
    cache = layer.project_context(context)
    cached = layer(x, mask=MASK, residual=x, context_cache=cache)
    assert torch.equal(cached, y)
    for name, gradient in gradients(cached, named).items():
        assert torch.equal(gradient, gradients(y, named)[name]), name
    assert cache.k.shape == cache.v.shape == (B, 2, N, 8)

    steps = [layer(x[:, i : i + 1], mask=MASK, context_cache=cache) for i in range(M)]
    assert_close(torch.cat(steps, 1), layer(x, context, MASK))


def test_one_context_serves_a_batch():
    layer = double()
    x, context = draw()
    cache = layer.project_context(context[:1])
    assert_close(layer(x, context_cache=cache), layer(x, context[:1].expand(B, -1, -1)))


def test_an_empty_batch_may_share_a_context():
    layer = double("scalar")
    x, context = draw()
    assert layer(x[:0], context[:1], residual=x[:0]).shape == x[:0].shape


def test_one_sequence_reads_every_context_of_a_batch():
    layer = double("scalar")
    x, context = draw()
    full = x[:1].expand(B, -1, -1)
    expected = layer(full, context, MASK, residual=full)
    assert_close(layer(x[:1], context, MASK, residual=x[:1]), expected)
    assert_close(layer(x[:1], context, MASK, residual=full), expected)


# ---- as a module ----


def test_weights_are_dropped_in_training_only():
    layer = double(dropout=0.5)
    x, context = draw()
    assert not torch.equal(layer(x, context), layer(x, context))
    layer.eval()
    assert torch.equal(layer(x, context), double()(x, context))


def test_gradient_checkpointing_with_dropout():
    layer = double("scalar", dropout=0.5)
    x, context = draw()
    named = dict(layer.named_parameters()) | {"x": x, "context": context}
    torch.manual_seed(0)
    y = layer(x, context, MASK, residual=x)
    torch.manual_seed(0)
    again = checkpoint(layer, x, context, MASK, residual=x, use_reentrant=False)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    wanted, got = ([*torch.autograd.grad((t * weight).sum(), list(named.values()))] for t in (y, again))
    assert torch.equal(again, y)
    assert_close(got, wanted)


@pytest.mark.parametrize("gate", GATES)
def test_compiles_into_one_graph(gate):
    layer = double(gate, qk_norm=True)
    x, context = draw()
    named = dict(layer.named_parameters()) | {"x": x, "context": context}
    y = layer(x, context, MASK, residual=x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, context, MASK, residual=x)
    assert_close(compiled, y)
    assert_close(gradients(compiled, named), gradients(y, named))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate", GATES)
def test_half_precision(gate, dtype):
    layer, (x, context) = double(gate, qk_norm=True), draw()
    expected = layer(x, context, MASK, residual=x)
    y = layer.to(dtype)(x.to(dtype), context.to(dtype), MASK, residual=x.to(dtype))
    assert y.dtype == dtype
    error = (y - expected).abs().max() / expected.abs().max()
    assert error < 16 * torch.finfo(dtype).eps


def test_state_dict_goes_round():
    layer, other = double("channel", True, qk_norm=True), loud(double("channel", True, qk_norm=True), seed=5)
    x, context = draw()
    assert not torch.allclose(layer(x, context), other(x, context))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, context), other(x, context))
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*q_proj\.bias.*Unexpected.*gate"):
        CrossAttention(DIM, CONTEXT, 4, 2, 8, bias=True).load_state_dict(double("channel").state_dict())


def test_reset_parameters():
    layer = double("scalar", bias=True, qk_norm=True)
    layer.reset_parameters()
    assert layer.gate.item() == 0 and layer.o_proj.bias.count_nonzero() == 0
    assert torch.equal(layer.norm.weight, torch.ones(DIM).double())
    assert torch.equal(layer.k_norm.weight, torch.ones(8).double())
    assert layer.q_proj.weight.abs().max() <= (6 / (DIM + DIM)) ** 0.5


def test_repr():
    said = repr(CrossAttention(DIM, CONTEXT, 4, 2, gate="head", dropout=0.1))
    assert "dim=32, context_dim=24, heads=4, kv_heads=2, head_dim=8, gate='head', dropout=0.1" in said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(dim=30), "dim=30 and heads=8"),
        (dict(dim=32, kv_heads=3), "heads=8 and kv_heads=3"),
        (dict(dim=32, kv_heads=0), "heads=8 and kv_heads=0"),
        (dict(dim=32, gate="channels"), "gate must be one of .*'channels'"),
        (dict(dim=32, head_dim=-4), "must be positive, got .*head_dim=-4"),
        (dict(dim=32, context_dim=0), "must be positive, got .*context_dim=0"),
        (dict(dim=32, dropout=1.0), r"dropout must be in \[0, 1\)"),
    ],
)
def test_wrong_construction(wrong, message):
    with pytest.raises(ValueError, match=message):
        CrossAttention(**wrong)


def test_wrong_calls():
    layer, (x, context) = double(), draw()
    cache = layer.project_context(context)
    for call, message in {
        lambda: layer(context, context): r"x must have the shape \(batch, sequence, 32\), got \(2, 7, 24\)",
        lambda: layer(x, context[0]): r"context must have the shape \(batch, sequence, 24\), got \(7, 24\)",
        lambda: layer(x): "either context or context_cache, got neither",
        lambda: layer(x, context, context_cache=cache): "either context or context_cache, got both",
        lambda: layer(x, context, residual=x[:, :4]): r"residual must have the shape \(2, 5, 32\), .* got \(2, 4, 32\)",
        lambda: layer(x, context_cache=cache._replace(k=x)): "k must have 4 dimensions",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    for wrong in (3, (cache.k,), (*cache, cache.v)):
        with pytest.raises(TypeError, match=r"context_cache must be a ContextCache, \(k, v\), got"):
            layer(x, context_cache=wrong)


class Casting(nn.Linear):
    """Takes any dtype, as a quantised projection does."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class CastingNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def test_another_dtype_is_for_what_takes_it():
    layer, (x, context) = CrossAttention(DIM, CONTEXT, 4), draw(dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"x must be torch.float32, as the weights are, got torch.bfloat16 of shape"):
        layer(x, context.float())
    with pytest.raises(TypeError, match=r"context must be torch.float32, .* got torch.bfloat16 of shape \(2, 7, 24\)"):
        layer.project_context(context)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, context.float()).isfinite().all()
    hook = layer.q_proj.register_forward_pre_hook(lambda module, args: args[0].float())
    assert layer(x, context.float()).dtype == torch.float32
    hook.remove()
    layer.q_proj = Casting(DIM, DIM, False)
    assert layer(x, context.float()).dtype == torch.float32
    casting = CrossAttention(DIM, CONTEXT, 4, norm=CastingNorm)
    assert casting(x, context.float()).dtype == torch.float32
