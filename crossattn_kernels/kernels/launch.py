"""From a call to a running kernel: one decision a call signature, kept with the kernels that it compiled."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from crossattn_kernels.kernels.views import INTERPRETED, Constants, constant
from crossattn_kernels.problem import Inputs, Options, Problem
from crossattn_kernels.tuning import Config, circumstances, plan, power_of_two

MOST = 4096  # signatures that are remembered
FEW_TILES = 4  # of keys, up to which asking whether one is hidden whole costs more than to compute it
LAUNCHERS: dict[tuple, Launcher] = {}

# which field of the plan a kernel is launched by
CONFIGS = {
    "forward_kernel": "forward",
    "merge_kernel": "merge",
    "delta_kernel": "rows",
    "key_bounds_kernel": "rows",
    "filled_kernel": "rows",
    "tile_ranges_kernel": "dkv",
    "dq_kernel": "dq",
    "dkv_kernel": "dkv",
    "short_queries_kernel": "short_queries",
    "bias_grad_kernel": "bias_grad",
    "fold_kernel": "fold",
}


class Launch(NamedTuple):
    """A kernel that is compiled: `run(*bind(tensors))` launches it."""

    kernel: Any
    run: Callable[..., Any]
    bind: Callable[[Sequence[Any]], tuple[Any, ...]]  # the kernel's arguments from the tensors


class Launcher:
    """What one call signature runs: its plan, and its kernels once they are compiled.

    Kernels are specialised for alignment, strides of 1 and absent arguments; all of these follow from the signature,
    so that later calls launch what the first has compiled without looking at anything but their tensors.
    """

    @staticmethod
    def of(x: Inputs, options: Options, others: Sequence[Any] = ()) -> Launcher:
        """The launcher of this signature: tensors by dtype, shape, strides and alignment, whatever else by value."""
        key = (
            options,
            circumstances(),
            _tf32(x.q.dtype),
            *[None if value is None else _signature(value) for value in (*x, *others)],
        )
        found = LAUNCHERS.get(key)
        if found is None:
            if len(LAUNCHERS) >= MOST:
                LAUNCHERS.clear()
            found = LAUNCHERS[key] = Launcher(Problem.of(x, options))
        return found

    def __init__(self, problem: Problem) -> None:
        self.problem, self.plan = problem, plan(problem)
        self.launches: dict[tuple[str, str], Launch] = {}

    def __call__(self, kernel: Any, arguments: Callable[..., tuple[Any, ...]], *tensors: Any, label: str = "") -> None:
        """Launch `kernel` on a one-dimensional grid.

        arguments: from the tensors, the number of programs and all arguments of the kernel but the last, C; asked once
            a signature, so it looks at shapes and strides only, and makes no tensor of its own.
        label: tells two launches of one kernel in a call apart.
        """
        known = self.launches.get((kernel.__name__, label))
        if known is not None:
            known.run(*known.bind(tensors))
            return
        config = getattr(self.plan, CONFIGS[kernel.__name__])
        while True:
            try:
                return self._compile(kernel, config, arguments, tensors, label)
            except OutOfResources:  # a Triton that no table knows may take more shared memory for a pipeline
                if config.num_stages == 1:
                    raise
                config = config._replace(num_stages=config.num_stages - 1)

    def _compile(
        self, kernel: Any, config: Config, arguments: Callable[..., tuple[Any, ...]], tensors: Sequence[Any], label: str
    ) -> None:
        """Launch for the first time."""
        # a tensor that is there twice is only by chance
        apart = [t.detach() if isinstance(t, Tensor) else t for t in tensors]
        programs, *template = arguments(*apart)
        C = self.constants(config)
        bind = binder((*template, C), apart)

        def ready(launch: Callable[..., Any]) -> Callable[..., Any]:
            return partial(_with_allocator, launch) if config.descriptors else launch

        options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
        # the compiler wants to know the fields
        args = bind(tensors) if INTERPRETED.value else (*arguments(*tensors)[1:], C)
        compiled = ready(kernel[(programs,)])(*args, **options)
        if compiled is not None:  # the interpreter compiles nothing
            self.launches[kernel.__name__, label] = Launch(compiled, ready(compiled[programs, 1, 1]), bind)

    def query_tiles(self, config: Config) -> int:
        """Tiles of queries, of all heads or of all key heads."""
        B, Hq, Hk, M = self.problem[:4]
        tile = config.BLOCK_M
        return triton.cdiv(M * self.problem.group, tile) * B * Hk if config.packed else triton.cdiv(M, tile) * B * Hq

    def edge_stages(self, config: Config) -> int:
        """A second pipeline for a tile or two takes registers, or makes ptxas serialise the products of the first.

        Where threads copy one of k and v, because it is not aligned, Triton 3.7 fences the other's copies too early.
        """
        p = self.problem
        if p.bounded or (p.sifts and p.aligned):
            return config.num_stages
        return 1 if p.sifts or p.masked or p.N % config.BLOCK_N else 0

    def constants(self, config: Config) -> Constants:
        p = self.problem
        values = Constants(
            GROUP=p.group,
            BASE=math.log2(math.e) if p.biased else 1.0,
            HIDES=p.masked or p.biased,
            SIFTS=p.sifts,
            FULL=p.N % config.BLOCK_N == 0,
            ALONE=holds_all_keys(config, p),
            BY_LSE=p.by_lse,
            D=p.D,
            DV=p.Dv,
            BLOCK_D=max(16, power_of_two(p.D)),
            BLOCK_DV=max(16, power_of_two(p.Dv)),
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            TF32=_tf32(p.dtype),
            EDGE_STAGES=self.edge_stages(config),
            SKIPS=p.N > FEW_TILES * config.BLOCK_N,
            PACKED=config.packed,
            TMA=config.descriptors,
        )
        return Constants(*map(constant, values))


def holds_all_keys(config: Config, problem: Problem) -> bool:
    """Whether one tile holds all keys of the softmax."""
    return problem.N <= config.BLOCK_N and not problem.chunk


def binder(template: Any, tensors: Sequence[Any]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that puts other tensors into the places of these in nested tuples: one expression, made once."""
    names: dict[str, Any] = {}

    def code(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"t[{next(i for i, t in enumerate(tensors) if t is value)}]"
        name, holds = f"c{len(names)}", _holds_tensor(value)
        names[name] = type(value) if holds else value  # never a tensor, which would live as long as the function
        if not holds:
            return name
        parts = ", ".join(map(code, value))
        # a compiled kernel knows the fields already
        return f"{name}({parts})" if hasattr(value, "_fields") and INTERPRETED.value else f"({parts},)"

    return eval(f"lambda t: {code(template)}", names)


def _tf32(dtype: torch.dtype) -> bool:
    """Whether PyTorch allows TF32 for products of this type, by whichever of its switches."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or isinstance(value, tuple) and any(map(_holds_tensor, value))


def _signature(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.dtype, value.shape, value.stride(), value.data_ptr() % 16 == 0, value.device


def _with_allocator(launch: Any, *args: Any, **options: Any) -> Any:
    """Descriptors lie in memory that Triton asks for; the caller's own allocator is left as it is."""

    def run() -> Any:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        return launch(*args, **options)

    return contextvars.copy_context().run(run)
