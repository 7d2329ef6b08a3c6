"""Cross-attention of transformers' models on this package.

`register()` makes `attn_implementation="crossattn"` known; `apply(model)` moves the cross-attention of a live model,
`restore(model)` moves it back, `report(model)` says what runs where.  transformers is imported when they are called.
"""

from __future__ import annotations

from torch import nn

from crossattn_kernels.integrations import versions
from crossattn_kernels.integrations.reports import Report

# at least the first, less than the second; as the extra in pyproject.toml says
SUPPORTED = ("5.17", "6")


def register() -> None:
    """Make "crossattn" an attention implementation and a mask of transformers; to call it again changes nothing.

    From then on `attn_implementation="crossattn"` works in `from_config`, `from_pretrained` and
    `set_attn_implementation`: cross-attention runs here, self-attention on "sdpa".
    Raises ImportError if transformers is missing or not supported.
    """
    versions.check("transformers", *SUPPORTED)
    from crossattn_kernels.integrations.transformers import interface

    interface.register()


def apply(model: nn.Module) -> Report:
    """Run the cross-attention of a live model here; self-attention and what cannot be served stay where they are.

    Parameters, state dict and hooks stay as they are.  To call it again changes nothing.  Either everything that can
    be moved is moved, or an error is raised and nothing is.
    Returns what `report(model)` returns.
    Raises ValueError if the model has no cross-attention that can be moved, TypeError if it is no module.
    """
    _check(model)
    from crossattn_kernels.integrations.transformers import changes

    return changes.apply(model)


def restore(model: nn.Module) -> None:
    """Undo `apply`, and `attn_implementation="crossattn"`, which becomes "sdpa"; nothing to undo is no error."""
    _check(model)
    from crossattn_kernels.integrations.transformers import changes

    changes.restore(model)


def report(model: nn.Module) -> Report:
    """Every attention module of a model: its kind, what it runs on, and why not here.  Print it, or read `.rows`."""
    _check(model)
    from crossattn_kernels.integrations.transformers import survey

    return survey.report(model)


def report_of_config(model: str) -> Report:
    """What `apply` would return for a configuration: a name on the hub, a folder, or the path of a config.json.

    The model is built without weights.  If nothing can be moved, the report says so.
    Raises ImportError, or ValueError: no such model, or one that transformers does not know.
    """
    versions.check("transformers", *SUPPORTED)
    from crossattn_kernels.integrations.transformers import skeleton

    return skeleton.report(model)


def _check(model: object) -> None:
    versions.check("transformers", *SUPPORTED)
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch module, got {type(model).__name__}; a pipeline of transformers has a .model")
