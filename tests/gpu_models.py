"""Models of transformers on a device, before and after `apply`, against the same model in fp64 on the CPU.

`make gpu` runs it as one of its checks where transformers is installed; test_gpu_script.py runs it on the CPU.
"""

from __future__ import annotations

import torch

from crossattn_kernels.integrations import versions
from crossattn_kernels.integrations.transformers import SUPPORTED, apply
from crossattn_kernels.testing import Row

NAMES = ("bart", "t5", "whisper", "mllama")


def models(device: str = "cuda", names: tuple[str, ...] = NAMES) -> list[Row]:
    """Worst relative error of outputs and of gradients in fp32; the budget is that of the battery."""
    try:
        versions.check("transformers", *SUPPORTED)
    except ImportError as error:
        print("models are left out:", error, flush=True)
        return []
    from tests.transformers_models import build, counted, results

    rows = []
    for name in names:
        exact = results(*build(name))
        model, inputs = build(name, dtype=torch.float32)
        model = model.to(device)
        inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        eager = _errors(results(model, inputs), exact)
        apply(model)
        with counted() as calls:
            ours = _errors(results(model, inputs), exact)
        assert calls[0], f"{name}: the package was not called"
        for kind, slack in dict(output=2, gradient=3).items():
            rows.append(Row(f"{name} {kind}", ours[kind], slack * eager[kind] + torch.finfo(torch.float32).eps / 2))
    return rows


def _errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    from tests.transformers_models import differences

    each = differences({key: value.double().cpu() for key, value in found.items()}, exact)
    gradients = [error for name, error in each.items() if name.startswith("grad.")]
    outputs = [error for name, error in each.items() if not name.startswith("grad.")]
    return dict(output=max(outputs), gradient=max(gradients))
