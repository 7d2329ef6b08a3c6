"""What a query may see: ranges of keys, single keys, groups of keys; and the algebra that combines them.

Letters: B batch, Hq query heads, M queries, N keys.  Nothing in this file reads a tensor's values on the host, so no
constructor waits for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys each query may see.  Fields combine by AND; a field that is None hides nothing.

    start, end:  integer tensors broadcastable to (B, Hq, M); query i sees key j only if start[i] <= j < end[i]
    keys:        bool (B, N), (1, N) or (N,); False hides the key from every query of that batch entry
    visible:     bool, broadcastable to (B, Hq, ceil(M / query_group), ceil(N / key_group)); one bit per group of
                 `query_group` queries and `key_group` keys; (1, 1) is a dense mask
    """

    start: Tensor | None = None
    end: Tensor | None = None
    keys: Tensor | None = None
    visible: Tensor | None = None
    query_group: int = 1
    key_group: int = 1

    # ---- constructors ----

    @staticmethod
    def lengths(lengths: Tensor) -> Mask:
        """The first `lengths[b]` keys of each batch entry.  lengths: integer (B,)."""
        return Mask(end=as_range(_vector("lengths", lengths))[:, None, None])

    @staticmethod
    def key_padding(keep: Tensor) -> Mask:
        """Keys with holes.  keep: bool (B, N), True may be seen (the opposite of `nn.MultiheadAttention`'s mask)."""
        if _bools("keep", keep).ndim not in (1, 2):
            raise ValueError(f"keep must be (B, N), got {tuple(keep.shape)}")
        return Mask(keys=keep)

    @staticmethod
    def packed(cu_q: Tensor, cu_k: Tensor, num_queries: int | None = None) -> Mask:
        """Segments laid end to end (varlen, B = 1): query segment i sees exactly key segment i.

        cu_q, cu_k: integer (segments + 1,) cumulative lengths from 0.  Queries past cu_q[-1] see nothing.
        num_queries: M; may be left out when cu_q lives on the CPU (reading it elsewhere would wait for the GPU).
        """
        cu_q, cu_k = _vector("cu_q", cu_q), _vector("cu_k", cu_k)
        if cu_q.shape != cu_k.shape:
            raise ValueError(f"cu_q and cu_k must have one shape, got {tuple(cu_q.shape)} and {tuple(cu_k.shape)}")
        if cu_q.device != cu_k.device:
            raise ValueError(f"cu_q and cu_k must be on one device, got {cu_q.device} and {cu_k.device}")
        if cu_q.shape[0] == 0:
            raise ValueError("cu_q and cu_k must begin with 0, got (0,), which holds no number")
        if num_queries is None:
            if cu_q.device.type != "cpu":
                raise ValueError(
                    f"packed: pass num_queries, cu_q is on {cu_q.device} and reading it would wait for the device"
                )
            num_queries = int(cu_q[-1])
        check_integer("num_queries", num_queries, 0)
        query = torch.arange(num_queries, device=cu_q.device)
        segment = torch.searchsorted(cu_q.long(), query, right=True) - 1  # (M,)
        inside = segment < cu_q.numel() - 1
        segment = segment.clamp(max=cu_q.numel() - 2)
        end = torch.where(inside, cu_k[segment + 1], 0)
        return Mask(start=as_range(cu_k[segment])[None, None], end=as_range(end)[None, None])

    @staticmethod
    def media(locations: Tensor, tokens_per_media: int, latest: bool = True) -> Mask:
        """Flamingo's media mask: text sees the latest medium before it, or with latest=False all of them.

        locations: bool (B, M), True where a medium is mentioned; media lie end to end, `tokens_per_media` keys each.
        Text before the first medium sees nothing, nor (with latest=True) does text after more media than there are.
        Flamingo, https://arxiv.org/abs/2204.14198, section 2.3.
        """
        check_integer("tokens_per_media", tokens_per_media, 1)
        if _tensor("locations", locations).ndim != 2:
            raise ValueError(f"locations must be (B, M), got {tuple(locations.shape)}")
        count = locations.bool().long().cumsum(-1)[:, None]  # (B, 1, M)
        end = count * tokens_per_media
        return Mask(start=as_range(end - tokens_per_media) if latest else None, end=as_range(end))

    @staticmethod
    def groups(visible: Tensor, query_group: int = 1, key_group: int = 1) -> Mask:
        """One bit per group, e.g. (1, 1601) for one bit per text token and image tile; (1, 1) is a dense mask.

        visible: bool with up to four dimensions, broadcastable to (B, Hq, ceil(M / query_group), ceil(N / key_group)).
        """
        if _bools("visible", visible).ndim > 4:
            raise ValueError(f"visible must have at most 4 dimensions, got {tuple(visible.shape)}")
        check_integer("query_group", query_group, 1)
        check_integer("key_group", key_group, 1)
        return Mask(visible=_padded(visible, 4), query_group=query_group, key_group=key_group)

    @staticmethod
    def blocks(visible: Tensor, block_q: int = 128, block_k: int = 128) -> Mask:
        """Block-sparse: bool (..., ceil(M / block_q), ceil(N / block_k)); tiles that nobody sees are not loaded."""
        return Mask.groups(visible, block_q, block_k)

    @staticmethod
    def causal(
        num_queries: int, num_keys: int, align: str = "top-left", device: torch.device | str | None = None
    ) -> Mask:
        """Query i sees keys up to i ("top-left", as SDPA) or up to i + N - M ("bottom-right", as FlashAttention)."""
        if align not in ("top-left", "bottom-right"):
            raise ValueError(f"align must be 'top-left' or 'bottom-right', got {align!r}")
        check_integer("num_queries", num_queries, 0)
        check_integer("num_keys", num_keys, 0)
        shift = num_keys - num_queries if align == "bottom-right" else 0
        return Mask.window(num_queries, num_keys, None, shift, device=device)

    @staticmethod
    def window(
        num_queries: int, num_keys: int, left: int | None, right: int | None, device: torch.device | str | None = None
    ) -> Mask:
        """Query i sees keys from i - left to i + right, both included; None leaves that side open."""
        check_integer("num_queries", num_queries, 0)
        check_integer("num_keys", num_keys, 0)
        for name, n in dict(left=left, right=right).items():
            if n is not None:
                check_integer(name, n)
        query = torch.arange(num_queries, device=device)[None, None]
        start = None if left is None else as_range((query - left).clamp(max=num_keys))
        end = None if right is None else as_range((query + right + 1).clamp(max=num_keys))
        return Mask(start=start, end=end)

    # ---- algebra ----

    def __and__(self, other: Mask) -> Mask:
        """What both masks allow."""
        if not isinstance(other, Mask):
            return NotImplemented
        visible, query_group, key_group = _both_visible(self, other)
        return Mask(
            start=_both("start", torch.maximum, self.start, other.start),
            end=_both("end", torch.minimum, self.end, other.end),
            keys=_both("keys", torch.logical_and, self.keys, other.keys),
            visible=visible,
            query_group=query_group,
            key_group=key_group,
        )

    def is_trivial(self) -> bool:
        """True when no field is set: every query sees every key."""
        return all(x is None for x in (self.start, self.end, self.keys, self.visible))

    def lead(self) -> tuple[int, int]:
        """(1|B, 1|Hq): how far the fields vary over batch and heads."""
        ranked = ((self.start, 3), (self.end, 3), (self.visible, 4))
        by_row = [_padded(x, rank) for x, rank in ranked if x is not None]
        batch = [x.shape[0] for x in by_row] + ([] if self.keys is None else [_padded(self.keys, 2).shape[0]])
        heads = [x.shape[1] for x in by_row]
        return 0 if 0 in batch else max(batch, default=1), 0 if 0 in heads else max(heads, default=1)

    def to(self, device: torch.device | str) -> Mask:
        """The same mask on another device."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in named.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def slice_keys(self, first: int, last: int) -> Mask:
        """The mask as keys first..last-1 see it, renumbered from 0: what one chunk of a long context needs."""
        check_integer("first", first, 0)
        check_integer("last", last, 0)
        if last < first:
            raise ValueError(f"last must be at least first, got first={first} and last={last}")
        visible, group = self.visible, self.key_group
        if visible is not None and visible.shape[-1] > 1:
            visible = visible[..., first // group : -(-last // group)]
            if first % group:
                size = math.gcd(first, group)
                offset = first % group // size
                visible = visible.repeat_interleave(group // size, -1)
                visible, group = visible[..., offset : offset - (first - last) // size], size
        return Mask(
            start=None if self.start is None else as_range(self.start).clamp(min=0) - first,
            end=None if self.end is None else as_range(self.end).clamp(min=0) - first,
            keys=self.keys if self.keys is None or self.keys.shape[-1:] == (1,) else self.keys[..., first:last],
            visible=visible,
            query_group=self.query_group,
            key_group=group,
        )

    def as_dense(self, B: int, Hq: int, M: int, N: int) -> Tensor:
        """Bool (B, Hq, M, N), True where a query may see a key.  Quadratic: for tests and small problems."""
        device = self._check_sizes(B, Hq, M, N)
        key = torch.arange(N, device=device)
        seen = torch.ones(B, Hq, M, N, dtype=torch.bool, device=device)
        if self.start is not None:
            seen &= key >= self.start[..., None]
        if self.end is not None:
            seen &= key < self.end[..., None]
        if self.keys is not None:
            seen &= self.keys[..., None, None, :]
        if self.visible is not None:
            visible = _padded(self.visible, 4)
            row = torch.arange(M, device=device) // self.query_group if visible.shape[-2] > 1 else [0] * M
            col = key // self.key_group if visible.shape[-1] > 1 else [0] * N
            seen &= visible[..., row, :][..., col]
        return seen

    def _check_sizes(self, B: int, Hq: int, M: int, N: int) -> torch.device | None:
        """The device of the fields, which are checked here where no call has checked them."""
        for name, n in dict(B=B, Hq=Hq, M=M, N=N).items():
            check_integer(name, n, 0)
        check_integer("query_group", self.query_group, 1)
        check_integer("key_group", self.key_group, 1)
        groups = (-(-M // self.query_group), -(-N // self.key_group))
        targets = dict(start=(B, Hq, M), end=(B, Hq, M), keys=(B, N), visible=(B, Hq, *groups))
        device = None
        for name, target in targets.items():
            x = getattr(self, name)
            if x is None:
                continue
            (_bools if name in ("keys", "visible") else _integers)(name, x)
            sizes = zip(reversed(x.shape), reversed(target))
            if x.ndim > len(target) or not all(n == 1 or n == full for n, full in sizes):
                raise ValueError(f"{name} must broadcast to {target}, got {tuple(x.shape)}")
            device = x.device if device is None else device
            if x.device != device:
                raise ValueError(f"the fields of a mask must be on one device, got {device} and {x.device}")
        return device


# an input of torch.export, in files too, and of torch.load with weights_only
torch.export.register_dataclass(Mask, serialized_type_name="crossattn_kernels.Mask")
torch.serialization.add_safe_globals([Mask])


def as_range(t: Tensor) -> Tensor:
    """int32, as calls take it without another copy; what is below 0 or beyond 2^31 - 1 means the same at that end."""
    if t.dtype == torch.int32:
        return t
    if t.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which know little arithmetic
        t = t.long()
    return t.clamp(0, min(INT32_MAX, torch.iinfo(t.dtype).max)).to(torch.int32)


def _padded(x: Tensor, rank: int) -> Tensor:
    """`x` with dimensions of 1 in front."""
    return x[(None,) * (rank - x.ndim)]


def _tensor(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(not_dense(name, x))
    return x


def not_dense(name: str, x: Tensor) -> str:
    got = "nested: pad it, and pass Mask.lengths" if x.is_nested else f"sparse: pass {name}.to_dense()"
    return f"{name} must be a dense tensor, not {got}"


def _bools(name: str, x: Tensor) -> Tensor:
    if _tensor(name, x).dtype != torch.bool:
        # not for floats: in an additive mask 0 may be seen
        hint = "" if x.is_floating_point() else f"; if 1 may be seen, pass {name}.bool()"
        raise TypeError(f"{name} must be a tensor of bools, got {x.dtype} of shape {tuple(x.shape)}{hint}")
    return x


def _integers(name: str, x: Tensor) -> Tensor:
    if not _is_integer(_tensor(name, x)):
        raise TypeError(f"{name} must be a tensor of integers, got {x.dtype} of shape {tuple(x.shape)}")
    return x


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _vector(name: str, x: Tensor) -> Tensor:
    if _tensor(name, x).ndim != 1 or not _is_integer(x):
        raise ValueError(f"{name} must be a one-dimensional integer tensor, got {tuple(x.shape)} of {x.dtype}")
    return x


def check_integer(name: str, n: Any, least: int | None = None) -> None:
    if isinstance(n, bool) or not isinstance(n, (Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {n!r}")
    if least is not None and n < least:
        raise ValueError(f"{name} must be {'positive' if least else 'at least 0'}, got {n}")


def _both(name: str, combine: Callable[[Tensor, Tensor], Tensor], a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    for x in (a, b):
        (_bools if name == "keys" else _integers)(name, x)
    _combinable(name, a, b)
    return combine(a, b)


def _combinable(name: str, a: Tensor, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"the masks' {name} must be on one device, got {a.device} and {b.device}")
    sizes = zip(reversed(a.shape), reversed(b.shape))
    if not all(m == n or m == 1 or n == 1 for m, n in sizes):
        raise ValueError(f"the masks' {name} must broadcast, got {tuple(a.shape)} and {tuple(b.shape)}")


def _both_visible(a: Mask, b: Mask) -> tuple[Tensor | None, int, int]:
    """(visible, query_group, key_group) of a & b: a coarser grid is refined to the finer one."""
    if a.visible is None or b.visible is None:
        chosen = b if a.visible is None else a
        return chosen.visible, chosen.query_group, chosen.key_group
    x, y = _padded(a.visible, 4), _padded(b.visible, 4)
    x, y, query_group = _refine(x, y, -2, a.query_group, b.query_group)
    x, y, key_group = _refine(x, y, -1, a.key_group, b.key_group)
    _combinable("visible", x, y)
    return x & y, query_group, key_group


def _refine(x: Tensor, y: Tensor, axis: int, group_x: int, group_y: int) -> tuple[Tensor, Tensor, int]:
    if x.shape[axis] == 1 or y.shape[axis] == 1:  # that one holds for any group
        return x, y, group_y if x.shape[axis] == 1 else group_x
    if group_x > group_y:
        y, x, group = _refine(y, x, axis, group_y, group_x)
        return x, y, group
    ratio, rest = divmod(group_y, group_x)
    if rest:
        raise ValueError(f"masks with groups of {group_x} and {group_y} combine only if one divides the other")
    if y.shape[axis] != -(-x.shape[axis] // ratio):
        raise ValueError(
            f"visible {tuple(x.shape)} with groups of {group_x} and visible {tuple(y.shape)} with groups of {group_y} "
            "do not cover one problem"
        )
    return x, y.repeat_interleave(ratio, axis).narrow(axis, 0, x.shape[axis]), group_x
