"""Calls go through Triton's own launcher to a CUDA driver that launches nothing: what arrives there, and its cost.

`libcuda.c` takes the place of the driver; a C compiler is needed, as Triton itself needs one for its launcher.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.nvidia import driver as nvidia

from crossattn_kernels.aot.target import StandIn, standing_in

SOURCE = Path(__file__).with_suffix(".c")
FOLDER = tempfile.TemporaryDirectory()  # gone with the process
BYTES = dict(i1=1, u1=1, i8=1, u8=1, i16=2, u16=2, i32=4, u32=4, i64=8, u64=8, fp16=2, bf16=2, fp32=4, fp64=8)
HOOK = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *[ctypes.c_uint] * 3, ctypes.POINTER(ctypes.c_void_p))


class Arrived(NamedTuple):
    """What the driver is told by one launch."""

    kernel: str
    programs: int
    threads: int  # of a program
    shared: int  # bytes of a program
    arguments: tuple[int, ...]  # bits, one a parameter; pointers are addresses


@lru_cache
def library() -> ctypes.CDLL:
    """The driver, loaded such that whoever asks for libcuda gets it."""
    path, include = Path(FOLDER.name) / "libcuda.so.1", Path(nvidia.__file__).parent / "include"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", str(SOURCE), "-o", str(path)], check=True
    )
    triton.knobs.nvidia.libcuda_path = FOLDER.name
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


class Driver(StandIn):
    """Triton's own loader and launcher."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        library()
        self.utils = nvidia.CudaUtils()


@contextmanager
def launching(arch: str, arrived: Callable[[Arrived], None] | None = None) -> Iterator[None]:
    """Within it, calls with tensors in host memory are compiled for `arch` and launched into nothing.

    arrived: is told of every launch.
    """
    from crossattn_kernels import kernels

    unsupported, kernels.unsupported = kernels.unsupported, lambda *asked: ()
    try:
        with standing_in(arch, Driver if arrived is None else told(arrived)):
            yield
    finally:
        kernels.unsupported = unsupported


def told(arrived: Callable[[Arrived], None]) -> type[Driver]:
    """A Driver that tells of launches; the driver's interface does not say how many parameters there are."""

    class Launcher(nvidia.CudaLauncher):  # type: ignore[misc]
        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            self.types = leaves(tuple(source.signature.values()))

        def __call__(self, *args: Any) -> None:
            @HOOK
            def hook(kernel: bytes, programs: int, threads: int, shared: int, values: Any) -> None:
                bits = [ctypes.string_at(values[i], BYTES.get(type, 8)) for i, type in enumerate(self.types)]
                numbers = tuple(int.from_bytes(b, "little") for b in bits)
                arrived(Arrived(kernel.decode(), programs, threads, shared, numbers))

            library().tell(hook)
            super().__call__(*args)
            library().tell(None)

    class Telling(Driver):
        launcher_cls = Launcher

    return Telling


def leaves(types: Sequence[Any]) -> list[str]:
    """The types of a kernel's parameters: constants are none."""
    found: list[str] = []
    for type in types:
        found += leaves(type) if isinstance(type, tuple) else [] if type == "constexpr" else [type]
    return found
