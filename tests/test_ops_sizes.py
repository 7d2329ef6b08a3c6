"""The border with PyTorch: one graph although torch.compile knows some sizes as numbers and others as symbols."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crossattn_kernels import cross_attention
from crossattn_kernels.layers import CrossAttention, GatedCrossAttentionBlock, MultiheadCrossAttention

B, H, N, D = 2, 4, 20, 8
LONG = (16, 7, 9)  # numbers of queries: the second makes of M a symbol, the third comes with a size that is a number


def bits(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.8


def heads(*lead: int, length: int) -> Tensor:
    return torch.randn(*lead, length, D)


K = torch.randn(B, H, N, D)
OPTIONS: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "mask (M, N)": lambda m: dict(mask=bits(m, N)),
    "mask (B, 1, 1, N)": lambda m: dict(mask=bits(B, 1, 1, N)),
    "mask (B, Hq, M, 1)": lambda m: dict(mask=bits(B, H, m, 1)),
    "bias (M, N)": lambda m: dict(bias=torch.randn(m, N)),
    "bias (Hq, 1, N)": lambda m: dict(bias=torch.randn(H, 1, N)),
    "gate (Hq,)": lambda m: dict(gate=torch.randn(H)),
    "gate (Hq, Dv)": lambda m: dict(gate=torch.randn(H, D)),
    "gate (B, 1, M, 1)": lambda m: dict(gate=torch.randn(B, 1, m, 1)),
    "scale (Hq,)": lambda m: dict(scale=torch.randn(H)),
}


def compiled(f: Callable[..., Tensor], dynamic: bool | None = None) -> Callable[..., Tensor]:
    """What is asked about sizes is asked while tracing: the code that is made of the graph does not matter."""
    return torch.compile(f, fullgraph=True, dynamic=dynamic, backend="eager")


def attends(q: Tensor, option: dict[str, Tensor]) -> Tensor:
    return cross_attention(q, K, K, **option, backend="torch")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def check(f: Callable[..., Tensor], inputs: Callable[[int], Tensor], option: Callable[[int], Any], none: Any) -> None:
    """Without the option until M is a symbol, then with it; at last from the start with symbols for all sizes."""
    first, second, third = LONG
    graph = compiled(f)
    for m, given in ((first, none), (second, none), (third, option(third)), (first, option(first))):
        x = inputs(m)
        torch.testing.assert_close(graph(x, given), f(x, given))
    torch.compiler.reset()
    graph = compiled(f, dynamic=True)
    for m in LONG:
        x, given = inputs(m), option(m)
        torch.testing.assert_close(graph(x, given), f(x, given))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_call(name):
    check(attends, lambda m: heads(B, H, length=m), OPTIONS[name], {})


@pytest.mark.parametrize("name", OPTIONS)
def test_options_where_heads_and_batch_are_symbols(name):
    """The batch and the number of heads vary first; then both are those of the option."""
    graph = compiled(lambda q, k, option: cross_attention(q, k, k, **option, backend="torch"))
    for b, h in ((3, 2), (5, 8)):
        graph(heads(b, h, length=9), heads(b, h, length=N), {})
    q, option = heads(B, H, length=9), OPTIONS[name](9)
    torch.testing.assert_close(graph(q, K, option), attends(q, option))


def test_a_batch_of_one_beside_a_symbol():
    graph = compiled(lambda q, k: cross_attention(q, k, k, backend="torch"))
    for batches in ((3, 3), (5, 5), (1, 4), (6, 1), (7, 7)):
        q, k = heads(batches[0], H, length=5), heads(batches[1], H, length=N)
        torch.testing.assert_close(graph(q, k), cross_attention(q, k, k, backend="torch"))


@pytest.mark.parametrize("batch", [B, 1])
def test_residual_of_a_layer(batch):
    layer, context = CrossAttention(32, heads=4, gate="channel"), torch.randn(B, N, 32)
    torch.nn.init.ones_(layer.gate)
    check(
        lambda x, residual: layer(x, context, residual=residual),
        lambda m: torch.randn(B, m, 32),
        lambda m: torch.randn(batch, m, 32),
        None,
    )


@pytest.mark.parametrize("batch", [B, 1])
def test_media_locations_of_a_block(batch):
    block, media = GatedCrossAttentionBlock(32, dim_head=8, heads=4), torch.randn(B, 2, 3, 32)
    torch.nn.init.ones_(block.attn_gate)
    check(
        lambda x, locations: block(x, media, locations),
        lambda m: torch.randn(B, m, 32),
        lambda m: torch.rand(batch, m) < 0.3,
        None,
    )
    graph = compiled(lambda x, media, locations: block(x, media, locations))
    for b in (3, 5):
        graph(torch.randn(b, 6, 32), torch.randn(b, 2, 3, 32), None)
    x, locations = torch.randn(B, 6, 32), torch.rand(B, 6) < 0.3
    torch.testing.assert_close(graph(x, media, locations), block(x, media, locations))


@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
def test_masks_of_multihead_attention(name):
    layer, query = MultiheadCrossAttention(32, 4, batch_first=True), torch.randn(B, 6, 32)
    check(
        lambda key, mask: layer(query, key, key, need_weights=False, **{name: mask})[0],
        lambda n: torch.randn(B, n, 32),
        lambda n: bits(*((B, n) if name == "key_padding_mask" else (6, n))),
        None,
    )


def test_a_query_of_batch_one_for_multihead_attention():
    layer = MultiheadCrossAttention(32, 4, batch_first=True)
    graph = compiled(lambda query, key: layer(query, key, key, need_weights=False)[0])
    for batches in ((3, 3), (5, 5), (1, 4), (6, 6)):
        query, key = (torch.randn(b, 7, 32) for b in batches)
        torch.testing.assert_close(graph(query, key), layer(query, key, key, need_weights=False)[0])
