"""What PyTorch does around chunks: higher derivatives, transforms, autocast, calls without gradients, torch.compile."""

import functools

import pytest
import torch
from torch.autograd import forward_ad

from crossattn_kernels import Mask, cross_attention, cross_attention_chunked
from tests.test_chunked import Project, grads_of, inputs, keep


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("first", ["q", "k", "v", "bias", "w"])
def test_double_backward_raises(first, called):
    """A second derivative is an error, never a silent None; what has create_graph=True for another reason works."""
    shapes = dict(q=(1, 2, 3, 16), k=(1, 2, 5, 16), v=(1, 2, 5, 16), bias=(3, 5), gate=(), w=(16,))
    t = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}

    def pair(k, v):
        return k * t["w"], v * t["w"]

    chunk = functools.partial(pair, t["k"], t["v"]) if called else pair(t["k"], t["v"])
    loss = cross_attention_chunked(t["q"], [chunk], bias=t["bias"], gate=t["gate"]).sum()
    (g,) = torch.autograd.grad(loss, t[first], create_graph=True)
    assert torch.equal(g, grads_of(loss, t[first])[0])
    for second in t.values():
        with pytest.raises(NotImplementedError, match="cross_attention_chunked has no second derivative"):
            torch.autograd.grad(g.sum(), second, allow_unused=True, retain_graph=True)


def test_double_backward_that_gives_one_gradient_to_two():
    """k = a + b hands on one tensor twice, and still both know that they have no second derivative."""
    a, b = (torch.randn(1, 2, 5, 16, requires_grad=True) for _ in range(2))
    q = torch.randn(1, 2, 3, 16)
    chunk = functools.partial(lambda a, b: (a + b, torch.ones(1, 2, 5, 16)), a, b)
    for g in torch.autograd.grad(cross_attention_chunked(q, [chunk]).sum(), [a, b], create_graph=True):
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(g.sum(), a, retain_graph=True)


def test_the_gate_has_second_derivatives():
    """It is applied outside, by PyTorch: its gradient may be differentiated once more."""
    q, pairs = inputs((5, 6), torch.float64)
    q, gate = q.requires_grad_(), torch.randn(4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.cat(pieces, 2) for pieces in zip(*pairs))
    seconds = []
    for o in (cross_attention_chunked(q, pairs, gate=gate), cross_attention(q, k, v, gate=gate, backend="reference")):
        (g,) = torch.autograd.grad(o.square().sum(), gate, create_graph=True)
        seconds.append(torch.autograd.grad(g.square().sum(), [q, gate]))
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("called", [False, True])
def test_forward_mode_raises(called):
    """Nor is a tangent lost without a word, which a function may have captured."""
    q, (pair,) = inputs((5,))
    with forward_ad.dual_level():
        dual = tuple(forward_ad.make_dual(t, t) for t in pair)
        with torch.no_grad(), pytest.raises(NotImplementedError, match="forward-mode"):
            cross_attention_chunked(q, [(lambda: dual) if called else dual])


def test_transforms_of_torch_func():
    q, pairs = inputs((5, 6))
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(NotImplementedError, match="cross_attention_chunked cannot serve.*torch.func"):
            transform(lambda q: cross_attention_chunked(q, pairs).sum())(q)


def test_autocast():
    q, pairs = inputs((5, 6))
    with torch.autocast("cpu", torch.bfloat16):
        q.requires_grad_()
        k = pairs[0][0].requires_grad_()
        o = cross_attention_chunked(q, pairs)
    o.sum().backward()
    assert o.dtype == torch.bfloat16 and q.grad.dtype == k.grad.dtype == torch.float32


def test_autocast_of_chunks_beside_a_projected_q():
    """k and v are cast for themselves: q may have the dtype of autocast before."""
    q, pairs = inputs((5, 6))
    with torch.autocast("cpu", torch.bfloat16):
        o = cross_attention_chunked(q.bfloat16(), pairs)
    assert torch.equal(o, cross_attention_chunked(q.bfloat16(), [(k.bfloat16(), v.bfloat16()) for k, v in pairs]))


def half(enabled=True, **options):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled, **options)


@pytest.mark.parametrize("inside", [True, False])
def test_functions_share_a_weight_under_autocast(inside):
    """The cache of autocast is not a captured computation, and a backward calls as the forward did, wherever it is."""
    torch.manual_seed(0)
    project, q = Project(), torch.randn(2, 4, 5, 16, requires_grad=True)
    context, dtypes = torch.randn(2, 20, 6, requires_grad=True), []
    sources, pieces = [q, context, *project.parameters()], context.split(10, 1)

    def noted(x):
        k, v = project(x)
        dtypes.append(k.dtype)
        return k, v

    with half(inside, cache_enabled=True):
        project(context)  # fills the cache
        o = cross_attention_chunked(q, [functools.partial(noted, x) for x in pieces])
    with half(not inside):
        got = grads_of(o.float().square().sum(), sources)
    assert dtypes == 4 * [torch.bfloat16 if inside else torch.float32]
    with half(inside, cache_enabled=False):
        want = cross_attention_chunked(q, [project(x) for x in pieces])
    assert torch.equal(o, want)
    for a, b in zip(got, grads_of(want.float().square().sum(), sources)):
        assert torch.equal(a, b)


def test_functions_share_a_weight_under_autocast_without_gradients():
    project, q = Project(), torch.randn(2, 4, 5, 16)
    chunks = [functools.partial(project, x) for x in torch.randn(2, 20, 6).split(10, 1)]
    with half():
        want = cross_attention_chunked(q, chunks)
        with torch.no_grad():
            assert torch.equal(cross_attention_chunked(q, chunks), want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_functions_where_nobody_wants_a_gradient(mode):
    """They are called as they are: no graph, and what they captured does not matter."""
    x = torch.randn(2, 10, 6, requires_grad=True).sin()
    project, q = Project(), torch.randn(2, 4, 5, 16)

    def chunk():
        k, v = project(x)
        assert not k.requires_grad
        return k, v

    with mode():
        assert torch.equal(cross_attention_chunked(q, [chunk]), cross_attention_chunked(q, [project(x)]))


@pytest.mark.parametrize("called", [False, True])
def test_compile_leaves_the_call_to_python(called):
    """One graph before it and one after it, with the gradients of the call."""
    from torch._dynamo.testing import CompileCounter

    q, pairs = inputs((5, 6))
    tensors = [q.requires_grad_(), *(t.requires_grad_() for t in pairs[0])]

    def f(q, k, v):
        return cross_attention_chunked(q.sin(), [(lambda: (k, v)) if called else (k, v), pairs[1]]).cos()

    torch.compiler.reset()
    compiled = torch.compile(f, backend=(counter := CompileCounter()))
    for _ in range(2):
        got, want = compiled(*tensors), f(*tensors)
        assert torch.equal(got, want) and counter.frame_count == 2
        assert all(map(torch.equal, grads_of(got.sum(), tensors), grads_of(want.sum(), tensors)))


def test_compile_without_gradients_is_one_graph():
    q, pairs = inputs((5, 6))
    mask, bias, gate = keep(1, 11), torch.randn(11), torch.randn(4)

    def f(q, mask):
        return cross_attention_chunked(q.sin(), pairs, mask=mask, bias=bias, gate=gate).cos()

    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(f, backend="eager", fullgraph=True)(q, mask), f(q, mask))


@pytest.mark.parametrize("change", ["k", "v", "mask"])
def test_a_tensor_that_changes_before_the_backward_is_an_error(change):
    """Also one that wants no gradient: what the backward would make of it is not the gradient of what was computed."""
    q, keep = torch.randn(1, 2, 5, 8, requires_grad=True), torch.ones(1, 12, dtype=torch.bool)
    chunks = [tuple(torch.randn(1, 2, 6, 8) for _ in range(2)) for _ in range(2)]
    y = cross_attention_chunked(q, chunks, mask=Mask.key_padding(keep))
    {"k": chunks[1][0], "v": chunks[0][1], "mask": keep}[change].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_chunks_go_where_saved_tensors_go():
    """Hooks get every chunk, and the backward works with what they give back."""
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    chunks = [tuple(torch.randn(1, 2, 6, 8) for _ in range(2)) for _ in range(2)]
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t), t.clone())[1], lambda t: t):
        y = cross_attention_chunked(q, chunks)
    assert all(any(t is p or t.data_ptr() == p.data_ptr() for p in packed) for pair in chunks for t in pair)
    want = cross_attention(q, *(torch.cat(ts, 2) for ts in zip(*chunks)))
    (expected,) = torch.autograd.grad(want.sum(), q)
    for pair in chunks:
        for t in pair:
            t.zero_()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), q)[0], expected)


def test_y_is_laid_out_for_the_output_projection_whatever_the_gate():
    q, gate = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8, requires_grad=True)
    y = cross_attention_chunked(q, [(q, q)], gate=gate)
    assert y.transpose(1, 2).is_contiguous()


def test_no_chunks_at_all_is_a_type_error():
    with pytest.raises(TypeError, match="chunks must be a sequence .* got NoneType"):
        cross_attention_chunked(torch.randn(1, 1, 2, 4), None)
