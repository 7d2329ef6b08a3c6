"""The report of a model that is not there: its configuration is read, and the model built on the meta device."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from crossattn_kernels.integrations.reports import Report
from crossattn_kernels.integrations.transformers import changes, survey


def report(name: str) -> Report:
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        model = build(config)
    except Exception as error:  # a wrong configuration fails wherever it is read first
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"no model can be built from {name}: {first}") from error
    try:
        changes.apply(model)
    except ValueError:  # nothing to replace: the rows say why
        pass
    return survey.report(model)


def build(config: Any) -> nn.Module:
    """A model of the class that the configuration names, without memory for its weights."""
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    with torch.device("meta"):
        if named and named[0] is not None:
            return named[0](config)
        return transformers.AutoModel.from_config(config)
