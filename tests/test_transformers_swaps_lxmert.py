"""LXMERT's cross-attention, both directions of one shared module, against the library's."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LxmertConfig, LxmertModel

from crossattn_kernels.integrations import transformers as integration
from crossattn_kernels.integrations.transformers import swaps
from tests.swapping import Calls, applied, assert_rounding, attending_modules, drawn, worst


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


@pytest.fixture(scope="module")
def model():
    config = LxmertConfig(
        vocab_size=40, hidden_size=32, num_attention_heads=4, intermediate_size=48, l_layers=1, x_layers=2, r_layers=1,
        visual_feat_dim=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return drawn(LxmertModel(config))


def inputs(masked: bool) -> dict:
    generator = torch.Generator().manual_seed(2)
    given = dict(
        input_ids=torch.randint(40, (2, 7), generator=generator),
        visual_feats=torch.randn(2, 5, 12, generator=generator, dtype=torch.float64),
        visual_pos=torch.rand(2, 5, 4, generator=generator, dtype=torch.float64),
    )
    if masked:
        # the second text is all padding: finfo.min everywhere makes it uniform
        given["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0] * 7])
        given["visual_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    return given


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_outputs_and_gradients(model, calls, train, masked):
    assert_rounding(worst(model, inputs(masked), train))
    assert calls.count == 4, "two layers, each in both directions"
    assert calls.weights == 0


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_output_attentions(model, calls, masked):
    errors = worst(model, inputs(masked), output_attentions=True)
    assert_rounding(errors)
    assert calls.weights == 2, "of the direction that the library returns"
    assert "output.cross_encoder_attentions.1" in errors


def test_the_tests_can_fail(model, calls):
    calls.error = 0.01
    errors = worst(model, inputs(True))
    with pytest.raises(AssertionError):
        assert_rounding(errors)
    assert errors["output.pooled_output"] > 1e-3


def test_only_cross_attention_is_swapped_and_everything_else_stays(model):
    swapped = copy.deepcopy(model)
    seen = []
    swapped.encoder.x_layers[0].visual_attention.att.register_forward_hook(lambda *args: seen.append(args))
    integration.apply(swapped)
    assert attending_modules(swapped) == [f"encoder.x_layers.{i}.visual_attention.att" for i in range(2)]
    assert list(swapped.state_dict()) == list(model.state_dict())
    selfs = [name for name, one in swaps.find(swapped).items() if one.reason == "self-attention"]
    assert len(selfs) == 6, "one language layer, one visual layer, two in each crossing layer"
    assert all("self" in name or "attention.self" in name for name in selfs)
    with torch.no_grad():
        swapped(**inputs(True))
    assert len(seen) == 2, "the hook sees both directions"
    integration.restore(swapped)
    assert [type(one) for one in swapped.modules()] == [type(one) for one in model.modules()]


def test_dropout(model):
    """Drawn elsewhere than in the library, so compared in the mean; and only in training."""
    att = applied(model).encoder.x_layers[0].visual_attention.att
    att.dropout.p = 0.5
    generator = torch.Generator().manual_seed(3)
    x, context = (torch.randn(1, n, 32, dtype=torch.float64, generator=generator) for n in (3, 200))
    whole = att.eval()(x, context)[0]
    torch.testing.assert_close(whole, model.eval().encoder.x_layers[0].visual_attention.att(x, context)[0])
    att.train()
    torch.manual_seed(0)
    dropped = torch.stack([att(x, context)[0] for _ in range(400)])
    off = (dropped - whole).abs().amax((1, 2, 3))
    assert off.min() > 0 and (dropped.mean(0) - whole).abs().max() < 0.2 * off.mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision(model, dtype):
    """Twice the library's own error and one rounding, also where a text is all padding: finfo(dtype).min."""
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs(True).items()}
    ours = applied(model).eval()
    with torch.no_grad():
        exact = model.eval()(**inputs(True)).language_output
        theirs, got = (copy.deepcopy(one).to(dtype)(**given).language_output.double() for one in (model, ours))
    budget = 2 * (theirs - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= budget


def test_compile(model):
    swapped = applied(model).eval()
    whole = swapped(**inputs(True)).pooled_output
    compiled = torch.compile(swapped, backend="aot_eager")(**inputs(True)).pooled_output
    torch.testing.assert_close(compiled, whole)
