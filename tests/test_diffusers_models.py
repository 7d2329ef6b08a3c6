"""diffusers' own classes, before and after `apply`: outputs and every gradient."""

import pytest
import torch

from crossattn_kernels.functional import cross_attention
from crossattn_kernels.integrations import diffusers as integration
from crossattn_kernels.integrations.sdpa import sdpa_override

diffusers = pytest.importorskip("diffusers")

TEXT = 7


def redraw(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that attention is far from uniform; fp64, so that what is left is not rounding."""
    generator = torch.Generator().manual_seed(0)
    model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.ndim > 1:
                p.copy_(noise * (2.0 if "to_q" in name or "to_k" in name else 1.0) / p[0].numel() ** 0.5)
            else:
                p.copy_(1 + 0.2 * noise if "norm" in name and "weight" in name else 0.2 * noise)
    return model


def draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def keep(masked: bool) -> torch.Tensor | None:
    """Padding of a text, True may be seen."""
    return torch.arange(TEXT)[None] < torch.tensor([[TEXT], [4]]) if masked else None


def unet(**changes):
    """Heads of 40, as in Stable Diffusion 1.5."""
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 80), layers_per_block=1,
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8, dropout=0.1, **changes,
    )  # fmt: skip


def unet_inputs(masked=False):
    return dict(
        sample=draw(2, 4, 8, 8), timestep=torch.tensor([3, 500]), encoder_hidden_states=draw(2, TEXT, 24),
        encoder_attention_mask=keep(masked),
    )  # fmt: skip


def pixart():
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=2, dropout=0.1,
        cross_attention_dim=144, sample_size=8, patch_size=2, caption_channels=20, norm_num_groups=8,
    )  # fmt: skip


def pixart_inputs(masked=False):
    return dict(
        hidden_states=draw(2, 4, 8, 8), encoder_hidden_states=draw(2, TEXT, 20), timestep=torch.tensor([3, 500]),
        added_cond_kwargs=dict(resolution=None, aspect_ratio=None), encoder_attention_mask=keep(masked),
    )  # fmt: skip


def sana(**changes):
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2, patch_size=1,
        num_cross_attention_heads=2, cross_attention_head_dim=112, cross_attention_dim=32, caption_channels=20,
        sample_size=8, dropout=0.1, **changes,
    )  # fmt: skip


def sana_inputs(masked=False):
    return dict(
        hidden_states=draw(2, 4, 8, 8), encoder_hidden_states=draw(2, TEXT, 20), timestep=torch.tensor([3, 500]),
        encoder_attention_mask=keep(masked),
    )  # fmt: skip


def hunyuan():
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=88, in_channels=4, patch_size=2, sample_size=8, hidden_size=176,
        num_layers=2, cross_attention_dim=24, cross_attention_dim_t5=32, text_len=5, text_len_t5=6,
        pooled_projection_dim=16, mlp_ratio=1.0,
    )  # fmt: skip


def hunyuan_inputs(masked=False):
    angles = draw(16, 44).repeat_interleave(2, 1)
    return dict(
        hidden_states=draw(2, 4, 8, 8), timestep=torch.tensor([3, 500]).double(), encoder_hidden_states=draw(2, 5, 24),
        text_embedding_mask=torch.ones(2, 5), encoder_hidden_states_t5=draw(2, 6, 32),
        text_embedding_mask_t5=torch.ones(2, 6), image_meta_size=draw(2, 6), style=torch.zeros(2, dtype=torch.long),
        image_rotary_emb=(angles.cos(), angles.sin()),
    )  # fmt: skip


def wan():
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def wan_inputs(masked=False):
    return dict(
        hidden_states=draw(2, 4, 2, 4, 4), timestep=torch.tensor([3, 500]), encoder_hidden_states=draw(2, TEXT, 16)
    )


def ltx():
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=12,
        cross_attention_dim=24, num_layers=2, caption_channels=16,
    )  # fmt: skip


def ltx_inputs(masked=False):
    return dict(
        hidden_states=draw(2, 12, 4), encoder_hidden_states=draw(2, TEXT, 16), timestep=torch.tensor([3, 500]),
        encoder_attention_mask=keep(True) if masked else torch.ones(2, TEXT), num_frames=3, height=2, width=2,
    )  # fmt: skip


# name: model, inputs, modules of cross-attention, whether a mask of the text reaches them
MODELS = {
    "unet": (unet, unet_inputs, 4, True),
    "pixart": (pixart, pixart_inputs, 2, True),
    "sana": (sana, sana_inputs, 2, True),
    "sana with norms": (lambda: sana(qk_norm="rms_norm_across_heads"), sana_inputs, 2, True),
    "hunyuan": (hunyuan, hunyuan_inputs, 2, False),
    "wan": (wan, wan_inputs, 2, False),
    "ltx": (ltx, ltx_inputs, 2, True),
}
CASES = [(name, masked) for name, (*_, reached) in MODELS.items() for masked in range(1 + reached)]


def run(model, inputs):
    """Output, and the gradients of all parameters and of all inputs that have one."""
    model.zero_grad()
    inputs = {
        name: t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.dtype == torch.float64 else t
        for name, t in inputs.items()
    }
    torch.manual_seed(0)  # of the dropout
    y = model(**inputs).sample
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    leaves = [*model.named_parameters(), *((n, t) for n, t in inputs.items() if isinstance(t, torch.Tensor))]
    return dict(output=y.detach()) | {name: t.grad for name, t in leaves if t.grad is not None}


def assert_same(ours, theirs, tolerance=2e-5):
    """Within a part of the largest value of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).abs().max()
        assert error <= tolerance * expected.abs().max() + 1e-12, f"{name}: {error} of {expected.abs().max()}"


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of `cross_attention` by processor or backend."""
    from crossattn_kernels.integrations import sdpa
    from crossattn_kernels.integrations.diffusers import processor

    seen = []

    def spy(q, k, v, mask=None, **rest):
        seen.append((q.shape, k.shape, None if mask is None else mask.shape))
        return cross_attention(q, k, v, mask, **rest)

    monkeypatch.setattr(processor, "cross_attention", spy)
    monkeypatch.setattr(sdpa, "cross_attention", spy)
    return seen


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name, masked", CASES)
def test_outputs_and_gradients(name, masked, train, calls):
    build, inputs, modules, _ = MODELS[name]
    model = redraw(build()).train(train)
    theirs = run(model, inputs(masked))
    state = {key: t.data_ptr() for key, t in model.state_dict().items()}
    report = integration.apply(model)
    assert len(report.here) == modules
    assert not calls
    ours = run(model, inputs(masked))
    assert len(calls) == modules
    if masked and name != "ltx":  # whose own code repeats it
        assert all(mask == (2, 1, 1, TEXT) for _, _, mask in calls), "one row for all heads"
    assert_same(ours, theirs)
    assert {key: t.data_ptr() for key, t in model.state_dict().items()} == state
    integration.restore(model)
    assert_same(run(model, inputs(masked)), theirs, tolerance=0)
    assert len(calls) == modules


@pytest.mark.parametrize("name", MODELS)
def test_the_tests_can_fail(name, monkeypatch):
    """A hundredth more attention is found, in the output and in the gradients."""
    from crossattn_kernels.integrations import sdpa
    from crossattn_kernels.integrations.diffusers import processor

    def wrong(*args, **kwargs):
        return 1.01 * cross_attention(*args, **kwargs)

    build, inputs, *_ = MODELS[name]
    model = redraw(build()).eval()
    theirs = run(model, inputs())
    integration.apply(model)
    for module in (processor, sdpa):
        monkeypatch.setattr(module, "cross_attention", wrong)
    ours = run(model, inputs())
    for part in ("output", next(key for key in theirs if "attn2.to_v" in key or "attn2.to_k" in key)):
        with pytest.raises(AssertionError, match=part):
            assert_same({part: ours[part]}, {part: theirs[part]}, tolerance=4e-4)


def test_the_mode_reaches_a_unet_that_was_not_moved(calls):
    model = redraw(unet()).eval()
    theirs = run(model, unet_inputs(True))
    with sdpa_override():
        ours = run(model, unet_inputs(True))
    assert len(calls) == 4
    assert_same(ours, theirs)


def test_half_precision_stays_near(calls):
    model = redraw(pixart()).eval()
    inputs = pixart_inputs(True)
    exact = model(**inputs).sample
    model.to(torch.bfloat16)
    inputs = {
        k: t.bfloat16() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for k, t in inputs.items()
    }
    theirs = (model(**inputs).sample - exact).abs().max()
    integration.apply(model)
    assert (model(**inputs).sample - exact).abs().max() <= 2 * theirs
    assert calls


def test_gradient_checkpointing():
    model = redraw(unet()).train()
    theirs = run(model, unet_inputs(True))
    model.enable_gradient_checkpointing()
    integration.apply(model)
    assert_same(run(model, unet_inputs(True)), theirs)


def controlnet():
    return diffusers.ControlNetModel(
        in_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), block_out_channels=(16, 80),
        layers_per_block=1, cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 8),
    )  # fmt: skip


def controlnet_inputs(masked=False):
    inputs = unet_inputs()
    del inputs["encoder_attention_mask"]
    return inputs | dict(controlnet_cond=draw(2, 3, 16, 16))


CACHED = {name: model for name, model in MODELS.items() if name != "hunyuan"}
CACHED["controlnet"] = (controlnet, controlnet_inputs, 2, False)


@pytest.mark.parametrize("name", CACHED)
def test_a_text_is_projected_once_in_every_model(name):
    build, inputs, modules, masked = CACHED[name]
    model, inputs = redraw(build()).eval(), inputs(masked)
    computed = []

    def counting(compute):
        return lambda x: computed.append(x.shape) or compute(x)

    with torch.no_grad():
        theirs = model(**inputs)[0]
        integration.apply(model, cache_context=True)
        layers = [layer for path, layer in model.named_modules() if path.endswith(("attn2.to_k", "attn2.to_v"))]
        for layer in layers:
            layer.forward.compute = counting(layer.forward.compute)
        for _ in range(3):
            torch.testing.assert_close(model(**inputs)[0], theirs)
    assert len(computed) == len(layers) == 2 * modules


@pytest.mark.parametrize("name", ["unet", "wan"])
def test_compiled(name):
    build, inputs, modules, _ = MODELS[name]
    model = redraw(build()).eval()
    theirs = run(model, inputs())
    integration.apply(model)
    names = []

    def aot_eager(graph, example_inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    torch._dynamo.reset()
    model.compile(backend=aot_eager)
    assert_same(run(model, inputs()), theirs)
    assert sum("crossattn" in name for name in names) == modules


def test_lora():
    peft = pytest.importorskip("peft")
    model = unet()
    model.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    redraw(model).eval()
    theirs = run(model, unet_inputs(True))
    integration.apply(model)
    assert any("lora_A" in name for name in theirs)
    assert_same(run(model, unet_inputs(True)), theirs)


def test_a_fused_unet():
    model = redraw(unet()).eval()
    model.fuse_qkv_projections()
    theirs = run(model, unet_inputs(True))
    assert len(integration.apply(model).here) == 4
    assert_same(run(model, unet_inputs(True)), theirs)
    model.unfuse_qkv_projections()
    assert not integration.report(model).here


def test_a_pipeline():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    parts = dict(vae=vae, unet=redraw(unet()).eval(), scheduler=scheduler, **absent)
    pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)

    def generate(text):
        torch.manual_seed(0)
        asked = dict(prompt_embeds=text, negative_prompt_embeds=0 * text, output_type="latent", num_inference_steps=3)
        return pipeline(**asked, latents=draw(1, 4, 8, 8), guidance_scale=3.0).images

    texts = [draw(1, length, 24) for length in (5, 6)]
    theirs = [generate(text) for text in texts]
    report = integration.apply(pipeline, cache_context=True)
    assert [row.name.partition(".")[0] for row in report.here] == ["unet"] * 4
    assert any(row.name.startswith("vae.") and row.kind == "self" for row in report.rows)
    projected = []
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    compute = layer.forward.compute
    layer.forward.compute = lambda x: projected.append(x.shape) or compute(x)
    for text, expected in zip(texts, theirs):
        assert_same(dict(latents=generate(text)), dict(latents=expected))
    assert projected == [(2, 5, 24), (2, 6, 24)]  # once a generation of three steps
