"""Every attention module of a model: what it is, what it runs on, and whether it can run here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from crossattn_kernels.functional import explain
from crossattn_kernels.integrations.transformers.interface import NAME
from crossattn_kernels.integrations.transformers.kinds import kind_of
from crossattn_kernels.integrations.transformers.swaps import SWAPS

HERE = __package__
OWN = "its own code"  # of a class that does not ask the attention interface


class Attention(NamedTuple):
    """One attention module of a model."""

    path: str
    module: nn.Module
    kind: str  # "cross", "self", or "?" if nothing says which
    implementation: str  # NAME, transformers' name of it, or OWN
    replacement: type[nn.Module] | None = None  # to be swapped in
    reason: str = ""  # why it cannot run here

    @property
    def movable(self) -> bool:
        """It does not run here, and could."""
        return self.implementation != NAME and not self.reason


class Row(NamedTuple):
    """One line of a report."""

    name: str
    class_name: str
    kind: str
    runs_on: str
    note: str


@dataclass(frozen=True)
class Report:
    """What `report` returns: print it, or read `rows`."""

    model: str
    rows: tuple[Row, ...]

    @property
    def served(self) -> tuple[Row, ...]:
        """The modules that run on this package."""
        return tuple(row for row in self.rows if row.runs_on.startswith(NAME))

    def __str__(self) -> str:
        heading = Row("module", "class", "kind", "runs on", "note")
        widths = [max(map(len, column)) for column in zip(heading, *self.rows)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in (heading, *self.rows)
        ]
        total = f"{self.model}: {len(self.served)} of {len(self.rows)} attention modules run on {NAME}"
        return "\n".join((total, *lines))


def report(model: nn.Module, device: torch.device | str | None = None) -> Report:
    """The table; device: where the model is going to run, by default where it is."""
    where = torch.device(device) if device else next((p.device for p in model.parameters()), torch.device("cpu"))
    backend = f"{NAME} ({_backend(where)})"
    rows = []
    for found in survey(model):
        here = found.implementation == NAME
        note = "apply(model) moves it" if found.movable else "" if here else found.reason
        name = backend if here else found.implementation
        rows.append(Row(found.path or "(the model)", type(found.module).__name__, found.kind, name, note))
    return Report(type(model).__name__, tuple(rows))


def survey(model: nn.Module) -> Iterator[Attention]:
    """Every attention module below a model, or the model itself."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        kind = kind_of(path, module, modules[path.rpartition(".")[0]])
        known = getattr(module, "crossattn_kind", kind)
        if is_ours(module) and not isinstance(module, PreTrainedModel):
            yield Attention(path, module, known or "cross", NAME)
        elif asks_interface(module):
            yield _of_interface(path, module, known or "self")
        elif name_of(type(module)) in SWAPS:
            yield _of_swaps(path, module, known)
        elif _looks_like_attention(module):
            reason = "self-attention stays" if known == "self" else "its class does not ask the attention interface"
            yield Attention(path, module, known or "?", OWN, reason=reason)


def _of_interface(path: str, module: nn.Module, kind: str) -> Attention:
    config: Any = module.config
    chosen = config._attn_implementation or "eager"
    if kind == "cross":
        return Attention(path, module, kind, chosen)
    return Attention(path, module, kind, "sdpa" if chosen == NAME else chosen, reason="self-attention stays")


def _of_swaps(path: str, module: nn.Module, kind: str | None) -> Attention:
    if kind == "self":
        return Attention(path, module, kind, OWN, reason="self-attention stays")
    home, _, name = SWAPS[name_of(type(module))].rpartition(".")
    replacement = getattr(import_module(home), name)
    why = getattr(replacement, "crossattn_reason", None)
    reason = (why(module) if why else None) or ""
    return Attention(path, module, kind or "?" if reason else "cross", OWN, None if reason else replacement, reason)


def is_ours(module: nn.Module) -> bool:
    """True for a module whose class `apply` has swapped."""
    return type(module).__module__.startswith(f"{HERE}.")


def asks_interface(module: nn.Module) -> bool:
    """True if the forward of a module looks its attention function up in transformers' registry."""
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def name_of(kind: type) -> str:
    """The qualified name of a class: what `SWAPS` is asked for."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _looks_like_attention(module: nn.Module) -> bool:
    """A class named for attention with projections of its own, not one that wraps such a class or its output."""
    name = type(module).__name__
    if "Attention" not in name or name.endswith("Output"):
        return False
    inner = [child for child in module.modules() if child is not module]
    return sum(isinstance(child, nn.Linear) for child in inner) > 1 and not any(
        asks_interface(child) or "Attention" in type(child).__name__ and not type(child).__name__.endswith("Output")
        for child in inner
    )


def _backend(device: torch.device) -> str:
    one = torch.empty(1, 1, 1, 64, device="cpu" if device.type == "meta" else device)
    return explain(one, one, one).backend
