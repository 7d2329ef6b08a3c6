"""What a schedule asks of a GPU, by name and so without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """One GPU; `arch` is NVIDIA's compute capability or AMD's name."""

    arch: str
    multiprocessors: int
    shared: int  # bytes of shared memory that one program may have

    @property
    def descriptors(self) -> bool:
        """Whether tensor descriptors are hardware (TMA) rather than pointers in disguise."""
        return self.arch.startswith("sm_") and int(self.arch[3:]) >= 90


CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", 108, 166_912),  # A100
        Chip("sm_90", 132, 232_448),  # H100, H200
        Chip("sm_100", 148, 232_448),  # B200
        Chip("gfx942", 304, 65_536),  # MI300X
    )
}
ASSUMED = [CHIPS["sm_90"]]  # where there is no GPU: the interpreter, compilation for another machine


@contextmanager
def assumed(arch: str) -> Iterator[Chip]:
    """Plans for tensors that are on no GPU are made for this one."""
    if arch not in CHIPS:
        raise ValueError(f"arch must be one of {', '.join(CHIPS)}, got {arch!r}")
    ASSUMED.append(CHIPS[arch])
    try:
        yield CHIPS[arch]
    finally:
        ASSUMED.pop()


def chip_of(device: torch.device) -> Chip:
    return _present(device.index or 0) if device.type == "cuda" else ASSUMED[-1]


@lru_cache
def _present(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    arch = (
        getattr(found, "gcnArchName", "").partition(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"
    )
    shared = getattr(found, "shared_memory_per_block_optin", 0) or found.shared_memory_per_block
    return Chip(arch, found.multi_processor_count, shared)
