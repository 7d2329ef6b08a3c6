"""Which modules of transformers are swapped for ours, where the library does not look up its attention function.

A swap assigns `module.__class__`: parameters, hooks and state dict stay as they are, and the class to return to is
`upstream_class(type(module))`.  `find` says what `apply` assigns and what `report` prints.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Swap(NamedTuple):
    replacement: type[nn.Module] | None  # None: the module stays as it is
    reason: str | None  # why it stays
    attends: bool  # False for a class that only passes arguments on


def find(model: nn.Module) -> dict[str, Swap]:
    """What becomes of every module of `model` that is known here, by its name; a swapped module is found again."""
    return {}


def upstream_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of the library that a class of ours replaces; any other class itself."""
    return next(base for base in cls.__mro__ if not base.__module__.startswith("crossattn_kernels."))


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
