"""`apply` and `restore`: lists of changes to processors, backends and caches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import nn

from crossattn_kernels.integrations.changes import ABSENT, Change, make
from crossattn_kernels.integrations.diffusers import context_cache, dispatch
from crossattn_kernels.integrations.diffusers.processor import CrossAttnProcessor
from crossattn_kernels.integrations.diffusers.survey import KNOWN, Found, models, qualified, report, survey
from crossattn_kernels.integrations.reports import HERE, Report

# what a processor on the dispatcher asked before
FORMER = "crossattn_former"


def apply(target: Any, cache_context: bool) -> Report:
    found = list(survey(target))
    served = [one for one in found if not one.reason]
    if not served:
        many = f"none of its {len(found)} attention modules" if found else "no attention module"
        raise ValueError(f"nothing to replace in {type(target).__name__}: {many} is cross-attention that can run here")
    cached = list(_cached(target, served)) if cache_context else []
    backend = dispatch.register()
    # each is worked out when those before it are made: a processor may be shared, a cache is put where one was dropped
    moves = (change for one in served if one.runs != HERE for change in _move(one, backend))
    caches = (Change(module, "forward", context_cache.Memo(module)) for module in cached)
    make(chain(moves, _drop_caches(target), caches))
    return report(target)


def restore(target: Any) -> None:
    make(chain((change for one in survey(target) for change in _return(one)), _drop_caches(target)))


def _move(one: Found, backend: Any) -> Iterator[Change]:
    if one.dispatched:
        yield Change(one.processor, FORMER, one.processor._attention_backend)
        yield Change(one.processor, "_attention_backend", backend)
    else:
        yield Change(one.module, "processor", CrossAttnProcessor(one.processor, KNOWN[qualified(one.processor)]))


def _return(one: Found) -> Iterator[Change]:
    if isinstance(one.processor, CrossAttnProcessor):
        yield Change(one.module, "processor", one.processor.former)
    elif FORMER in vars(one.processor):
        former = getattr(one.processor, FORMER)
        yield Change(one.processor, FORMER, ABSENT)
        if one.processor._attention_backend == HERE:
            yield Change(one.processor, "_attention_backend", ABSENT if former is None else former)


def _cached(target: Any, served: list[Found]) -> Iterator[nn.Module]:
    """The modules whose results are kept: projections of text, and what makes the text that they project."""
    for prefix, model in models(target).items():
        mine = [one for one in served if one.name.startswith(f"{prefix}." if prefix else "")]
        if mine:
            yield from context_cache.text_modules(model)
            for one in mine:
                yield from context_cache.projections(one.module)


def _drop_caches(target: Any) -> Iterator[Change]:
    for model in models(target).values():
        for module in model.modules():
            memo = vars(module).get("forward")
            if isinstance(memo, context_cache.Memo):
                yield Change(module, "forward", ABSENT if memo.former is None else memo.former)
            hooked = vars(module).get("_old_forward")  # what accelerate calls inside its own
            if isinstance(hooked, context_cache.Memo):
                yield Change(module, "_old_forward", hooked.compute)
