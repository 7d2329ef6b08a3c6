"""`apply` and `restore`: lists of changes to classes, configurations and the names of implementations."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import MethodType
from typing import Any

from torch import nn
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from crossattn_kernels.integrations.changes import ABSENT, Change, make
from crossattn_kernels.integrations.reports import HERE, Report
from crossattn_kernels.integrations.transformers import interface, survey, swaps
from crossattn_kernels.integrations.transformers.interface import Redirected

# models that hand compact masks to their cross-attention
CARRIERS = {
    f"transformers.models.mllama.modeling_mllama.{name}": f"{__package__}.mllama.{name}"
    for name in ("MllamaModel", "MllamaTextModel")
}


def apply(model: nn.Module) -> Report:
    interface.register()
    found = list(survey.survey(model))
    if not any(one.movable or one.implementation == HERE for one in found):
        many = f"none of its {len(found)} attention modules" if found else "no attention module"
        raise ValueError(f"nothing to replace in {type(model).__name__}: {many} is cross-attention that can run here")
    make([*_swaps(model), *_moves(found)])
    return survey.report(model)


def restore(model: nn.Module) -> None:
    make(list(_returns(model)))


def _swaps(model: nn.Module) -> Iterator[Change]:
    """Classes that do not ask the attention interface, and those that pass on what these need."""
    known = swaps.find(model)
    for path, module in model.named_modules():
        replacement = known[path].replacement if path in known else _carrier(module)
        if replacement is not None and type(module) is not replacement:
            yield from _to_class(module, replacement)


def _carrier(module: nn.Module) -> type[nn.Module] | None:
    where = CARRIERS.get(swaps.qualified_name(type(module)))
    if where is None:
        return None
    home, _, name = where.rpartition(".")
    return getattr(import_module(home), name)


def _moves(found: list[survey.Attention]) -> Iterator[Change]:
    """A model on sdpa gets our name, under which self-attention is sdpa and padding takes no memory.

    On anything else only the cross-attention is redirected, so that the rest does not notice.
    """
    renamed = set()
    for one in found:
        config: Any = getattr(one.module, "config", None)
        if one.movable and one.replacement is None and one.implementation != "sdpa":
            yield Change(one.module, "config", Redirected(config))
        elif one.movable and one.replacement is None and id(config) not in renamed:
            renamed.add(id(config))
            yield Change(config, "_attn_implementation_internal", HERE)
        if survey.asks_interface(one.module) and not hasattr(one.module, "crossattn_kind"):
            yield Change(one.module, "crossattn_kind", one.kind)


def _to_class(module: nn.Module, cls: type[nn.Module]) -> Iterator[Change]:
    if hasattr(cls, "_can_record_outputs"):
        # transformers keeps the outputs to record by the class of a model
        _CAN_RECORD_REGISTRY.setdefault(str(cls), cls._can_record_outputs)
    yield Change(module, "__class__", cls)
    if "_old_forward" in vars(module):
        # accelerate calls the forward that it found when it hooked the module
        yield Change(module, "_old_forward", MethodType(cls.forward, module))


def _returns(model: nn.Module) -> Iterator[Change]:
    for module in model.modules():
        if survey.is_ours(module):
            yield from _to_class(module, swaps.upstream_class(type(module)))
        if "crossattn_kind" in vars(module):
            yield Change(module, "crossattn_kind", ABSENT)
        config = getattr(module, "config", None)
        if isinstance(config, Redirected):
            yield Change(module, "config", config.original)
        elif getattr(config, "_attn_implementation_internal", None) == HERE:
            yield Change(config, "_attn_implementation_internal", "sdpa")
