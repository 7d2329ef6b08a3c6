"""The integration with diffusers: who is moved and who is left alone, the backend, the processor."""

import copy
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
from crossattn_kernels.integrations.diffusers.processor import CrossAttnProcessor  # noqa: E402
from tests.diffusers_models import TEXT, cross_modules, draw, state, step, unet, wan, wan_inputs  # noqa: E402


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


@pytest.mark.parametrize("installed", ["0.39.1", "0.44.0.dev0", "1.0", "1.dev0"])
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
    with pytest.raises(ImportError, match=r"pip install '\.\[diffusers\]' in the checkout"):
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
