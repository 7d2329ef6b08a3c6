"""The test set-up: kernels run under Triton's interpreter, unless `make gpu` runs them on a GPU."""

import os

import pytest


def pytest_configure(config):
    # before anything imports triton: kernels are bound to the interpreter or to the compiler when they are defined
    if "not gpu" in config.option.markexpr:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)  # two workers, two cores


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory holds NaN in every test."""
    from crossattn_kernels.testing import poisoned

    with poisoned():
        yield
