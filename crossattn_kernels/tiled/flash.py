"""PyTorch's own flash kernel for CPUs, a part at a time: what it can compute, and how its operands want to lie.

Letters as in the package; b, m, n are sizes of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from crossattn_kernels.problem import Inputs, Options
from crossattn_kernels.tiled.parts import (
    BLOCK,
    Call,
    Part,
    finite,
    keys,
    of,
    of_bias,
    pieces,
    queries,
    ranged,
    size,
    steps,
    visible,
)

FEW = 16  # its gradients of a query that sees fewer keys are less exact than those of the tile loop
RESULT = 2**21  # elements of a result that is still in the cache when it is copied

flash_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def beyond(x: Inputs, options: Options) -> tuple[str, ...]:
    """What a call has that the flash kernel does not do, whatever the values of its tensors."""
    asked = {
        "D and Dv that differ": x.q.shape[3] != x.v.shape[3],
        "a tensor as scale": x.scale is not None,
        "softcap": options.softcap > 0,
        "dropout": options.dropout_p > 0,
        "calls without keys": x.k.shape[2] == 0,
    }
    return tuple(name for name, is_asked in asked.items() if is_asked)


def can(call: Call, part: Part, least: int = 1) -> bool:
    """True if the flash kernel computes this part; `least`: so many keys it must have."""
    x, options = call.x, call.options
    if x.q.device.type != "cpu" or size(part)[2] < least or beyond(x, options):
        return False
    if call.filled is not None and options.empty_rows == "uniform" and of(call.filled, part.batch, part.rows).any():
        return False
    # the kernel hides a logit by adding -inf, and multiplies a hidden value by 0, both of which a NaN survives
    own = queries(x.q, part), keys(x.k, part), keys(x.v, part)
    return part.kind == "whole" or call.finite or all(map(finite, own))


def cached(x: Inputs, part: Part) -> Iterator[Part]:
    """A part cut into pieces whose output still lies in the cache when it is copied to where it belongs."""
    (_, m, _), width = size(part), x.q.shape[1] * x.v.shape[3]
    blocks = -(-m // (BLOCK * -(-width * m // RESULT)))
    yield from pieces(part, max(1, RESULT // (width * m)), m if part.kind == "causal" else BLOCK * max(3, blocks))


def exact(x: Inputs, part: Part) -> Iterator[Part]:
    """A part cut so that 16-bit gradients, which the kernel sums in 16 bits from block to block, have few blocks."""
    if x.q.dtype.itemsize > 2:
        yield part
        return
    for piece in pieces(part, part.batch.stop, max(BLOCK, 8 * BLOCK * x.k.shape[1] // x.q.shape[1])):
        for some in steps(part.keys, 16 * BLOCK):
            yield piece._replace(keys=some)


def _operands(call: Call, part: Part) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q (b, Hq, m, D), k and v (b, Hk, n, D) and the additive mask, broadcastable to (b, Hq, m, n)."""
    x, (b, _, _) = call.x, size(part)

    def apart(t: Tensor) -> bool:
        return all(n == 1 or s == 0 or s >= t.shape[3] for n, s in zip(t.shape[:3], t.stride()))

    tensors = (queries(x.q, part), keys(x.k, part), keys(x.v, part))
    # of rows that overlap, as `unfold` makes them, the kernel confuses the axes of o, and refuses some of 16 bits
    q, k, v = ((t if t.stride(3) == 1 and apart(t) else t.contiguous()).expand(b, -1, -1, -1) for t in tensors)
    if part.kind != "masked":
        return q, k, v, None
    # the kernel takes a mask in q's dtype or in fp32
    dtype = torch.float32 if x.q.dtype.itemsize == 2 else x.q.dtype
    if call.by_range and call.filled is None:
        return q, k, v, ranged(x, part, dtype)
    seen = visible(call, part)
    shown = torch.zeros((), dtype=dtype, device="cpu") if x.bias is None else of_bias(x.bias, part).to(dtype)
    return q, k, v, shown if seen is None else torch.where(seen, shown, -math.inf)


def forward(call: Call, part: Part) -> tuple[Tensor, Tensor]:
    """(o, lse) of a part: (b, Hq, m, Dv), (b, Hq, m)."""
    (_, m, n), (q, k, v, mask) = size(part), _operands(call, part)
    if part.kind == "whole" and n % 16 > 8 and n < min(m, 2 * BLOCK):
        # past the last multiple of 16 the kernel's exponentials are scalar, and hidden keys are cheaper
        k, v = (F.pad(t, (0, 0, 0, -n % 16)) for t in (k, v))
        mask = F.pad(q.new_zeros(1, 1, 1, n), (0, -n % 16), value=-math.inf)
    o, lse = flash_kernel(q, k, v, 0.0, part.kind == "causal", attn_mask=mask, scale=call.options.scale)
    if part.kind == "masked" and (lse == 0).any():  # what the kernel says of a row that sees nothing
        lse = lse.masked_fill((mask == -math.inf).all(-1), -math.inf)  # type: ignore[union-attr]
    return o, lse


def backward(call: Call, part: Part, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a part, laid out as (b, m, Hq, D) and (b, n, Hk, D)."""
    (q, k, v, mask), causal = _operands(call, part), part.kind == "causal"
    at, group = (part.batch, slice(None), part.rows), q.shape[1] // k.shape[1]
    lse = lse[at].masked_fill(lse[at] == -math.inf, 0)
    by_query = (do[at], q, o[at], lse, mask)
    # over the heads of a group the kernel goes on adding to one sum, which loses digits of fp32: there one at a time
    steps = group if q.dtype == torch.float32 else 1

    def of_heads(first: int) -> tuple[Tensor, Tensor, Tensor]:
        some = [t if steps == 1 or t is None or t.shape[1] == 1 else t[:, first::steps] for t in by_query]
        do, q, o, lse, mask = some
        return flash_kernel_backward(do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=call.options.scale)

    dq, dk, dv = of_heads(0)
    if steps > 1:
        every = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        every[:, ::steps] = dq
        for first in range(1, steps):
            every[:, first::steps], dk_part, dv_part = of_heads(first)
            dk, dv = dk.add_(dk_part), dv.add_(dv_part)
        dq = every
    return dq, dk, dv
