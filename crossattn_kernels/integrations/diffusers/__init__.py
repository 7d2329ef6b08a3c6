"""Cross-attention of diffusers' models on this package.

`apply(pipeline)` moves the cross-attention of a live pipeline or model, `restore(pipeline)` moves it back,
`report(pipeline)` says what runs where; `register()` makes `model.set_attention_backend("crossattn")` known.
diffusers is imported when they are called.
"""

from __future__ import annotations

from typing import Any

from crossattn_kernels.integrations import versions
from crossattn_kernels.integrations.reports import Report

# at least the first, less than the second; as the extra in pyproject.toml says
SUPPORTED = ("0.40", "0.44")


def register() -> None:
    """Make "crossattn" an attention backend of diffusers; to call it again changes nothing.

    Models on diffusers' dispatcher (Wan, LTX, ...) take it with `model.set_attention_backend("crossattn")`.  A backend
    sees lengths only: calls with as many queries as keys, causal ones and those of context parallelism run on "native".
    `apply` goes by module instead, and needs no call of this.
    Raises ImportError if diffusers is missing or not supported.
    """
    versions.check("diffusers", *SUPPORTED)
    from crossattn_kernels.integrations.diffusers import dispatch

    dispatch.register()


def apply(target: Any, *, cache_context: bool = False) -> Report:
    """Run the cross-attention of a pipeline or model here; the rest stays where it was.

    target: a pipeline (all its models) or an `nn.Module`.  Modules on the dispatcher get the backend, those with one of
        diffusers' own plain processors get `CrossAttnProcessor`; other processors (IP-Adapter, custom diffusion, added
        keys, ...) are left alone, as the report says.  Parameters and state dict stay as they are.
    cache_context: outside autograd, keep keys and values of a text and reuse them in the next denoising steps, see
        `context_cache.Memo`; for SD and SDXL U-Nets, ControlNet, PixArt, Sana, LTX and Wan (text to video).  To call
        `apply` again empties the caches, or with False drops them.

    To call it again changes nothing else.  Either everything that can be moved is moved, or nothing is and an error
    is raised.  Returns what `report(target)` returns.
    Raises ValueError if nothing can be moved, or if cache_context does not serve the model.
    """
    versions.check("diffusers", *SUPPORTED)
    from crossattn_kernels.integrations.diffusers import moves

    return moves.apply(target, cache_context)


def restore(target: Any) -> None:
    """Undo `apply`: the same processors and backends as before, and no caches; nothing to undo is no error."""
    versions.check("diffusers", *SUPPORTED)
    from crossattn_kernels.integrations.diffusers import moves

    moves.restore(target)


def report(target: Any) -> Report:
    """Every attention module of a pipeline or model: its kind, what it runs on, and why not here."""
    versions.check("diffusers", *SUPPORTED)
    from crossattn_kernels.integrations.diffusers import survey

    return survey.report(target)


def report_of_config(target: str) -> Report:
    """What `apply` would return for the configuration of a model or pipeline: a name on the hub, a folder, or a file.

    Models are built without weights.  If nothing can be moved, the report says so.
    Raises ImportError, or ValueError: no such model, or one that diffusers does not know.
    """
    versions.check("diffusers", *SUPPORTED)
    from crossattn_kernels.integrations.diffusers import skeleton

    return skeleton.report(target)
