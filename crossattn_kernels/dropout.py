"""Which probabilities are dropped: a function of (seed, batch, head, query, key) only, so every schedule, tile size and
backend drops the same ones.

The generator is Philox 4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), the counter being
(key, query, head, batch); Triton's `tl.philox` is the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
CACHED = 2**16  # draws whose words stay in a CPU's cache


def threshold(dropout_p: float) -> int:
    """A 24-bit draw below this is dropped."""
    return round(dropout_p * 2**24)


def keep(seed: Tensor, dropout_p: float, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Bool (b, h, m, n), True where the probability is kept; batch (b,), head (h,), query (m,), key (n,): indices."""
    batch, head, query = batch[:, None, None, None], head[:, None, None], query[:, None]
    rows = query.shape[0] if query.is_cuda else CACHED // max(1, batch.shape[0] * head.shape[0] * key.shape[0])
    words = (_philox(key, some, head, batch, seed) for some in query.split(max(1, rows)))
    return torch.cat([(word >> 8) >= threshold(dropout_p) for word in words], 2)


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> Tensor:
    """First of the four 32-bit words, as int64; the four words of the counter broadcast against each other."""
    c0, c1, c2, c3 = c0.long(), c1.long(), c2.long(), c3.long()
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        hi_a, lo_a = _multiply(0xD2511F53, c0)
        hi_b, lo_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0


def _multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product, which int64 holds with its sign bit as one more digit."""
    product = a * x
    return (product >> 32) & LOW, product & LOW
