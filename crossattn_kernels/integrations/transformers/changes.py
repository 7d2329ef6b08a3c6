"""`apply` and `restore`: a list of changes that is made as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from crossattn_kernels.integrations.transformers import interface, survey
from crossattn_kernels.integrations.transformers.interface import NAME, Redirected

# models that hand compact masks to their cross-attention
MODELS = {
    f"transformers.models.mllama.modeling_mllama.{name}": f"{survey.HERE}.mllama.{name}"
    for name in ("MllamaModel", "MllamaTextModel")
}
ABSENT = object()


class Change(NamedTuple):
    """An attribute of a module or of a configuration, and its new value; ABSENT deletes it."""

    target: Any
    name: str
    value: Any

    def make(self) -> Change:
        """Make the change; returns the one that takes it back."""
        before = (
            getattr(self.target, self.name) if self.name == "__class__" else vars(self.target).get(self.name, ABSENT)
        )
        if self.value is ABSENT:
            delattr(self.target, self.name)
        else:
            setattr(self.target, self.name, self.value)
        return Change(self.target, self.name, before)


def apply(model: nn.Module) -> survey.Report:
    interface.register()
    found = list(survey.survey(model))
    changes = [*_moves(found), *_models(model)]
    if not any(one.movable or one.implementation == NAME for one in found):
        many = f"none of its {len(found)} attention modules" if found else "no attention module"
        raise ValueError(f"nothing to replace in {type(model).__name__}: {many} is cross-attention that can run here")
    make(changes)
    return survey.report(model)


def restore(model: nn.Module) -> None:
    make(list(_returns(model)))


def make(changes: list[Change]) -> None:
    """All of them; if one fails, those before it are taken back and the error goes on."""
    done: list[Change] = []
    try:
        for change in changes:
            done.append(change.make())
    except BaseException:
        for change in reversed(done):
            change.make()
        raise


def _moves(found: list[survey.Attention]) -> Iterator[Change]:
    """A model on sdpa gets our name, whose self-attention is sdpa and whose masks are compact.

    On anything else only the cross-attention is redirected, so that the rest does not notice.
    """
    renamed = set()
    for one in found:
        if not one.movable:
            continue
        if one.replacement is not None:
            yield Change(one.module, "__class__", one.replacement)
        elif one.implementation == "sdpa":
            config: Any = one.module.config
            renamed.add(id(config))
            yield Change(config, "_attn_implementation_internal", NAME)
        else:
            yield Change(one.module, "config", Redirected(one.module.config))
    for one in found:
        if survey.asks_interface(one.module) and not hasattr(one.module, "crossattn_kind"):
            yield Change(one.module, "crossattn_kind", one.kind)


def _models(model: nn.Module) -> Iterator[Change]:
    for module in model.modules():
        if survey.name_of(type(module)) in MODELS:
            home, _, name = MODELS[survey.name_of(type(module))].rpartition(".")
            swapped = getattr(import_module(home), name)
            yield Change(module, "__class__", swapped)
            # transformers asks for the outputs to record by the class of a model
            _CAN_RECORD_REGISTRY.setdefault(str(swapped), module._can_record_outputs)


def _returns(model: nn.Module) -> Iterator[Change]:
    for module in model.modules():
        if survey.is_ours(module):
            yield Change(module, "__class__", type(module).__bases__[0])
        if "crossattn_kind" in vars(module):
            yield Change(module, "crossattn_kind", ABSENT)
        config = getattr(module, "config", None)
        if isinstance(config, Redirected):
            yield Change(module, "config", config.original)
        elif getattr(config, "_attn_implementation_internal", None) == NAME:
            yield Change(config, "_attn_implementation_internal", "sdpa")
