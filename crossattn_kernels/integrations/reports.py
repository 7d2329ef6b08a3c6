"""What runs where: one row for each attention module of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from crossattn_kernels.functional import choose

HERE = "crossattn"


class Row(NamedTuple):
    """One attention module."""

    name: str  # of the module within the model
    class_name: str
    kind: str  # "cross", "self" or "?"
    runs: str  # "crossattn", "crossattn (torch)", "sdpa", ...
    why: str = ""  # it runs there and not on this package; empty if it does

    @property
    def is_here(self) -> bool:
        """True when this package computes the module's attention."""
        return self.runs.partition(" ")[0] == HERE


class Report(NamedTuple):
    """A table of attention modules; `str()` aligns it, with a line that counts."""

    model: str  # its class
    rows: tuple[Row, ...]

    @property
    def here(self) -> tuple[Row, ...]:
        """The modules whose attention this package computes."""
        return tuple(row for row in self.rows if row.is_here)

    def __str__(self) -> str:
        table = [("module", "class", "kind", "runs on", "why"), *self.rows]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
        count = f"{self.model}: {len(self.here)} of {len(self.rows)} attention modules run on {HERE}"
        return "\n".join([*(lines if self.rows else []), count])


def runs_here(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 64) -> str:
    """`crossattn (triton)`: with the backend for heads of `size` there; a model on meta will run on the GPU, if any."""
    if device.type == "meta":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"{HERE} ({choose((device, dtype, size, size), None)})"
