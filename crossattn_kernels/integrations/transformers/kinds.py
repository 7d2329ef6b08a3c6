"""Is a module cross- or self-attention?  The models do not say it in one way, so names and attributes are read."""

from __future__ import annotations

import re

from torch import nn

# queries of these are latents, keys a context
ALWAYS_CROSS = ("Idefics2PerceiverAttention", "Idefics3PerceiverAttention", "IdeficsPerceiverAttention")
CROSS = re.compile(r"cross(?!_modal)|encoder_attn|encdec|encoder_decoder|x_attn|token_to_image|image_to_token", re.I)
SELF = re.compile(r"self", re.I)


def kind_of_class(module: nn.Module) -> str | None:
    """ "cross", "self", or None if one class serves both and this instance does not say which it is."""
    flag = getattr(module, "is_cross_attention", None)
    if isinstance(flag, bool):
        return "cross" if flag else "self"
    name = type(module).__name__
    if name in ALWAYS_CROSS or "CrossAttention" in name:
        return "cross"
    # BART, Whisper, T5 and their kin: what a decoder does without being causal is to look at the encoder
    causal = getattr(module, "is_causal", None)
    if isinstance(causal, bool) and getattr(module, "is_decoder", False):
        return "self" if causal else "cross"
    return None


def kind_of(path: str, module: nn.Module, parent: nn.Module) -> str | None:
    """The same with the name under which a model holds the module, and with what holds it."""
    known = kind_of_class(module)
    if known == "cross" and path.endswith("self_attn") and type(module).__name__ not in ALWAYS_CROSS:
        # NLLB-MoE, Pegasus-X and BigBird-Pegasus mask what is causal and do not call it so
        return "self"
    if known is not None:
        return known
    names = [type(module).__name__, *path.split(".")[-3:], type(parent).__name__]
    if any(CROSS.search(name) for name in names):
        return "cross"
    return "self" if any(SELF.search(name) for name in names) else None
