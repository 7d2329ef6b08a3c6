"""Every attention module of a pipeline or model: what it is, what it runs on, and whether it can run here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from crossattn_kernels.integrations.diffusers import dispatch
from crossattn_kernels.integrations.diffusers.processor import CrossAttnProcessor
from crossattn_kernels.integrations.reports import HERE, Report, Row, runs_here

# processors that `CrossAttnProcessor` stands in for; True: they normalise heads, False: all channels
KNOWN = {
    "diffusers.models.attention_processor.AttnProcessor": True,
    "diffusers.models.attention_processor.AttnProcessor2_0": True,
    "diffusers.models.attention_processor.FusedAttnProcessor2_0": True,
    "diffusers.models.attention_processor.HunyuanAttnProcessor2_0": True,
    "diffusers.models.attention_processor.FusedHunyuanAttnProcessor2_0": True,
    "diffusers.models.transformers.sana_transformer.SanaAttnProcessor2_0": False,
}
NAMED_CROSS = ("attn2", "audio_attn2", "cross_attn", "cross_attention")
NAMED_SELF = ("attn1", "audio_attn1", "self_attn", "self_attention")


class Found(NamedTuple):
    """One attention module."""

    name: str
    module: Any
    kind: str  # "cross", "self", or "?" if nothing says which
    reason: str  # why it cannot run here; empty if it can

    @property
    def processor(self) -> Any:
        return self.module.processor

    @property
    def dispatched(self) -> bool:
        """Its processor asks diffusers' dispatcher, which chooses a backend."""
        return hasattr(self.processor, "_attention_backend")

    @property
    def runs(self) -> str:
        """HERE, diffusers' name of a backend, or the class of the processor."""
        if not self.dispatched:
            return HERE if isinstance(self.processor, CrossAttnProcessor) else type(self.processor).__name__
        backend = self.processor._attention_backend
        name = getattr(backend, "value", backend) or dispatch.active()
        # our backend sends self-attention there
        return "native" if name == HERE and self.kind == "self" else name


def models(target: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by name; a model is its own, without a name."""
    if isinstance(target, nn.Module):
        return {"": target}
    parts = getattr(target, "components", None)
    if not isinstance(parts, dict):
        raise TypeError(f"expected a pipeline of diffusers or a torch module, got {type(target).__name__}")
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def survey(target: Any) -> Iterator[Found]:
    """Every attention module below a pipeline or model."""
    modules = [
        (f"{prefix}.{name}".strip("."), module)
        for prefix, model in models(target).items()
        for name, module in model.named_modules()
        if isinstance(module, (Attention, AttentionModuleMixin)) and getattr(module, "processor", None) is not None
    ]
    users = Counter((id(module.processor), _kind(name, module) == "cross") for name, module in modules)
    for name, module in modules:
        kind = _kind(name, module)
        yield Found(name, module, kind, _reason(module.processor, kind, bool(users[id(module.processor), False])))


def _kind(name: str, module: Any) -> str:
    flag, leaf = getattr(module, "is_cross_attention", None), name.rpartition(".")[2]
    if flag is None:
        return "cross" if leaf in NAMED_CROSS else "self" if leaf in NAMED_SELF else "?"
    return "cross" if flag else "self"


def _reason(processor: Any, kind: str, shared: bool) -> str:
    if kind == "self":
        return "self-attention stays"
    if kind == "?":
        return "nothing says that it is cross-attention"
    if hasattr(processor, "_attention_backend"):
        return "it shares its processor with other attention" if shared else ""
    if isinstance(processor, CrossAttnProcessor) or qualified(processor) in KNOWN:
        return ""
    return f"{type(processor).__name__} is left alone"


def qualified(processor: Any) -> str:
    """Module and class: of a subclass it is not that of its base."""
    return f"{type(processor).__module__}.{type(processor).__qualname__}"


# ---- the table ----


def report(target: Any) -> Report:
    rows = []
    for found in survey(target):
        here = found.runs == HERE
        runs = _runs_here(found.module) if here else found.runs
        why = "" if here else found.reason or "apply() moves it"
        rows.append(Row(found.name or "(the model)", type(found.module).__name__, found.kind, runs, why))
    return Report(type(target).__name__, tuple(rows))


def _runs_here(module: Any) -> str:
    heads, weight = getattr(module, "heads", 1), next(p for p in module.parameters() if p.is_floating_point())
    return runs_here(weight.device, weight.dtype, getattr(module, "inner_dim", heads * 64) // heads)
