"""Keys and values that are kept over the denoising steps: when they are, and what spoils them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from crossattn_kernels.integrations import diffusers as integration

diffusers = pytest.importorskip("diffusers")


from crossattn_kernels.integrations.diffusers.context_cache import Memo  # noqa: E402
from tests.diffusers_models import TEXT, cross_modules, draw, state, step, unet, wan, wan_inputs  # noqa: E402


@pytest.fixture
def projected(monkeypatch):
    """The projections of text that are computed, by shape of the text."""
    shapes = []
    linear = nn.Linear.forward

    def spy(self, x):
        if x.ndim == 3 and x.shape[-1] == 24:
            shapes.append(tuple(x.shape))
        return linear(self, x)

    monkeypatch.setattr(nn.Linear, "forward", spy)
    return shapes


def test_a_text_is_projected_once(projected):
    model, text = unet(), draw(2, TEXT, 24)
    with torch.no_grad():
        expected = [step(model, text, t) for t in (3, 2, 1)]
        assert len(projected) == 3 * 8
        integration.apply(model, cache_context=True)
        projected.clear()
        for t, y in zip((3, 2, 1), expected):
            torch.testing.assert_close(step(model, text, t), y)
        assert len(projected) == 8  # keys and values of four modules


def test_a_changed_text_is_projected_again(projected):
    model, text = unet(), draw(2, TEXT, 24)
    plain = copy.deepcopy(model)
    integration.apply(model, cache_context=True)

    def expect(text, count):
        projected.clear()
        got = step(model, text)
        assert len(projected) == 8 * count
        torch.testing.assert_close(got, step(plain, text))

    with torch.no_grad():
        expect(text, 1)
        expect(text.clone(), 1)  # other memory
        expect(text, 0)
        expect(text[:], 0)  # another view of the same memory
        text.mul_(1.5)  # the same memory, written
        expect(text, 1)
        text[0].zero_()  # written through a view
        expect(text, 1)
        expect(text[:, :3], 1)  # a part of it
        expect(text, 0)
        for other in (draw(2, 4, 24), draw(2, 5, 24)):  # two texts are kept, not three
            expect(other, 1)
        expect(text, 1)
        del other


def test_a_new_text_in_the_memory_of_an_old_one_is_projected_again():
    model, plain = unet(), unet()
    integration.apply(model, cache_context=True)
    with torch.no_grad():
        for seed in range(6):
            torch.manual_seed(seed)
            text = torch.randn(2, TEXT, 24, dtype=torch.float64)
            torch.testing.assert_close(step(model, text), step(plain, text))
            del text


@pytest.mark.parametrize("assign", [False, True])
def test_changed_weights_are_noticed(assign):
    model, text = unet(), draw(2, TEXT, 24)
    integration.apply(model, cache_context=True)
    with torch.no_grad():
        first = step(model, text)
        state = {key: 2 * t if "attn2.to_v" in key else t for key, t in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)
        second = step(model, text)
        integration.restore(model)
        torch.testing.assert_close(second, step(model, text))
        assert (second - first).abs().max() > 1e-4


def test_a_step_that_pytorch_does_not_count_is_noticed():
    """Fused optimisers write weights whose version stays what it was."""
    model, text = unet(), draw(2, TEXT, 24)
    integration.apply(model, cache_context=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    with torch.no_grad():
        step(model, text)
    step(model, text).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        found = step(model, text)
        integration.restore(model)
        torch.testing.assert_close(found, step(model, text))


def test_caches_below_the_hooks_of_accelerate_are_dropped():
    hooks = pytest.importorskip("accelerate.hooks")
    model, text = unet(), draw(2, TEXT, 24)
    integration.apply(model, cache_context=True)
    for layer in (cross_modules(model)[0].to_k, cross_modules(model)[1].to_v):
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    integration.restore(model)
    assert not any(isinstance(value, Memo) for m in model.modules() for value in vars(m).values())
    with torch.no_grad():
        torch.testing.assert_close(step(model, text), step(unet(), text))


def test_a_model_that_fuses_what_it_does_not_use():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=12,
        cross_attention_dim=24, num_layers=1, caption_channels=16,
    ).double().eval()  # fmt: skip
    model.fuse_qkv_projections()
    inputs = dict(
        hidden_states=draw(2, 12, 4), encoder_hidden_states=draw(2, TEXT, 16), timestep=torch.tensor([3, 500]),
        encoder_attention_mask=torch.ones(2, TEXT), num_frames=3, height=2, width=2,
    )  # fmt: skip
    with torch.no_grad():
        expected = model(**inputs).sample
        integration.apply(model, cache_context=True)
        torch.testing.assert_close(model(**inputs).sample, expected)


def test_gradients_are_not_cached(projected):
    model, text = unet(), draw(2, TEXT, 24).requires_grad_()
    integration.apply(model, cache_context=True)
    for _ in range(2):
        step(model, text).sum().backward()
    assert len(projected) == 2 * 8
    with torch.inference_mode():
        step(model, text), step(model, text)
    assert len(projected) == 4 * 8
    with torch.no_grad():  # what no_grad keeps is not what a gradient needs
        step(model, text)
    text.grad = None
    step(model, text).sum().backward()
    assert text.grad.abs().max() > 0


def test_the_scale_of_a_lora_is_noticed():
    peft = pytest.importorskip("peft")
    model, text = unet(), draw(2, TEXT, 24)
    integration.apply(model, cache_context=True)
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    model.double().eval()
    with torch.no_grad():
        first = step(model, text)
        model.set_adapters(["default"], [0.2])
        second = step(model, text)
        integration.restore(model)
        torch.testing.assert_close(second, step(model, text))
        assert (second - first).abs().max() > 1e-6
        # the layers below a LoRA are those that are kept
        integration.apply(model, cache_context=True)
        kept = [m for m in model.modules() if isinstance(vars(m).get("forward"), Memo)]
        assert [type(m) for m in kept] == [nn.Linear] * 8
        torch.testing.assert_close(step(model, text), second)


def test_a_lora_of_what_makes_the_text_is_noticed():
    peft = pytest.importorskip("peft")
    model, inputs = wan(), wan_inputs()
    integration.apply(model, cache_context=True)
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["text_embedder.linear_1"], init_lora_weights=False))
    model.double().eval()
    with torch.no_grad():
        first = model(**inputs).sample
        model.set_adapters(["default"], [0.2])
        second = model(**inputs).sample
        integration.restore(model)
        torch.testing.assert_close(second, model(**inputs).sample)
        assert (second - first).abs().max() > 1e-6


def test_a_model_with_caches_can_be_pickled():
    model, text = unet(), draw(2, TEXT, 24)
    integration.apply(model, cache_context=True)
    with torch.no_grad():
        expected = step(model, text)
        twin = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(step(twin, text), expected)
    integration.restore(twin)
    assert not any("forward" in vars(m) for m in twin.modules())


def test_apply_again_empties_the_caches_and_without_them_drops_them(projected):
    model, text = unet(), draw(2, TEXT, 24)
    with torch.no_grad():
        for _ in range(2):
            integration.apply(model, cache_context=True)
            step(model, text)
        assert len(projected) == 2 * 8
        integration.apply(model)
        step(model, text), step(model, text)
        assert len(projected) == 4 * 8


def test_a_result_that_was_written_on_is_not_given_again():
    layer = nn.Linear(4, 4)
    memo, x = Memo(layer), torch.randn(2, 4)
    with torch.no_grad():
        expected = layer(x)
        assert memo(x) is memo(x)
        memo(x).zero_()
        torch.testing.assert_close(memo(x), expected)


def test_wan_projects_both_texts_of_guidance_once(monkeypatch):
    model, count = wan(), []
    inputs = wan_inputs()
    texts = [inputs.pop("encoder_hidden_states"), draw(2, 5, 16)]
    linear = nn.Linear.forward
    watched = [layer for m in model.blocks for layer in (m.attn2.to_k, m.attn2.to_v)]
    watched += list(model.condition_embedder.text_embedder.children())

    def spy(self, x):
        count.extend(1 for layer in watched if layer is self)
        return linear(self, x)

    monkeypatch.setattr(nn.Linear, "forward", spy)
    with torch.no_grad():
        expected = [model(**inputs, encoder_hidden_states=text).sample for text in texts]
        integration.apply(model, cache_context=True)
        count.clear()
        for _ in range(3):
            for text, y in zip(texts, expected):
                torch.testing.assert_close(model(**inputs, encoder_hidden_states=text).sample, y)
    assert len(count) == 2 * 6


def test_caches_are_refused_where_they_would_not_serve():
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        num_layers=1, cross_attention_dim=24, cross_attention_dim_t5=32, text_len=5, text_len_t5=6,
        pooled_projection_dim=16,
    )  # fmt: skip
    before = state(model)
    with pytest.raises(ValueError, match="cache_context serves UNet2DConditionModel, .*, not HunyuanDiT2DModel"):
        integration.apply(model, cache_context=True)
    assert state(model) == before


def test_compiled_code_runs_past_the_caches():
    model, text = unet(), draw(2, TEXT, 24)
    layer = cross_modules(model)[0].to_k
    integration.apply(model, cache_context=True)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(lambda x: layer(x), backend="eager", fullgraph=True)(text), layer(text)
        )
