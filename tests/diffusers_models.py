"""Tiny models of diffusers that tests share, and a step of one.  Not a test file."""

import diffusers
import torch

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


def wan_inputs(queries=2):
    return dict(
        hidden_states=draw(2, 4, queries, 4, 4),
        timestep=torch.tensor([3, 500]),
        encoder_hidden_states=draw(2, TEXT, 16),
    )


def step(model, text, t=3):
    return model(draw(2, 4, 8, 8), torch.tensor(t), text).sample


def state(model):
    """What `apply` could touch: by identity."""
    return [
        (id(m.processor), dict(vars(m.processor)), "forward" in vars(m))
        for m in model.modules()
        if getattr(m, "processor", None) is not None
    ] + [name for name, m in model.named_modules() if "forward" in vars(m)]
