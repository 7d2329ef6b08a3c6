"""Which probabilities are dropped: a function of (seed, batch, head, query, key) only, so every schedule, tile size and
backend drops the same ones.

The generator is Philox 4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), the counter being
(key, query, head, batch); Triton's `tl.philox` is the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """A 24-bit draw below this is dropped."""
    return round(dropout_p * 2**24)


def keep(seed: Tensor, dropout_p: float, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Bool, True where the probability is kept; the four index tensors broadcast against each other."""
    draw = _philox(key, query, head, batch, seed)
    return (draw >> 8) >= threshold(dropout_p)


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> Tensor:
    """First of the four 32-bit words, as int64."""
    c0, c1, c2, c3 = torch.broadcast_tensors(c0.long(), c1.long(), c2.long(), c3.long())
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        hi_a, lo_a = _multiply(0xD2511F53, c0)
        hi_b, lo_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0


def _multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product, without leaving int64."""
    low = a * (x & 0xFFFF)  # < 2^48
    high = a * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
