"""Every attention module of a model: what it is, what it runs on, and whether it can run here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from crossattn_kernels.integrations.reports import HERE, Report, Row, runs_here
from crossattn_kernels.integrations.transformers import swaps
from crossattn_kernels.integrations.transformers.kinds import kind_of

OWN = "its own code"  # of a class that does not ask the attention interface
STAYS = "self-attention stays"
# implementations whose masks nobody else can read
OWN_MASKS = {"flex_attention": "flex_attention's masks are its own: set_attn_implementation('sdpa') first"}


class Attention(NamedTuple):
    """One attention module of a model."""

    path: str
    module: nn.Module
    kind: str  # "cross", "self", or "?" if nothing says which
    implementation: str  # HERE, transformers' name of it, or OWN
    replacement: type[nn.Module] | None = None  # to be swapped in
    reason: str = ""  # why it cannot run here

    @property
    def movable(self) -> bool:
        """It does not run here, and could."""
        return self.implementation != HERE and not self.reason


def report(model: nn.Module) -> Report:
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    rows = []
    for found in survey(model):
        here = found.implementation == HERE
        why = "" if here else found.reason or "apply() moves it"
        name = runs_here(where) if here else found.implementation
        rows.append(Row(found.path or "(the model)", _class_name(found.module), found.kind, name, why))
    return Report(type(model).__name__, tuple(rows))


def survey(model: nn.Module) -> Iterator[Attention]:
    """Every attention module below a model, or the model itself."""
    modules = dict(model.named_modules())
    swapped = swaps.find(model)
    for path, module in modules.items():
        kind = kind_of(path, module, modules[path.rpartition(".")[0]])
        if path in swapped:
            if swapped[path].attends:
                yield _of_swap(path, module, kind, swapped[path])
        elif asks_interface(module):
            yield _of_interface(path, module, getattr(module, "crossattn_kind", kind))
        elif _looks_like_attention(module):
            reason = STAYS if kind == "self" else "its class does not ask the attention interface"
            yield Attention(path, module, kind or "?", OWN, reason=reason)


def _of_interface(path: str, module: nn.Module, kind: str | None) -> Attention:
    config: Any = module.config
    chosen = config._attn_implementation or "eager"
    if kind == "cross":
        return Attention(path, module, kind, chosen, reason=OWN_MASKS.get(chosen, ""))
    return Attention(path, module, "self", "sdpa" if chosen == HERE else chosen, reason=STAYS)


def _of_swap(path: str, module: nn.Module, kind: str | None, swap: swaps.Swap) -> Attention:
    if swap.replacement is None:
        return Attention(path, module, kind or "?", OWN, reason=STAYS if kind == "self" else swap.reason or STAYS)
    return Attention(path, module, "cross", HERE if is_ours(module) else OWN, swap.replacement)


def is_ours(module: nn.Module) -> bool:
    """True for a module whose class `apply` has swapped."""
    return swaps.upstream_class(type(module)) is not type(module)


def asks_interface(module: nn.Module) -> bool:
    """True if the forward of a module looks its attention function up in transformers' registry."""
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _looks_like_attention(module: nn.Module) -> bool:
    """A class named for attention with projections of its own, not one that wraps such a class or its output."""
    inner = [child for child in module.modules() if child is not module]
    linear = sum(isinstance(child, nn.Linear) for child in inner)
    return (
        _named_attention(module)
        and not any(map(_named_attention, inner))
        and linear > 1
        or (isinstance(module, nn.MultiheadAttention))
    )


def _named_attention(module: nn.Module) -> bool:
    name = _class_name(module)
    return "Attention" in name and not name.endswith("Output")


def _class_name(module: nn.Module) -> str:
    """As upstream calls it."""
    return swaps.upstream_class(type(module)).__name__
