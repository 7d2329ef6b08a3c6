"""Attention pooling against CoCa's, SigLIP's and CLIP's own, rebuilt from torch where the project is not installed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from crossattn_kernels.layers import multihead
from crossattn_kernels.layers.pooling import AttentionPooling, AttentionPooling2d, ProbePooling

B, N, DIM, CONTEXT, H = 3, 9, 32, 24, 4
F64 = dict(dtype=torch.float64)


class Coca(nn.Module):
    """open_clip's AttentionalPooler, on `nn.MultiheadAttention`."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.empty(5, DIM, **F64))
        self.attn = nn.MultiheadAttention(DIM, H, kdim=CONTEXT, vdim=CONTEXT, batch_first=True, **F64)
        self.ln_q, self.ln_k = nn.LayerNorm(DIM, **F64), nn.LayerNorm(CONTEXT, **F64)

    def forward(self, x, key_padding_mask=None):
        x, query = self.ln_k(x), self.ln_q(self.query).expand(x.shape[0], -1, -1)
        return self.attn(query, x, x, key_padding_mask, need_weights=False)[0]


class Clip(nn.Module):
    """CLIP's AttentionPool2d, on torch's own multi-head attention over all places, of which the first is kept."""

    def __init__(self):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(N + 1, DIM, **F64))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(DIM, DIM, **F64) for _ in range(3))
        self.c_proj = nn.Linear(DIM, 16, **F64)

    def forward(self, x):
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positional_embedding[:, None]
        projections = self.q_proj, self.k_proj, self.v_proj
        weights = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), (p.weight for p in projections)))
        bias = torch.cat([p.bias for p in projections])
        output, _ = F.multi_head_attention_forward(
            x, x, x, DIM, H, None, bias, None, None, False, 0.0, self.c_proj.weight, self.c_proj.bias,
            need_weights=False, use_separate_proj_weight=True, **weights,
        )  # fmt: skip
        return output[0]


def siglip():
    modeling = pytest.importorskip("transformers.models.siglip.modeling_siglip")
    config = modeling.SiglipVisionConfig(hidden_size=DIM, num_attention_heads=H, intermediate_size=40)
    return modeling.SiglipMultiheadAttentionPoolingHead(config).double()


OURS = {
    "coca": lambda: AttentionPooling(DIM, CONTEXT, H, 5, **F64),
    "siglip": lambda: ProbePooling(DIM, H, 40, **F64),
    "clip": lambda: AttentionPooling2d(3, DIM, H, 16, **F64),
}
THEIRS = {"coca": Coca, "siglip": siglip, "clip": Clip}
SHAPES = {"coca": (B, N, CONTEXT), "siglip": (B, N, DIM), "clip": (B, DIM, 3, 3)}
each = pytest.mark.parametrize("name", OURS)


def loud(layer):
    """Parameters drawn large enough that a small error in attention is a large one in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return layer


def draw(name):
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1), **F64).requires_grad_()


def results(layer, x, *masks):
    """The output and all gradients, by name."""
    y = layer(x, *masks)
    weight = torch.linspace(-1, 1, y.numel(), **F64).view_as(y)
    named = dict(layer.named_parameters()) | {"x": x}
    return {"y": y, **dict(zip(named, torch.autograd.grad((y * weight).sum(), list(named.values()))))}


def padding():
    return torch.arange(N) >= torch.tensor([N, 4, 1])[:, None]


@each
def test_output_and_gradients(name):
    theirs, ours = loud(THEIRS[name]()), OURS[name]()
    ours.load_state_dict(theirs.state_dict())
    x = draw(name)
    expected = results(theirs, x)
    assert_close(results(ours, x), expected)
    # the batch is pooled entry by entry
    assert_close(ours(x[1:2]), expected["y"][1:2])


def test_padding_of_coca():
    theirs, ours = loud(Coca()), loud(OURS["coca"]())
    x = draw("coca")
    assert_close(results(ours, x, padding()), results(theirs, x, padding()))


def test_padding_of_siglip2():
    modeling = pytest.importorskip("transformers.models.siglip2.modeling_siglip2")
    config = modeling.Siglip2VisionConfig(hidden_size=DIM, num_attention_heads=H, intermediate_size=40)
    config._attn_implementation = "eager"
    theirs, ours = loud(modeling.Siglip2MultiheadAttentionPoolingHead(config).double()), OURS["siglip"]()
    ours.load_state_dict(theirs.state_dict())
    x = draw("siglip")
    assert_close(results(ours, x, padding()), results(theirs, x, (~padding()).long()))


@pytest.mark.parametrize(("name", "queries"), [("coca", 5), ("siglip", 1)])
def test_the_batch_shares_its_queries(name, queries, monkeypatch):
    """One batch entry of queries arrives at the attention: nothing is copied per entry."""
    shapes = []

    def spy(q, k, v, *rest, attend=multihead.cross_attention, **named):
        shapes.append(q.shape)
        return attend(q, k, v, *rest, **named)

    monkeypatch.setattr(multihead, "cross_attention", spy)
    OURS[name]()(draw(name))
    assert shapes == [(1, H, queries, DIM // H)]


@each
def test_state_dict(name):
    ours, theirs = loud(OURS[name]()), THEIRS[name]()
    theirs.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    other = {"lost." + key: value for key, value in ours.state_dict().items()}
    first = next(iter(ours.state_dict()))
    with pytest.raises(RuntimeError, match=rf"(?s)Missing.*{first}.*Unexpected.*lost\.{first}"):
        ours.load_state_dict(other)


@each
def test_the_output_projection_is_called(name):
    layer = loud(OURS[name]())
    x = draw(name)
    home, key = {"coca": (layer, "attn"), "siglip": (layer, "attention"), "clip": (layer, "c_proj")}[name]
    if name != "clip":
        home, key = getattr(home, key), "out_proj"
    before = results(layer, x)["y"]
    seen = []
    plain = getattr(home, key)

    class Adapter(nn.Module):
        def forward(self, t):
            seen.append(t.shape)
            return plain(t)

    setattr(home, key, Adapter())
    assert torch.equal(layer(x), before) and len(seen) == 1


@each
def test_compiles_into_one_graph(name):
    layer = loud(OURS[name]())
    x = draw(name)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, again = layer(x), compiled(x)
    assert_close(again, y)
    gradients = [torch.autograd.grad(t.pow(2).sum(), [*layer.parameters(), x]) for t in (y, again)]
    assert_close(gradients[1], gradients[0])


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    layer, x = loud(OURS[name]()), draw(name)
    expected = layer(x)
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert (y - expected).abs().max() < 16 * torch.finfo(dtype).eps * expected.abs().max()


@each
def test_reset_parameters(name):
    layer, fresh = loud(OURS[name]()), OURS[name]()
    layer.reset_parameters()
    for (key, p), q in zip(layer.named_parameters(), fresh.parameters()):
        constant = q.std() == 0
        assert torch.equal(p, q) if constant else 0.4 < p.std() / q.std() < 2.5, key


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("coca", "n_queries=5, d_model=32\n"),
        ("siglip", "hidden_size=32\n"),
        ("clip", "10 positions, embed_dim=32, num_heads=4\n"),
    ],
)
def test_repr(name, said):
    assert said in repr(OURS[name]())


def test_wrong_maps():
    with pytest.raises(ValueError, match=r"x must be a map of 32 channels and 9 places, got \(3, 32, 3, 4\)"):
        OURS["clip"]()(torch.zeros(3, 32, 3, 4, **F64))
    with pytest.raises(ValueError, match="embed_dim=30 and num_heads=4"):
        AttentionPooling2d(3, 30, 4)
