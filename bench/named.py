"""The workloads that judge the package: layers of published models at their own sizes, and two sweeps.

They are not in workloads.py because they differ in kind: those are sizes that a CPU can time, chosen for this package;
these are sizes that others chose, run whole on a GPU and scaled down (same ratios, heads, masks and gates) on a CPU.
W1 to W9 carry the numbers of the floors in `bench/floors.py`.  Letters and `Case` as in testing.py; tensors are laid
out as projections give them, (B, sequence, H, D).

Media begin at the first token: every query sees a key, because some peers return NaN for a row that sees none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.workloads import Workload
from crossattn_kernels.masks import Mask
from crossattn_kernels.testing import Call, Case, draw

Sizes = tuple[int, int, int, int, int]  # B, Hq, M, N, D


@dataclass(frozen=True)
class Named(Workload):
    """A workload with the sizes at which a CPU computes it in milliseconds."""

    small: Case = Case("")

    def at(self, device: torch.device | str, small: bool) -> Case:
        """bf16 on a GPU, fp32 elsewhere."""
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        return replace(self.small if small else self.case, dtype=dtype)

    def inputs(self, device: torch.device | str, small: bool, seed: int = 0) -> Call:
        """Random inputs, drawn on the device: the largest hold 4e9 numbers."""
        case = self.at(device, small)
        call = draw(case, device, generator=torch.Generator(device).manual_seed(seed))
        return call if self.mask is None else call._replace(mask=self.mask(case).to(device))


def _named(
    name: str,
    source: str,
    full: Sizes,
    small: Sizes,
    Hk: tuple[int, int] | None = None,
    mask: Callable[[Case], Mask] | None = None,
    gate: str | None = None,
) -> Named:
    """Hk: key heads at full and at small size, where they are fewer than Hq."""

    def case(sizes: Sizes, key_heads: int) -> Case:
        B, Hq, M, N, D = sizes
        return Case(name, B, Hq, key_heads, M, N, D, gate=gate, layout="bshd", source=source)

    keys, few = Hk or (full[1], small[1])
    return Named(name, case(full, keys), mask, source, case(small, few))


def _media(latest: bool) -> Callable[[Case], Mask]:
    """Media of 64 tokens (of N / 5 at small sizes), evenly spread over the text, from its first token on."""

    def mask(c: Case) -> Mask:
        tokens = 64 if c.N % 64 == 0 else c.N // 5
        count = c.N // tokens
        locations = torch.zeros(c.B, c.M, dtype=torch.bool)
        locations[:, [c.M * i // count for i in range(count)]] = True
        return Mask.media(locations, tokens, latest)

    return mask


def _lengths(c: Case) -> Mask:
    """Texts of an eighth of the keys up to all of them: prompts are padded to the encoder's length."""
    return Mask.lengths(torch.linspace(c.N / 8, c.N, c.B).long())


SDXL = "SDXL U-Net: heads of 64, 77 text tokens"
WAN = "Wan 14B: 40 heads of 128, 512 text tokens, unmasked, 81 frames"
MLLAMA = "Llama 3.2 Vision 11B: 4 tiles of 1601 tokens, 32 heads on 8"
PERCEIVER = "resampler: 64 latents, 16 heads"
WHISPER = "Whisper large: 20 heads of 64, 1500 audio frames"
SD15 = "SD 1.5 U-Net: 8 heads, 77 text tokens, guidance batch of 2"
FLAMINGO = "OpenFlamingo: 8 heads of 64, latest medium, tanh gate"

DENSE = (
    _named("W1a", f"{SDXL}, 64 x 64 latents, batch 2", (2, 10, 4096, 77, 64), (2, 2, 128, 77, 16)),
    _named("W1b", f"{SDXL}, 64 x 64 latents, batch 8", (8, 10, 4096, 77, 64), (4, 2, 128, 77, 16)),
    _named("W1c", f"{SDXL}, 32 x 32 latents, batch 2", (2, 20, 1024, 77, 64), (2, 4, 128, 77, 16)),
    _named("W1d", f"{SDXL}, 32 x 32 latents, batch 8", (8, 20, 1024, 77, 64), (4, 4, 128, 77, 16)),
    _named("W2a", f"{WAN}, 480p", (1, 40, 32760, 512, 128), (1, 2, 520, 32, 32)),
    _named("W2b", f"{WAN}, 720p", (1, 40, 75600, 512, 128), (1, 2, 760, 32, 32)),
    _named("W3", "Idefics 9B: 8 images of 64 latents, tanh gate", (8, 32, 2048, 512, 128), (2, 4, 64, 32, 32),
           gate="scalar"),
    _named("W4a", f"{MLLAMA}, 2048 tokens", (1, 32, 2048, 6404, 128), (1, 4, 64, 200, 32), Hk=(8, 1)),
    _named("W4b", f"{MLLAMA}, 2048 tokens, batch 4", (4, 32, 2048, 6404, 128), (2, 4, 64, 200, 32), Hk=(8, 1)),
    _named("W4c", f"{MLLAMA}, 8192 tokens, batch 4", (4, 32, 8192, 6404, 128), (2, 4, 128, 100, 32), Hk=(8, 1)),
    _named("W5a", f"{PERCEIVER} of 64, one 2112-token input", (32, 16, 64, 2112, 64), (2, 2, 16, 264, 16)),
    _named("W5b", "Idefics perceiver: 64 latents, 16 heads of 96", (32, 16, 64, 2112, 96), (2, 2, 16, 264, 24)),
    _named("W5c", f"{PERCEIVER} of 64, 64 frames of 256", (32, 16, 64, 16384, 64), (2, 2, 16, 512, 16)),
    _named("W5d", f"{PERCEIVER} of 64, 256 frames of 256", (32, 16, 64, 65536, 64), (2, 2, 16, 1024, 16)),
    _named("W6", "BLIP-2 Q-Former: 32 queries, 257 patches, batch 64", (64, 12, 32, 257, 64), (4, 2, 8, 65, 16)),
    _named("W7a", f"{MLLAMA}, one decoded token", (1, 32, 1, 6404, 128), (1, 4, 1, 400, 32), Hk=(8, 1)),
    _named("W7b", f"{MLLAMA}, one decoded token, batch 8", (8, 32, 1, 6404, 128), (2, 4, 1, 400, 32), Hk=(8, 1)),
    _named("W7c", f"{MLLAMA}, one decoded token, batch 64", (64, 32, 1, 6404, 128), (4, 4, 1, 400, 32), Hk=(8, 1)),
    _named("W8a", f"{WHISPER}, training", (16, 20, 448, 1500, 64), (2, 2, 56, 188, 16)),
    _named("W8b", f"{WHISPER}, one decoded token", (1, 20, 1, 1500, 64), (1, 4, 1, 188, 16)),
    _named("W8c", f"{WHISPER}, one decoded token, batch 32", (32, 20, 1, 1500, 64), (4, 4, 1, 188, 16)),
    _named("PixArt", "PixArt-alpha 1024 px: 16 heads of 72, 120 text tokens", (2, 16, 4096, 120, 72),
           (2, 2, 128, 60, 24)),
    _named("SD1.5 40", f"{SD15}, 64 x 64 latents", (2, 8, 4096, 77, 40), (2, 2, 128, 77, 40)),
    _named("SD1.5 80", f"{SD15}, 32 x 32 latents", (2, 8, 1024, 77, 80), (2, 2, 96, 77, 80)),
    _named("SD1.5 160", f"{SD15}, 16 x 16 latents", (2, 8, 256, 77, 160), (2, 2, 96, 77, 160)),
    _named("BLIP-2", "BLIP-2 Q-Former: 32 queries, 257 patches, one image", (1, 12, 32, 257, 64), (1, 2, 8, 65, 16)),
    _named("LXMERT", "LXMERT: 20 words, 36 regions, batch 32", (32, 12, 20, 36, 64), (4, 2, 20, 36, 16)),
    # last, because it alone takes as long as many others
    _named("W9", "long video: 1024 queries, a million keys", (1, 32, 1024, 2**20, 128), (1, 2, 16, 4096, 32)),
)  # fmt: skip

MASKED = (
    _named("Flamingo 5", f"{FLAMINGO}, 5 images", (4, 8, 1024, 320, 64), (2, 2, 64, 40, 16), mask=_media(True),
           gate="scalar"),
    _named("Flamingo 32", f"{FLAMINGO}, 32 images", (4, 8, 1024, 2048, 64), (2, 2, 64, 80, 16), mask=_media(True),
           gate="scalar"),
    _named("Flamingo previous", "as Flamingo 32, all previous media", (4, 8, 1024, 2048, 64), (2, 2, 64, 80, 16),
           mask=_media(False), gate="scalar"),
    _named("Idefics media", "W3 with its mask: the latest of 8 images", (8, 32, 2048, 512, 128), (2, 4, 64, 40, 32),
           mask=_media(True), gate="scalar"),
    _named("PixArt lengths", "PixArt-alpha with its text mask, batch 8", (8, 16, 4096, 120, 72), (4, 2, 128, 60, 24),
           mask=_lengths),
    _named("Whisper lengths", "W8a with audio of unequal length", (16, 20, 448, 1500, 64), (4, 2, 56, 188, 16),
           mask=_lengths),
)  # fmt: skip

BATCH = tuple(
    _named(f"batch {B}", f"{SDXL}, 64 x 64 latents", (B, 10, 4096, 77, 64), (min(B, 4), 2, 128, 77, 16))
    for B in (2**i for i in range(9))
)
KEYS = tuple(
    _named(f"keys {N}", "memory over N: 1024 queries, 8 heads of 64", (1, 8, 1024, N, 64), (1, 2, 16, N // 64, 16))
    for N in (2**i for i in range(10, 19))
)
NAMED = {w.name: w for w in (*DENSE, *MASKED, *BATCH, *KEYS)}
