"""The integration with diffusers: who is moved and who is left alone, the backend, the processor, the caches."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from crossattn_kernels.integrations import diffusers as integration
from crossattn_kernels.integrations import versions

diffusers = pytest.importorskip("diffusers")

from diffusers.models import attention_dispatch, attention_processor  # noqa: E402
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0  # noqa: E402

from crossattn_kernels.integrations.diffusers import moves  # noqa: E402
from crossattn_kernels.integrations.diffusers.context_cache import Memo  # noqa: E402
from crossattn_kernels.integrations.diffusers.processor import CrossAttnProcessor  # noqa: E402

TEXT = 7


def unet(**changes):
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), block_out_channels=(16,), layers_per_block=1,
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8, **changes,
    )  # fmt: skip
    return model.double().eval()


def wan():
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model.double().eval()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def cross_modules(model):
    return [m for name, m in model.named_modules() if name.endswith("attn2")]


def state(model):
    """What `apply` could touch: by identity."""
    return [
        (id(m.processor), dict(vars(m.processor)), "forward" in vars(m))
        for m in model.modules()
        if getattr(m, "processor", None) is not None
    ] + [name for name, m in model.named_modules() if "forward" in vars(m)]


@pytest.fixture(autouse=True)
def global_backend():
    """`set_attention_backend` changes it for the whole process."""
    yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)


# ---- apply, restore, report ----


@pytest.mark.parametrize("build", [unet, wan])
@pytest.mark.parametrize("cache_context", [False, True])
def test_apply_and_restore(build, cache_context):
    model = build()
    before, keys = state(model), list(model.state_dict())
    first = integration.apply(model, cache_context=cache_context)
    assert len(first.here) == len(cross_modules(model))
    processors = [id(m.processor) for m in cross_modules(model)]
    assert integration.apply(model, cache_context=cache_context) == first == integration.report(model)
    assert [id(m.processor) for m in cross_modules(model)] == processors
    assert list(model.state_dict()) == keys
    integration.restore(model)
    assert state(model) == before
    integration.restore(model)
    assert state(model) == before
    assert not integration.report(model).here


def test_the_report_is_a_table_with_reasons():
    model = unet()
    rows = {row.name: row for row in integration.report(model).rows}
    name = "mid_block.attentions.0.transformer_blocks.0.attn"
    assert rows[name + "1"][2:] == ("self", "AttnProcessor2_0", "self-attention stays")
    assert rows[name + "2"][2:] == ("cross", "AttnProcessor2_0", "apply() moves it")
    lines = str(integration.apply(model)).splitlines()
    assert f"{name}2 Attention cross crossattn (torch)".split() in [line.split() for line in lines]
    assert lines[-1] == "UNet2DConditionModel: 4 of 8 attention modules run on crossattn"


def test_other_processors_are_left_alone():
    class Custom(AttnProcessor2_0):
        pass

    model = unet()
    names = [name for name in model.attn_processors if "attn2" in name]
    adapter = attention_processor.IPAdapterAttnProcessor2_0(16, 24, num_tokens=(4,), scale=1.0).double()
    trained = attention_processor.CustomDiffusionAttnProcessor2_0(hidden_size=16, cross_attention_dim=24).double()
    others = dict(zip(names, (adapter, trained, Custom())))
    model.set_attn_processor({**model.attn_processors, **others})
    report = integration.apply(model)
    reasons = {row.name: row.why for row in report.rows}
    for name, other in others.items():
        assert model.attn_processors[name] is other
        assert reasons[name.removesuffix(".processor")] == f"{type(other).__name__} is left alone"
    assert [row.name for row in report.here] == [names[3].removesuffix(".processor")]


def test_nothing_to_replace_says_so():
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    before = state(model)
    with pytest.raises(ValueError, match="nothing to replace in UNet2DModel: none of its .* is cross-attention"):
        integration.apply(model)
    assert before and state(model) == before
    with pytest.raises(ValueError, match="nothing to replace in Linear: no attention module"):
        integration.apply(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a pipeline of diffusers or a torch module, got str"):
        integration.apply("a name")


def test_all_or_nothing(monkeypatch):
    model, made = unet(), []

    def fails_at_the_third(*args):
        made.append(args)
        if len(made) == 3:
            raise MemoryError
        return CrossAttnProcessor(*args)

    before = state(model)
    monkeypatch.setattr(moves, "CrossAttnProcessor", fails_at_the_third)
    with pytest.raises(MemoryError):
        integration.apply(model)
    assert state(model) == before


@pytest.mark.parametrize("installed", ["0.39.1", "0.44.0.dev0", "1.0"])
def test_other_versions_are_refused(monkeypatch, installed):
    monkeypatch.setattr(versions, "version", lambda name: installed)
    takers = integration.apply, integration.restore, integration.report
    calls = [integration.register, *(partial(call, unet()) for call in takers)]
    for call in calls:
        with pytest.raises(ImportError, match=f"this needs diffusers >= 0.40, < 0.44, but {installed} is installed"):
            call()


def test_without_diffusers(monkeypatch):
    def missing(name):
        raise versions.PackageNotFoundError

    monkeypatch.setattr(versions, "version", missing)
    with pytest.raises(ImportError, match=r"pip install 'crossattn_kernels\[diffusers\]'"):
        integration.report(unet())


def test_a_copy_of_a_moved_model_can_be_restored():
    model = unet()
    integration.apply(model, cache_context=True)
    twin = copy.deepcopy(model)
    text = draw(2, TEXT, 24)
    with torch.no_grad():
        expected = step(model, text)
        for m in cross_modules(twin):
            m.to_v.weight.zero_()
        assert (step(twin, text) - expected).abs().max() > 1e-4  # its caches are those of its own weights
    integration.restore(twin)
    assert not integration.report(twin).here
    assert not any("forward" in vars(m) for m in twin.modules())
    assert len(integration.report(model).here) == 4


def test_a_processor_that_others_share_is_not_redirected():
    model = wan()
    model.blocks[0].attn2.set_processor(model.blocks[0].attn1.processor)
    report = integration.apply(model)
    assert [row.name for row in report.here] == ["blocks.1.attn2"]
    assert "it shares its processor with other attention" in [row.why for row in report.rows]


# ---- the backend ----


def wan_inputs(queries=2):
    return dict(
        hidden_states=draw(2, 4, queries, 4, 4),
        timestep=torch.tensor([3, 500]),
        encoder_hidden_states=draw(2, TEXT, 16),
    )


@pytest.fixture
def taken(monkeypatch):
    """The numbers of queries and keys of every call that the backend takes."""
    from crossattn_kernels.integrations.diffusers import dispatch

    sizes = []

    def spy(q, k, v, *args, **kwargs):
        sizes.append((q.shape[2], k.shape[2]))
        return attend(q, k, v, *args, **kwargs)

    attend = dispatch.scaled_dot_product_attention
    monkeypatch.setattr(dispatch, "scaled_dot_product_attention", spy)
    return sizes


def test_register_makes_a_backend(taken):
    integration.register()
    integration.register()
    names = [name.value for name in attention_dispatch.AttentionBackendName]
    assert names.count("crossattn") == 1
    model = wan()
    expected = model(**wan_inputs()).sample
    model.set_attention_backend("crossattn")
    torch.testing.assert_close(model(**wan_inputs()).sample, expected)
    assert taken == [(8, TEXT)] * 2
    rows = {row.name: row.runs for row in integration.report(model).rows}
    assert rows["blocks.0.attn1"] == "native" and rows["blocks.0.attn2"] == "crossattn (torch)"
    taken.clear()
    model.set_attention_backend("native")
    with attention_dispatch.attention_backend("crossattn"):
        model.reset_attention_backend()
        model(**wan_inputs())
    assert taken == [(8, TEXT)] * 2


def test_apply_keeps_the_backend_of_self_attention_and_restores_that_of_cross_attention():
    model = wan()
    model.set_attention_backend("_native_math")
    attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)
    integration.apply(model)
    assert [m.attn1.processor._attention_backend.value for m in model.blocks] == ["_native_math"] * 2
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0].value == "native"
    integration.restore(model)
    assert [m.attn2.processor._attention_backend.value for m in model.blocks] == ["_native_math"] * 2


@pytest.mark.parametrize("shape", [(2, TEXT), (2, 1, 1, TEXT), (2, 3, 5, TEXT), (5, TEXT)], ids=str)
@pytest.mark.parametrize("floating", [False, True])
def test_masks_of_the_dispatcher(shape, floating, taken):
    integration.register()
    q, k, v = draw(2, 5, 3, 8), draw(2, TEXT, 3, 8), 2 * draw(2, TEXT, 3, 8)
    mask = draw(*shape) if floating else draw(*shape) < 0.5
    native, ours = (
        attention_dispatch.dispatch_attention_fn(q, k, v, mask, scale=0.4, backend=backend)
        for backend in ("native", "crossattn")
    )
    torch.testing.assert_close(ours, native)
    assert taken == [(5, TEXT)]


def test_grouped_heads_and_causal_calls_of_the_dispatcher(taken):
    integration.register()
    q, k = draw(2, 5, 4, 8), draw(2, TEXT, 2, 8)

    def run(backend, **arguments):
        return attention_dispatch.dispatch_attention_fn(q, k, k, enable_gqa=True, backend=backend, **arguments)

    torch.testing.assert_close(run("crossattn"), run("native"))
    assert taken == [(5, TEXT)]
    torch.testing.assert_close(run("crossattn", is_causal=True), run("native", is_causal=True))
    assert taken == [(5, TEXT)]


# ---- the processor ----

FIELDS = {
    "plain": dict(),
    "bias": dict(bias=True, out_bias=False),
    "group norm, residual, rescale": dict(norm_num_groups=4, residual_connection=True, rescale_output_factor=1.7),
    "norm of the text": dict(cross_attention_norm="layer_norm"),
    "group norm of the text": dict(cross_attention_norm="group_norm", cross_attention_norm_num_groups=4),
    "spatial norm": dict(spatial_norm_dim=6),
    "norm of heads": dict(qk_norm="layer_norm"),
    "rms norm of heads": dict(qk_norm="rms_norm"),
    "dropout": dict(dropout=0.3),
}


def both(attn, former, *args, **kwargs):
    """Outputs and gradients with the former processor and with ours."""
    results = []
    for one in (former, CrossAttnProcessor(former)):
        attn.set_processor(one)
        attn.zero_grad()
        torch.manual_seed(0)
        y = attn(*args, **kwargs)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        results.append([y, *(p.grad for p in attn.parameters())])
    return results


def attention(**fields):
    torch.manual_seed(0)
    attn = Attention(32, 12, heads=4, dim_head=8, **fields).double()
    with torch.no_grad():
        for p in attn.parameters():
            p.copy_(torch.randn_like(p))
    return attn


@pytest.mark.parametrize("image", [False, True], ids=["rows", "image"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_the_fields_of_attention(fields, image):
    attn = attention(**fields)
    given = dict(temb=draw(2, 6, 3, 3)) if "spatial_norm_dim" in fields else {}
    if given and not image:
        pytest.skip("a spatial norm needs an image")
    x = draw(2, 32, 3, 3) if image else draw(2, 9, 32)
    for theirs, ours in zip(*both(attn, AttnProcessor2_0(), x, draw(2, TEXT, 12), **given)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(2, TEXT), (2, 1, TEXT), (2, 9, TEXT), (8, 1, TEXT), (8, 9, TEXT)], ids=str)
@pytest.mark.parametrize("former", [AttnProcessor, AttnProcessor2_0])
def test_masks_of_processors(former, shape):
    if former is AttnProcessor and len(shape) == 2:
        pytest.skip("it takes three dimensions")
    mask = torch.where(draw(*shape) < 0.3, 0.0, -10000.0).double()
    mask[0] = -10000.0  # all padding: finite, so every key counts alike
    for theirs, ours in zip(*both(attention(), former(), draw(2, 9, 32), draw(2, TEXT, 12), mask)):
        torch.testing.assert_close(ours, theirs)


def test_the_processor_without_scale_and_without_text():
    attn = attention(scale_qk=False)
    assert attn.scale == 1 and type(attn.processor) is AttnProcessor
    for theirs, ours in zip(*both(attn, AttnProcessor(), draw(2, 9, 32), draw(2, TEXT, 12))):
        torch.testing.assert_close(ours, theirs)
    torch.manual_seed(0)
    attn = Attention(16, 16, heads=4, dim_head=8).double()
    for theirs, ours in zip(*both(attn, AttnProcessor2_0(), draw(2, 9, 16))):
        torch.testing.assert_close(ours, theirs)


# ---- the caches ----


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


def step(model, text, t=3):
    return model(draw(2, 4, 8, 8), torch.tensor(t), text).sample


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
