"""A driver that stands in for a GPU: Triton compiles for the GPU that it names, and what would be launched is not."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from crossattn_kernels.tuning import Config, assumed


def target_of(arch: str) -> GPUTarget:
    """Triton's name of a chip."""
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


class Launch:
    """Takes the place of the compiled launcher."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *_: Any) -> None: ...


class Binaries:
    """Takes the place of the driver's loader.  Shared memory is for the reader of the report to compare."""

    def load_binary(self, *_: Any) -> tuple[Any, ...]:
        return "module", None, 0, 0, 1024  # module, function, registers, spills, threads a program may have

    def unload_module(self, module: Any) -> None:
        """Triton 3.9 asks for it when nobody holds a kernel any more."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(max_shared_mem=2**31)


class StandIn:
    """The least that Triton asks of a driver between a call and its launch."""

    launcher_cls: Any = Launch

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.utils = target, Binaries()

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextmanager
def standing_in(arch: str, stand_in: type[StandIn] = StandIn) -> Iterator[None]:
    """Within it, calls on `meta` tensors are planned and compiled for `arch`.

    Raises ValueError for one that is not known, and where kernels are bound to Triton's interpreter.
    """
    from crossattn_kernels.kernels.launch import LAUNCHERS
    from crossattn_kernels.kernels.views import INTERPRETED

    if INTERPRETED.value:
        raise ValueError("TRITON_INTERPRET=1 binds kernels to Triton's interpreter: unset it to compile them")

    def forget() -> None:  # kernels are remembered by the number of the device, whatever it is
        LAUNCHERS.clear()
        for kernel in _kernels():
            kernel.device_caches.clear()

    with assumed(arch):
        before = driver._active  # asking for it would look for a GPU
        driver.set_active(stand_in(target_of(arch)))
        forget()
        try:
            yield
        finally:
            forget()
            driver.set_active(before)


def launched() -> Iterator[tuple[str, str, Config, Any]]:
    """(kernel, schedule, configuration, what Triton compiled) of everything that was launched."""
    from crossattn_kernels.kernels.launch import CONFIGS, LAUNCHERS

    for launcher in LAUNCHERS.values():
        plan = launcher.plan
        for (name, _), launch in launcher.launches.items():
            forward = name in ("forward_kernel", "merge_kernel")
            schedule = plan.forward_schedule if forward else plan.backward_schedule
            yield name, schedule, getattr(plan, CONFIGS[name]), launch.kernel


@contextmanager
def timed(started: Callable[[str], None]) -> Iterator[dict[str, float]]:
    """The seconds that each kernel takes from its call to its launch; `started` is told its name before."""
    seconds: dict[str, float] = {}
    begun = time.perf_counter()

    def before(name: str) -> None:
        nonlocal begun
        begun = time.perf_counter()
        started(name)

    def launch(source: Any, metadata: Any) -> Launch:
        seconds[source.fn.__name__] = time.perf_counter() - begun
        return Launch()

    hooks = [(kernel, lambda *_, name=kernel.__name__, **__: before(name)) for kernel in _kernels()]
    for kernel, hook in hooks:
        kernel.add_pre_run_hook(hook)
    driver.active.launcher_cls = launch
    try:
        yield seconds
    finally:
        for kernel, hook in hooks:
            kernel.pre_run_hooks.remove(hook)


def _kernels() -> Iterator[Any]:
    for name, module in list(sys.modules.items()):
        if name.startswith("crossattn_kernels.kernels."):
            yield from (value for value in vars(module).values() if isinstance(value, triton.JITFunction))
