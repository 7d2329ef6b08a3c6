"""Which modules of transformers are swapped for ours, where the library does not look up its attention function.

A swap assigns `module.__class__`: parameters, hooks and state dict stay as they are, and the class to return to is
`upstream_class(type(module))`.  `find` says what `apply` assigns and what `report` prints.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from torch import nn

PACKAGE = "crossattn_kernels"
OURS = f"{PACKAGE}.integrations.transformers"
MODELS = "transformers.models"
DINO = f"{MODELS}.grounding_dino.modeling_grounding_dino"
MM_DINO = f"{MODELS}.mm_grounding_dino.modeling_mm_grounding_dino"
MASK2FORMER = f"{MODELS}.mask2former.modeling_mask2former"
ONEFORMER = f"{MODELS}.oneformer.modeling_oneformer"

# classes that attend across wherever they stand, or can tell by themselves (`crossattn_reason`)
SWAPS = {
    f"{MODELS}.perceiver.modeling_perceiver.PerceiverSelfAttention": f"{OURS}.perceiver.PerceiverSelfAttention",
    f"{MODELS}.idefics.perceiver.IdeficsPerceiverAttention": f"{OURS}.idefics_perceiver.IdeficsPerceiverAttention",
    f"{DINO}.GroundingDinoBiMultiHeadAttention": f"{OURS}.grounding_dino.GroundingDinoBiMultiHeadAttention",
    f"{MM_DINO}.MMGroundingDinoBiMultiHeadAttention": f"{OURS}.grounding_dino.MMGroundingDinoBiMultiHeadAttention",
}

# classes that attend to themselves or across: the owner says which of its children attends across
OWNERS = {
    f"{MODELS}.lxmert.modeling_lxmert.LxmertCrossAttentionLayer": {"att": f"{OURS}.lxmert.LxmertAttention"},
    f"{DINO}.GroundingDinoDecoderLayer": {
        "encoder_attn_text": f"{OURS}.grounding_dino.GroundingDinoMultiheadAttention"
    },
    f"{MM_DINO}.MMGroundingDinoDecoderLayer": {
        "encoder_attn_text": f"{OURS}.grounding_dino.MMGroundingDinoMultiheadAttention"
    },
    f"{MODELS}.blip.modeling_blip_text.BlipTextLayer": {"crossattention.self": f"{OURS}.blip.BlipTextSelfAttention"},
    f"{MODELS}.trocr.modeling_trocr.TrOCRDecoderLayer": {"encoder_attn": f"{OURS}.trocr.TrOCRAttention"},
    # nn.MultiheadAttention
    f"{MASK2FORMER}.Mask2FormerMaskedAttentionDecoderLayer": {"cross_attn": f"{OURS}.heads.MultiheadAttention"},
    f"{ONEFORMER}.OneFormerTransformerDecoderLayer": {"cross_attn.multihead_attn": f"{OURS}.heads.MultiheadAttention"},
    f"{ONEFORMER}.OneFormerTransformerDecoderQueryTransformerDecoderLayer": {
        "multihead_attn": f"{OURS}.heads.OutputOnly"
    },
    f"{MODELS}.siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead": {"attention": f"{OURS}.heads.OutputOnly"},
    f"{MODELS}.siglip2.modeling_siglip2.Siglip2MultiheadAttentionPoolingHead": {
        "attention": f"{OURS}.heads.OutputOnly"
    },
    f"{MODELS}.idefics2.modeling_idefics2.Idefics2MultiheadAttentionPoolingHead": {
        "attention": f"{OURS}.heads.OutputOnly"
    },
    f"{MODELS}.phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalVisionMultiheadAttentionPoolingHead": {
        "attention": f"{OURS}.heads.OutputOnly"
    },
    f"{MODELS}.aria.modeling_aria.AriaCrossAttention": {"multihead_attn": f"{OURS}.heads.OutputOnly"},
}

# classes that do not attend: they pass on whether anybody wants weights
TELLERS = {
    f"{DINO}.GroundingDinoEncoder": f"{OURS}.grounding_dino.GroundingDinoEncoder",
    f"{DINO}.GroundingDinoDecoderLayer": f"{OURS}.grounding_dino.GroundingDinoDecoderLayer",
    f"{MM_DINO}.MMGroundingDinoEncoder": f"{OURS}.grounding_dino.MMGroundingDinoEncoder",
    f"{MM_DINO}.MMGroundingDinoDecoderLayer": f"{OURS}.grounding_dino.MMGroundingDinoDecoderLayer",
    f"{MASK2FORMER}.Mask2FormerMaskedAttentionDecoderLayer": (
        f"{OURS}.mask2former.Mask2FormerMaskedAttentionDecoderLayer"
    ),
    f"{ONEFORMER}.OneFormerTransformerDecoderLayer": f"{OURS}.oneformer.OneFormerTransformerDecoderLayer",
}


class Swap(NamedTuple):
    replacement: type[nn.Module] | None  # None: the module stays as it is
    reason: str | None  # why it stays
    attends: bool  # False for a class of TELLERS


def find(model: nn.Module) -> dict[str, Swap]:
    """What becomes of every module of `model` that these tables know, by its name; a swapped module is found again."""
    found: dict[str, Swap] = {}
    shared = {path.rpartition(".")[2] for children in OWNERS.values() for path in children.values()}
    for name, module in model.named_modules():
        known = qualified_name(upstream_class(type(module)))
        if known in TELLERS:
            found[name] = Swap(_class(TELLERS[known]), None, False)
        if known in SWAPS:
            found[name] = _swap(module, SWAPS[known])
        elif known.rpartition(".")[2] in shared and known.startswith(MODELS):
            # an owner comes before its children, so that it has spoken
            found.setdefault(name, Swap(None, "self-attention", True))
        for child, path in OWNERS.get(known, {}).items():
            try:
                below = module.get_submodule(child)
            except AttributeError:  # a layer without cross-attention
                continue
            found[f"{name}.{child}".removeprefix(".")] = _swap(below, path)
    return found


def upstream_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of the library that a class of these files replaces; any other class itself, our layers' too."""
    if not cls.__module__.startswith(f"{OURS}."):
        return cls
    return next(base for base in cls.__mro__ if not base.__module__.startswith(f"{PACKAGE}."))


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _swap(module: nn.Module, path: str) -> Swap:
    replacement = _class(path)
    expected, given = upstream_class(replacement), upstream_class(type(module))
    if given is not expected:
        return Swap(None, f"its class is {qualified_name(given)}, not {qualified_name(expected)}", True)
    reason = getattr(replacement, "crossattn_reason", lambda module: None)(module)
    return Swap(None if reason else replacement, reason, True)


def _class(path: str) -> type[nn.Module]:
    module, _, name = path.rpartition(".")
    cls: type[nn.Module] = getattr(import_module(module), name)
    return cls
