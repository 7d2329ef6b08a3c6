"""The report of a model or pipeline that is not there: configurations are read, models built on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from crossattn_kernels.integrations.diffusers import moves
from crossattn_kernels.integrations.diffusers.survey import report as report_of
from crossattn_kernels.integrations.reports import Report

ANY: Any = diffusers.UNet2DConditionModel  # every class of models reads every configuration


def report(name: str) -> Report:
    try:
        config, parts = _read(name)
        model = nn.ModuleDict({part: _build(each) for part, each in parts.items()}) if parts else _build(config)
    except Exception as error:  # a wrong configuration fails wherever it is read first
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"no model can be built from {name}: {first}") from error
    try:
        moves.apply(model, cache_context=False)
    except ValueError:  # nothing to replace: the rows say why
        pass
    return report_of(model)._replace(model=config["_class_name"])


def _read(name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The configuration of a model, or that of a pipeline and those of its models."""
    if Path(name).name == "model_index.json":
        name = str(Path(name).parent)
    if Path(name).is_file():
        return json.loads(Path(name).read_text()), {}
    try:
        index = dict(diffusers.DiffusionPipeline.load_config(name))
    except OSError:
        return dict(ANY.load_config(name)), {}
    models = [
        part
        for part, (library, kind) in ((k, v) for k, v in index.items() if isinstance(v, (list, tuple)))
        if library == "diffusers" and issubclass(getattr(diffusers, kind), diffusers.ModelMixin)
    ]
    return index, {part: dict(ANY.load_config(name, subfolder=part)) for part in models}


def _build(config: dict[str, Any]) -> nn.Module:
    """A model of the class that the configuration names, without memory for its weights."""
    kind = getattr(diffusers, config["_class_name"])
    if not issubclass(kind, nn.Module):
        raise ValueError(f"{kind.__name__} is not a model")
    with torch.device("meta"):
        return kind.from_config(config)
