"""The image attention of BLIP's text model and of TrOCR's decoder, in training and in generation."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import BlipTextConfig, DynamicCache, EncoderDecoderCache, TrOCRConfig, TrOCRForCausalLM
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from crossattn_kernels.integrations.transformers import swaps
from tests.swapping import Calls, applied, assert_rounding, attending_modules, drawn, worst


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


@pytest.fixture(scope="module")
def blip():
    config = BlipTextConfig(
        vocab_size=40, hidden_size=32, encoder_hidden_size=20, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        is_decoder=True, bos_token_id=1, eos_token_id=39, sep_token_id=39, pad_token_id=0,
    )  # fmt: skip
    return drawn(BlipTextLMHeadModel(config))


@pytest.fixture(scope="module")
def trocr():
    config = TrOCRConfig(
        vocab_size=40, d_model=32, cross_attention_hidden_size=20, decoder_layers=2, decoder_attention_heads=4,
        decoder_ffn_dim=48, max_position_embeddings=32, dropout=0.0, activation_dropout=0.0, attention_dropout=0.0,
        decoder_layerdrop=0.0, bos_token_id=1, eos_token_id=39, pad_token_id=0, decoder_start_token_id=2,
    )  # fmt: skip
    return drawn(TrOCRForCausalLM(config))


@pytest.fixture(params=["blip", "trocr"])
def model(request):
    return request.getfixturevalue(request.param)


def inputs(masked: bool) -> dict:
    generator = torch.Generator().manual_seed(2)
    given = dict(
        input_ids=torch.randint(3, 39, (2, 6), generator=generator),
        encoder_hidden_states=torch.randn(2, 9, 20, generator=generator, dtype=torch.float64),
        use_cache=False,
    )
    if masked:
        given["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        given["encoder_attention_mask"] = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    return given


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_outputs_and_gradients(model, calls, train, masked):
    assert_rounding(worst(model, inputs(masked), train))
    assert (calls.count, calls.weights) == (2, 0)
    calls.error = 0.01
    assert worst(model, inputs(masked), train)["output.logits"] > 1e-3


def test_output_attentions(model, calls):
    errors = worst(model, inputs(True), output_attentions=True)
    assert_rounding(errors)
    assert "output.cross_attentions.1" in errors and calls.weights == 2


def test_weights_are_not_computed_after_they_were_once_asked_for(blip, calls):
    """BLIP's recording hooks stay on the modules."""
    swapped = applied(blip)
    swapped(**inputs(False), output_attentions=True)
    calls.weights = 0
    assert swapped(**inputs(False)).cross_attentions is None and calls.weights == 0


def test_compile(blip, calls):
    """That weights are recorded is seen by a compiled model too."""
    ours = applied(blip).eval()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    expected, got = (one(**inputs(True), output_attentions=True) for one in (ours, compiled))
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.cross_attentions, expected.cross_attentions)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(model, calls, beams):
    def generated(one):
        return one.eval().generate(
            input_ids=torch.tensor([[1], [1]]), encoder_hidden_states=inputs(False)["encoder_hidden_states"],
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()), max_new_tokens=8, num_beams=beams,
            do_sample=False,
        )  # fmt: skip

    ours = applied(model)
    attention = ours.get_submodule(attending_modules(ours)[0])
    projected = []
    projection = attention.key if hasattr(attention, "key") else attention.k_proj
    projection.register_forward_hook(lambda *args: projected.append(args))
    expected = generated(model)
    assert calls.count == 0
    assert torch.equal(generated(ours), expected) and expected.shape[1] > 3
    assert calls.count >= 2 * (expected.shape[1] - 1)
    assert len(projected) == 1, "keys of the image are projected once and cached"


def test_self_attention_stays(model):
    found = swaps.find(model)
    assert sorted(str(one.reason) for one in found.values()) == ["None"] * 2 + ["self-attention"] * 2
