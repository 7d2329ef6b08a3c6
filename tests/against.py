"""Two modules on the same weights and the same inputs: every output and every gradient of both."""

import torch
from torch import nn


def draw_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights so large that attention is far from uniform, and every bias, gate and normalisation has a say."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            drawn = torch.randn(p.shape, generator=g, dtype=torch.float64)
            if "norm" in name.lower() and name.endswith("weight"):
                p.copy_(1 + 0.3 * drawn)
            else:
                p.copy_(drawn * (1.5 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.7))
    return module


def results(module, inputs, **rest):
    """{name: outputs, gradients of inputs and of parameters} of module(**inputs, **rest); rest has no gradients."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    module.zero_grad()
    outputs = module(**inputs, **rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(1)
    sum((y * torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)).sum() for y in outputs).backward()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"input {name}": x.grad for name, x in inputs.items()}
    # a compiled module and a wrapped one have the parameters of the one inside
    inside = getattr(module, "_orig_mod", getattr(module, "wrapped", module))
    return found | {name: p.grad for name, p in inside.named_parameters()}


def worst(got, want):
    """The largest difference, relative to the largest value of the result it is found in, or to 1; and where."""
    assert got.keys() == want.keys()
    assert all((got[n] is None) == (want[n] is None) for n in want)
    # a NaN on either side counts as infinite
    errors = {
        n: ((got[n] - want[n]).abs().max() / want[n].abs().max().clamp(min=1)).nan_to_num(nan=torch.inf).item()
        for n in want
        if want[n] is not None and want[n].numel()
    }
    name = max(errors, key=errors.get)
    return errors[name], name


def assert_same(got, want, tolerance=1e-11):
    """In fp64 all but the order of sums is alike."""
    error, name = worst(got, want)
    assert error <= tolerance, f"{name} is off by {error:.1e} of its largest value"
