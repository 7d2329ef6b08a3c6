"""The weights that somebody asks for are those that `cross_attention` applies."""

import pytest
import torch

from crossattn_kernels import Mask, cross_attention
from crossattn_kernels.maps import attention_weights

MASKS = {
    "none": None,
    "ranges": Mask.causal(5, 7),
    "bool": torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.6,
    "float": torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0)),
    "a row that sees nothing": Mask.media(torch.tensor([[0, 1, 0, 0, 1]]).bool(), 4),
}


@pytest.mark.parametrize("empty_rows", ["zero", "uniform", "attend_all"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_to_the_identity_returns_the_weights(mask, empty_rows):
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16)
    identity = torch.eye(7).expand(2, 2, 7, 7)
    asked = dict(scale=0.3, softcap=2.0, empty_rows=empty_rows)
    weights = attention_weights(q, k, mask, **asked)
    torch.testing.assert_close(weights, cross_attention(q, k, identity, mask, **asked))
    assert weights.shape == (2, 4, 5, 7)


def test_the_weights_have_gradients():
    q, k = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(attention_weights, (q, k))


@pytest.mark.parametrize("dtype, size", [(torch.bfloat16, 4), (torch.float16, 4), (torch.float16, 60)])
def test_half_precision_rounds_the_weights_not_the_logits(dtype, size):
    """Products of the size 60 are beyond fp16."""
    generator = torch.Generator().manual_seed(0)
    q, k = ((size * torch.randn(1, 2, n, 64, generator=generator)).to(dtype) for n in (8, 9))
    weights = attention_weights(q, k)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, attention_weights(q.double(), k.double()).to(dtype))
    if size == 4:
        torch.testing.assert_close(weights, cross_attention(q, k, torch.eye(9).to(dtype).expand(1, 2, 9, 9)))


def test_arguments_that_are_not_of_weights_are_refused():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(TypeError, match=r"attention_weights\(\) got an unexpected keyword argument 'dropout_p'"):
        attention_weights(q, k, dropout_p=0.5)
