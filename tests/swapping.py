"""One model twice, as the library runs it and after `apply`: what the tests of the swapped modules share."""

from __future__ import annotations

import copy

import torch

from crossattn_kernels.integrations import transformers as integration
from crossattn_kernels.integrations.transformers import attending, swaps
from crossattn_kernels.layers import multihead
from tests.transformers_models import differences, enlarge, results


def drawn(model):
    """fp64 and large random weights, so that attention is far from uniform and counts in every output."""
    enlarge(model.double(), gain=1.5)
    return model


def applied(model):
    """A copy that runs on the package."""
    ours = copy.deepcopy(model)
    integration.apply(ours)
    return ours


def worst(model, inputs, train=False, **more):
    """{name: error} of outputs and of the gradients of all parameters, relative to the largest value of each."""
    model.train(train)
    ours, theirs = results(applied(model), inputs, **more), results(model, inputs, **more)
    for name, expected in theirs.items():
        # a logit of a hidden token is -inf
        assert torch.equal(ours[name].isinf(), expected.isinf()), name
        ours[name].masked_fill_(expected.isinf(), 0)
        expected.masked_fill_(expected.isinf(), 0)
    return differences(ours, theirs)


def assert_rounding(errors):
    """fp64: what is left is rounding."""
    wrong = {name: error for name, error in errors.items() if not error <= 1e-9}
    assert not wrong, wrong


def attending_modules(model):
    """The names of the modules that a swap serves."""
    return [name for name, one in swaps.find(model).items() if one.attends and one.replacement is not None]


class Calls:
    """How often swapped modules call `cross_attention` and ask for weights; `error` spoils what the former returns."""

    def __init__(self, patch):
        self.count, self.weights, self.error = 0, 0, 0.0
        for module in (attending, multihead):
            self._watch(patch, module)

    def _watch(self, patch, module):
        attend, weights = module.cross_attention, module.attention_weights

        def counted(*args, **kwargs):
            self.count += 1
            return attend(*args, **kwargs) * (1 + self.error)

        def weighed(*args, **kwargs):
            self.weights += 1
            return weights(*args, **kwargs)

        patch.setattr(module, "cross_attention", counted)
        patch.setattr(module, "attention_weights", weighed)
