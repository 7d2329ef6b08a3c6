"""Named workloads: the sizes and masks that benchmarks run, and where they come from.

A workload is a `Case` of `testing.py` (its letters, layouts and random inputs) with a mask of known density.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from crossattn_kernels.masks import Mask
from crossattn_kernels.testing import Call, Case, draw

LAYOUTS = {"bhsd": "(B, H, S, D) contiguous", "bshd": "(B, S, H, D) transposed, as projections give"}


@dataclass(frozen=True)
class Workload:
    """One named call; `mask` makes what it hides."""

    name: str
    case: Case
    mask: Callable[[Case], Mask] | None = None
    source: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.sizes} {self.case.layout}"

    @property
    def sizes(self) -> str:
        """B x H x M x N x D."""
        c = self.case
        return "x".join(str(n) for n in (c.B, c.Hq, c.M, c.N, c.D))

    def draw(self, device: torch.device | str = "cpu") -> Call:
        """Random inputs, the same on every device."""
        call = draw(self.case, device)
        return call if self.mask is None else call._replace(mask=self.mask(self.case).to(device))


def _sized(B: int, H: int, M: int, N: int, D: int) -> Case:
    return Case("", B=B, Hq=H, Hk=H, M=M, N=N, D=D)


def _in_layouts(*workloads: Workload) -> list[Workload]:
    return [replace(w, case=replace(w.case, layout=layout)) for w in workloads for layout in LAYOUTS]


DENSE = _in_layouts(
    Workload("image to text", _sized(2, 10, 4096, 77, 64), source="SDXL U-Net, 64 x 64 latents, guidance batch of 2"),
    Workload("decoder", _sized(2, 8, 1024, 512, 64), source="T5-like encoder-decoder"),
    Workload("resampler", _sized(4, 8, 64, 4096, 64), source="Perceiver resampler, 64 latents"),
)


def _lengths(c: Case) -> Mask:
    """Lengths from a quarter to three quarters of the keys, half of them on average."""
    return Mask.lengths(torch.linspace(c.N / 4, 3 * c.N / 4, c.B).long())


def _padding(c: Case) -> Mask:
    end = _lengths(c).end
    assert end is not None
    return Mask.key_padding(torch.arange(c.N) < end[:, 0])


def _media(c: Case, count: int, latest: bool) -> Mask:
    """`count` media, evenly spread over the text; each batch entry a few tokens further."""
    step = -(-c.M // count)
    locations = torch.zeros(c.B, c.M, dtype=torch.bool)
    for b in range(c.B):
        locations[b, 3 * b + (0 if latest else step // 2) :: step] = True
    return Mask.media(locations, c.N // count, latest)


# ranges that hide about half of the keys
HALF_HIDDEN = _in_layouts(
    Workload("lengths", _sized(4, 8, 512, 1024, 64), _lengths, "padded batch of texts"),
    Workload("padding", _sized(4, 8, 512, 1024, 64), _padding, "the same as one bit a key, as tokenizers give it"),
    *(
        Workload("causal", _sized(B, 8, M, M, 64), lambda c: Mask.causal(c.M, c.N), "aligned streams")
        for B, M in ((2, 1024), (1, 2048))
    ),
    Workload(
        "window",
        _sized(1, 8, 2048, 2048, 64),
        lambda c: Mask.window(c.M, c.N, c.N // 3, c.N // 4),
        "aligned streams with a horizon; both ends of a range move with the query",
    ),
    *(
        Workload(
            "latest medium",
            _sized(2, 8, M, 512, 64),
            lambda c: _media(c, 2, latest=True),
            "Flamingo, two videos of 256 resampled tokens",
        )
        for M in (1024, 2048)
    ),
    *(
        Workload(
            "all previous media",
            _sized(2, 8, M, 512, 64),
            lambda c: _media(c, 8, latest=False),
            "Flamingo without its latest-medium rule, eight images of 64 tokens",
        )
        for M in (1024, 2048)
    ),
)
