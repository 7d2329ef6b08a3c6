"""Which probabilities are dropped: a function of (seed, batch, head, query, key) only, so every schedule, tile size and
backend drops the same ones.

The generator is Philox 4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011); Triton's
`tl.philox` is the same function.  The four words of a draw serve queries m, m + 8 and keys n, n + 8, bit 3 of m and n
being 0: a thread that holds one of these four probabilities of a tensor core's product holds them all, in either order
of the axes.  The counter is (n, m, head, batch).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
CACHED = 2**16  # draws whose words stay in a CPU's cache


def threshold(dropout_p: float) -> int:
    """A 24-bit draw below this is dropped."""
    return round(dropout_p * 2**24)


def keep(seed: Tensor, dropout_p: float, batch: slice, heads: int, rows: slice, keys: slice) -> Tensor:
    """Bool (b, heads, m, n) on the seed's device, True where the probability is kept."""
    entries, m, n = (s.stop - s.start for s in (batch, rows, keys))
    kept = torch.empty(entries, heads, m, n, dtype=torch.bool, device=seed.device)
    step = m + 16 if seed.is_cuda else max(16, CACHED // max(1, entries * heads * n) // 16 * 16)
    for first in range(rows.start // 16 * 16, rows.stop, step):
        some = slice(max(first, rows.start), min(first + step, rows.stop))
        words = _words(seed, batch, heads, some, keys)
        kept[:, :, some.start - rows.start : some.stop - rows.start] = words >> 8 >= threshold(dropout_p)
    return kept


def _words(seed: Tensor, batch: slice, heads: int, rows: slice, keys: slice) -> Tensor:
    """The 32-bit word of each probability, as int64 (b, heads, m, n)."""

    def indices(some: slice) -> Tensor:
        return torch.arange(some.start, some.stop, device=seed.device)

    def pairs(some: slice) -> Tensor:
        """All blocks of 16 that hold some of these indices, without the later halves: (blocks, 8)."""
        return 16 * indices(slice(some.start // 16, -(-some.stop // 16)))[:, None] + indices(slice(0, 8))

    entry, head = indices(batch).view(-1, 1, 1, 1, 1, 1), indices(slice(0, heads)).view(-1, 1, 1, 1, 1)
    words = torch.stack(_philox(pairs(keys), pairs(rows)[:, :, None, None], head, entry, seed))
    words = words.unflatten(0, (2, 2))  # (halves of keys, halves of rows, b, heads, blocks, 8, blocks, 8)
    words = words.permute(2, 3, 4, 1, 5, 6, 0, 7).flatten(5).flatten(2, 4)
    return words[:, :, rows.start % 16 :, keys.start % 16 :][:, :, : rows.stop - rows.start, : keys.stop - keys.start]


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, each as int64; the four words of the counter broadcast against each other."""
    c0, c1, c2, c3 = c0.long(), c1.long(), c2.long(), c3.long()
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        hi_a, lo_a = _multiply(0xD2511F53, c0)
        hi_b, lo_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def _multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product, which int64 holds with its sign bit as one more digit."""
    product = a * x
    return (product >> 32) & LOW, product & LOW
