"""PyTorch's own attention is the yardstick: every argument, outputs and gradients, and the calls of unchanged code."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from crossattn_kernels import cross_attention
from crossattn_kernels.integrations import sdpa
from crossattn_kernels.integrations.sdpa import scaled_dot_product_attention, sdpa_override


def draw(*shape, seed=0, dtype=torch.float64):
    """Large enough that the softmax is far from uniform."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (2 * torch.randn(*shape, generator=generator, dtype=dtype)).requires_grad_()


def bits(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def compare(q, k, v, **arguments):
    """Outputs and the gradients of everything that has one."""
    leaves = [t for t in (q, k, v, arguments.get("attn_mask")) if t is not None and t.dtype.is_floating_point]
    results = []
    for attend in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        y = attend(q, k, v, **arguments)
        weights = torch.arange(1.0, y.numel() + 1, dtype=y.dtype).sin().reshape(y.shape)
        results.append((y, *torch.autograd.grad((y * weights).sum(), leaves)))
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


SHAPES = {
    "4 dimensions": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "Dv differs": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "2 dimensions": ((5, 8), (7, 8), (7, 8)),
    "3 dimensions": ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    "3 dimensions, one q": ((1, 5, 8), (3, 7, 8), (3, 7, 8)),
    "5 dimensions": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8)),
    "5 dimensions that broadcast": ((2, 1, 4, 5, 8), (1, 3, 4, 7, 8), (2, 3, 4, 7, 8)),
    "5 dimensions, one batch of keys": ((2, 3, 4, 5, 8), (1, 1, 4, 7, 8), (1, 1, 4, 7, 8)),
    "one batch of q": ((1, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "one batch of v": ((2, 4, 5, 8), (2, 4, 7, 8), (1, 4, 7, 8)),
    "fewer dimensions of q": ((4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "fewer dimensions of k and v": ((2, 4, 5, 8), (4, 7, 8), (7, 8)),
    "one head of k and v": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "one head of v": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 1, 7, 8)),
    "one head of q": ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "as many queries as keys": ((2, 4, 7, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "no queries": ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes_broadcast_as_torch_has_it(shapes, causal):
    compare(*(draw(*shape, seed=i) for i, shape in enumerate(shapes)), is_causal=causal)


@pytest.mark.parametrize("sizes", [(5, 9), (9, 5)], ids=["more keys", "more queries"])
def test_causal_is_aligned_to_the_top_left(sizes):
    M, N = sizes
    q, k, v = draw(2, 3, M, 8), draw(2, 3, N, 8, seed=1), draw(2, 3, N, 8, seed=2)
    compare(q, k, v, is_causal=True)
    first = scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, 0]
    torch.testing.assert_close(first, v[:, :, 0])


MASKS = {
    "bool (B, H, M, N)": bits(2, 4, 5, 7),
    "bool (B, 1, 1, N)": bits(2, 1, 1, 7),
    "bool (M, N)": bits(5, 7),
    "bool (H, M, N)": bits(4, 5, 7),
    "bool with rows that see nothing": bits(2, 1, 5, 7) & (torch.arange(5) % 2 == 0)[:, None],
    "float (B, H, M, N)": draw(2, 4, 5, 7),
    "float (1, H, M, N)": draw(1, 4, 5, 7),
    "float (B, 1, 1, N)": draw(2, 1, 1, 7),
    "float (M, 1)": draw(5, 1),
    "-10000": torch.where(bits(2, 1, 1, 7), 0.0, -10000.0).double().requires_grad_(),
}


@pytest.mark.parametrize("attn_mask", MASKS.values(), ids=MASKS)
def test_masks(attn_mask):
    compare(draw(2, 4, 5, 8), draw(2, 4, 7, 8, seed=1), draw(2, 4, 7, 8, seed=2), attn_mask=attn_mask)


FIVE = {"all": draw(2, 3, 4, 5, 7), "some": draw(1, 3, 1, 5, 7), "heads": draw(4, 5, 7)}


@pytest.mark.parametrize("attn_mask", FIVE.values(), ids=FIVE)
def test_masks_of_five_dimensions(attn_mask):
    compare(draw(2, 3, 4, 5, 8), draw(2, 3, 4, 7, 8, seed=1), draw(2, 3, 4, 7, 8, seed=2), attn_mask=attn_mask)


def test_a_row_that_sees_nothing_is_zero_and_has_no_gradient():
    q, k, v = draw(1, 2, 3, 8), draw(1, 2, 5, 8, seed=1), draw(1, 2, 5, 8, seed=2)
    for hidden in (torch.zeros(3, 5, dtype=torch.bool), torch.full((3, 5), -torch.inf, dtype=torch.float64)):
        y = scaled_dot_product_attention(q, k, v, attn_mask=hidden)
        assert torch.equal(y, F.scaled_dot_product_attention(q, k, v, attn_mask=hidden))
        assert not y.any()
        assert not torch.autograd.grad(y.sum(), q)[0].any()


@pytest.mark.parametrize("heads", [(8, 2, 2), (8, 2, 4), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("lead", [(2,), (), (2, 3)], ids=str)
def test_grouped_heads(heads, lead):
    q, k, v = (draw(*lead, h, n, 8, seed=h) for h, n in zip(heads, (5, 7, 7)))
    compare(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("scale", [0.7, 1, 0.0, None])
def test_scale(scale):
    compare(draw(2, 4, 5, 8), draw(2, 4, 7, 8, seed=1), draw(2, 4, 7, 8, seed=2), scale=scale)


def test_dropout_is_that_of_cross_attention():
    q, k, v = draw(2, 4, 5, 8), draw(2, 4, 7, 8, seed=1), draw(2, 4, 7, 8, seed=2)
    torch.manual_seed(0)
    expected = cross_attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(0)
    assert torch.equal(scaled_dot_product_attention(q, k, v, None, 0.4), expected)


def test_autocast():
    q, k, v = (t.float().detach() for t in (draw(2, 4, 5, 8), draw(2, 4, 7, 8), draw(2, 4, 7, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_dot_product_attention(q, k, v).dtype == F.scaled_dot_product_attention(q, k, v).dtype


def test_what_is_refused():
    q, k = draw(2, 4, 5, 8), draw(2, 4, 7, 8)
    with pytest.raises(ValueError, match="is_causal does not go with attn_mask"):
        scaled_dot_product_attention(q, k, k, attn_mask=bits(5, 7), is_causal=True)
    with pytest.raises(ValueError, match="needs enable_gqa=True"):
        scaled_dot_product_attention(q, k[:, :2], k[:, :2])
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        scaled_dot_product_attention(q[0, 0, 0], k, k)
    with pytest.raises(ValueError, match="does not fit"):
        scaled_dot_product_attention(q, k[:, :3], k[:, :3], enable_gqa=True)
    with pytest.raises(TypeError, match="one dtype"):
        scaled_dot_product_attention(q.float(), k, k)


FIVE_Q = dict(query=draw(2, 3, 4, 5, 8), key=draw(4, 7, 8), value=draw(4, 7, 8))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(query=None), TypeError, "query must be a tensor, got NoneType: key is"),
        (dict(key=[1.0]), TypeError, "key must be a tensor, got list: query is"),
        (dict(value=draw(2, 4, 7, 8).to_sparse()), TypeError, "value must be a dense tensor, not sparse"),
        (dict(query=torch.nested.nested_tensor([draw(5, 8)])), TypeError, "query must be a dense tensor, not nested"),
        (dict(query=draw(3, 4, 5, 8)), ValueError, r"batches .* must broadcast: query is \(3, 4, 5, 8\), key is"),
        (dict(value=draw(3, 4, 7, 8)), ValueError, r"batches .* must broadcast: .*value is \(3, 4, 7, 8\)"),
        (dict(key=draw(2, 3, 7, 8), enable_gqa=True), ValueError, r"heads .* must broadcast: .*key is \(2, 3, 7, 8\)"),
        (dict(query=draw(2, 2, 4, 5, 8), key=draw(3, 1, 4, 7, 8)), ValueError, "must broadcast: query is"),
        (FIVE_Q | dict(attn_mask=bits(2, 4, 5, 7)), ValueError, r"attn_mask must .* \(2, 3, 4, 5, 7\), got \(2, 4,"),
        (FIVE_Q | dict(attn_mask=bits(3, 3, 4, 5, 7)), ValueError, r"attn_mask must .* got \(3, 3, 4, 5, 7\): q"),
        (FIVE_Q | dict(attn_mask=bits(1, 2, 3, 4, 5, 7)), ValueError, r"attn_mask must .* got \(1, 2, 3, 4, 5, 7\): q"),
        (FIVE_Q | dict(attn_mask="causal"), TypeError, "mask must be a Mask or a tensor, got str"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_bad_input_in_one_sentence(change, error, words):
    arguments = dict(query=draw(2, 4, 5, 8), key=draw(2, 4, 7, 8), value=draw(2, 4, 7, 8))
    with pytest.raises(error, match=words) as raised:
        scaled_dot_product_attention(**arguments | change)
    assert "\n" not in str(raised.value)


# ---- everybody's calls ----


@pytest.fixture
def taken(monkeypatch):
    """The shapes (M, N) of every call that came here."""
    sizes = []

    def spy(query, key, value, *args, **kwargs):
        sizes.append((query.shape[-2], key.shape[-2]))
        return scaled_dot_product_attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", spy)
    return sizes


def self_and_cross(q, k):
    y = F.scaled_dot_product_attention(q, q, q)
    return F.scaled_dot_product_attention(y, k, k, is_causal=False, attn_mask=None) + y


def test_cross_attention_comes_here_and_self_attention_does_not(taken):
    q, k = draw(2, 4, 5, 8), draw(2, 4, 7, 8)
    expected = self_and_cross(q, k)
    assert not taken
    with sdpa_override():
        torch.testing.assert_close(self_and_cross(q, k), expected)
        F.scaled_dot_product_attention(q, k, k, is_causal=True)
    assert taken == [(5, 7)]
    self_and_cross(q, k)
    assert taken == [(5, 7)]


def test_the_caller_decides(taken):
    q, k = draw(2, 4, 5, 8), draw(2, 4, 7, 8)
    with sdpa_override("all"):
        self_and_cross(q, k)
    assert taken == [(5, 5), (5, 7)]
    taken.clear()
    with sdpa_override(lambda query, key, *rest, **named: key.shape[-2] == 5):
        self_and_cross(q, k)
    assert taken == [(5, 5)]
    with pytest.raises(ValueError, match="calls must be one of 'cross', 'all', got 'self'"):
        sdpa_override("self")


def test_blocks_nest_and_an_error_leaves_them(taken):
    q, k = draw(2, 4, 5, 8), draw(2, 4, 7, 8)
    with sdpa_override():
        with sdpa_override("all"):
            self_and_cross(q, k)
        self_and_cross(q, k)
    assert taken == [(5, 5), (5, 7), (5, 7)]
    taken.clear()
    mode = sdpa_override()
    with pytest.raises(ZeroDivisionError), mode:
        raise ZeroDivisionError
    self_and_cross(q, k)
    assert not taken
    with mode, mode:  # one mode serves many times
        self_and_cross(q, k)
    assert taken == [(5, 7)]


def test_other_threads_keep_what_they_have(taken):
    q, k = draw(2, 4, 5, 8), draw(2, 4, 7, 8)
    with sdpa_override():
        thread = threading.Thread(target=self_and_cross, args=(q, k))
        thread.start()
        thread.join()
    assert not taken


def test_a_wrong_call_raises_what_torch_raises():
    q, k = draw(2, 4, 5, 8), draw(2, 4, 7, 8)
    wrong = [
        ((q, k[:, :3], k), {}),
        ((q, k.float(), k), {}),
        ((q[0, 0, 0], k, k), {}),
        ((q, k, k), dict(dropout_p=1.5)),
    ]
    for args, kwargs in wrong:
        with pytest.raises(RuntimeError) as theirs:
            F.scaled_dot_product_attention(*args, **kwargs)
        for calls in ("cross", "all"):
            with pytest.raises(RuntimeError) as ours, sdpa_override(calls):
                F.scaled_dot_product_attention(*args, **kwargs)
            assert str(ours.value) == str(theirs.value)


def test_forward_mode_stays_with_torch():
    # v is narrower than k, because torch's flash kernel for the CPU has no forward mode either
    q, k, v = (torch.randn(2, 3, *size, dtype=torch.float64) for size in ((5, 8), (7, 8), (7, 6)))

    def derivative():
        return torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, k, v), (q,), (q,))[1]

    with sdpa_override():
        found = derivative()
    torch.testing.assert_close(found, derivative())


def test_nested_tensors_stay_with_torch(taken):
    q = torch.nested.nested_tensor([torch.randn(3, 4, 8), torch.randn(5, 4, 8)], layout=torch.jagged).transpose(1, 2)
    with sdpa_override("all"):
        F.scaled_dot_product_attention(q, q, q)
    assert not taken


def test_multihead_attention_is_reached_without_weights(taken):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(32, 4, dropout=0.0, batch_first=True)
    text, image = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    results = []
    for mode in (sdpa_override(lambda *args, **kwargs: False), sdpa_override()):
        layer.zero_grad()
        with mode:
            y = layer(text, image, memory_key_padding_mask=padding)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in layer.parameters())])
    assert taken == [(5, 7)]
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    with sdpa_override():
        layer.multihead_attn(text, image, image)  # writes attention out, because weights are wanted
    assert taken == [(5, 7)]


def by_method(loss, inputs):
    for t in inputs:
        t.grad = None
    loss.backward()
    return tuple(t.grad for t in inputs)


def by_function(loss, inputs):
    torch.autograd.backward([loss], inputs=inputs)
    return tuple(t.grad for t in inputs)


@pytest.mark.parametrize("gradient", [torch.autograd.grad, by_method, by_function])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_under_the_mode(taken, gradient, use_reentrant):
    if use_reentrant and gradient is not by_method:
        pytest.skip("reentrant checkpoints refuse a choice of inputs")
    q, k = draw(2, 4, 5, 8), draw(2, 4, 7, 8)
    expected = torch.autograd.grad(self_and_cross(q, k).square().sum(), (q, k))
    with sdpa_override():
        y = checkpoint(self_and_cross, q, k, use_reentrant=use_reentrant)
        got = gradient(y.square().sum(), (q, k))
    assert taken == [(5, 7)] * 2
    torch.testing.assert_close(got, expected)


def graph_of(function, *args):
    """Names of the operators that torch.compile hands to a backend, and the result."""
    names = []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)(*args), names


@pytest.mark.parametrize("where", ["around", "within"])
def test_compiled_code(where):
    q, k = draw(2, 4, 5, 8), draw(2, 4, 7, 8)

    def within(q, k):
        with sdpa_override():
            return self_and_cross(q, k)

    if where == "around":
        with sdpa_override():
            got, names = graph_of(self_and_cross, q, k)
    else:
        got, names = graph_of(within, q, k)
    torch.testing.assert_close(got, self_and_cross(q, k))
    assert sum("crossattn" in name for name in names) == 1
    assert sum("scaled_dot_product" in name for name in names) == 1


def test_compiled_multihead_attention():
    torch.manual_seed(0)
    layer, text, image = nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 5, 32), torch.randn(2, 7, 32)

    def attend(text, image):
        return layer(text, image, image, need_weights=False)[0]

    with sdpa_override():
        got, names = graph_of(attend, text, image)
    torch.testing.assert_close(got, attend(text, image))
    assert any("crossattn" in name for name in names)
    _, names = graph_of(attend, text, image)
    assert not any("crossattn" in name for name in names)


def test_aot_autograd_compiles_the_backward_too():
    q, k = draw(2, 4, 5, 8), draw(2, 4, 7, 8)
    expected = torch.autograd.grad(self_and_cross(q, k).square().sum(), (q, k))
    torch._dynamo.reset()
    with sdpa_override():
        y = torch.compile(self_and_cross, backend="aot_eager", fullgraph=True)(q, k)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (q, k)), expected)


def test_bart(taken):
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32, init_std=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BartModel(config).eval()
    keep = torch.ones(2, 9, dtype=torch.long)
    keep[1, 5:] = 0
    given = dict(input_ids=torch.randint(3, 50, (2, 9)), decoder_input_ids=torch.randint(3, 50, (2, 6)))
    expected = model(**given, attention_mask=keep).last_hidden_state
    with sdpa_override():
        got = model(**given, attention_mask=keep).last_hidden_state
    assert taken == [(6, 9)] * 2
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
