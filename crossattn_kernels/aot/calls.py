"""Named calls that together reach every kernel and schedule; their tensors are `meta`: shapes, strides, no values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossattn_kernels.masks import Mask

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PADDED, OTHERS = (64, 128, 256), (40, 72, 80, 88, 96, 112, 160)  # head sizes that tiles have, and some that are padded
FEW_KEYS = {64: 77, 128: 77, 256: 60}  # that fit a tile of short keys, by padded head size
FEW_QUERIES = {64: 32, 128: 32, 256: 16}  # whose two heads fit a tile of short queries


class Shape(NamedTuple):
    """Sizes as in `Problem`; the gradients are taken unless it is for inference."""

    B: int
    Hq: int
    Hk: int
    M: int
    N: int
    D: int
    backward: bool = True


class Call(NamedTuple):
    """One call of the sweep, by names."""

    shape: str
    dtype: str  # a key of DTYPES
    D: int
    kind: str  # a key of KINDS

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} D{self.D} {self.kind}"


def shapes(D: int) -> dict[str, Shape]:
    """Which schedules they make `plan` choose is in the name."""
    few_keys, few_queries = (sizes[64 if D <= 64 else 128 if D <= 128 else 256] for sizes in (FEW_KEYS, FEW_QUERIES))
    return {
        "two-pass": Shape(2, 8, 4, 4096, 4096, D),
        "ragged": Shape(2, 8, 4, 4001, 4001, D),  # tiles end with neither queries nor keys
        "short keys": Shape(2, 8, 4, 4096, few_keys, D),
        "short keys of a tile": Shape(2, 8, 4, 4096, 128, D),
        "fewer keys": Shape(2, 8, 4, 4096, few_keys // 2, D),
        "short queries": Shape(8, 32, 16, few_queries, 4096, D),
        "fewer queries": Shape(8, 32, 16, few_queries // 2, 4096, D),
        "split": Shape(1, 8, 8, 2 * few_queries, 4096, D),
        "packed decode": Shape(1, 32, 8, 1, 4096, D, backward=False),
        "split queries": Shape(1, 8, 8, 4096, 512, D),
    }


def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ranges(s: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return dict(mask=Mask(tensor(s.B, 1, s.M, dtype=torch.int32), tensor(s.B, 1, s.M, dtype=torch.int32)))


def padding(s: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return dict(mask=Mask.key_padding(tensor(s.B, s.N, dtype=torch.bool)))


def blocks(s: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return dict(mask=Mask.blocks(tensor(1, 1, -(-s.M // 128), -(-s.N // 128), dtype=torch.bool)))


def bits(s: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return dict(mask=Mask.groups(tensor(s.B, 1, s.M, s.N, dtype=torch.bool)))


def bias(s: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return dict(bias=tensor(1, s.Hq, s.M, s.N, dtype=dtype))


def gate(s: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return dict(gate=tensor(s.Hq, dtype=dtype))


def everything(s: Shape, dtype: torch.dtype) -> dict[str, Any]:
    mask = ranges(s, dtype)["mask"] & padding(s, dtype)["mask"] & blocks(s, dtype)["mask"]
    return dict(
        **bias(s, dtype),
        **gate(s, dtype),
        mask=mask,
        scale=tensor(s.Hq, dtype=torch.float32),
        softcap=30.0,
        dropout_p=0.1,
        empty_rows="uniform",
    )


# arguments of `cross_attention` besides q, k and v
KINDS = {
    "plain": lambda s, dtype: {},
    "ranges": ranges,
    "keys": padding,
    "blocks": blocks,
    "bits": bits,
    "bias": bias,
    "row gate": gate,
    "channel gate": lambda s, dtype: dict(gate=tensor(s.Hq, s.D, dtype=dtype)),
    "dropout": lambda s, dtype: dict(dropout_p=0.1),
    "keys, bias": lambda s, dtype: padding(s, dtype) | bias(s, dtype),  # T5
    "ranges, gate": lambda s, dtype: ranges(s, dtype) | gate(s, dtype),  # Flamingo
    "ranges, softcap": lambda s, dtype: ranges(s, dtype) | dict(softcap=30.0),  # T5Gemma
    "bits, ranges": lambda s, dtype: dict(mask=ranges(s, dtype)["mask"] & bits(s, dtype)["mask"]),
    "keys, bias, dropout": lambda s, dtype: padding(s, dtype) | bias(s, dtype) | dict(dropout_p=0.1),
    "gate, dropout": lambda s, dtype: gate(s, dtype) | dict(dropout_p=0.1),
    "everything": everything,
}


def arguments(call: Call) -> tuple[Shape, tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Shape, (q, k, v) as projections lay them out, and the other arguments of `cross_attention`."""
    s, dtype = shapes(call.D)[call.shape], DTYPES[call.dtype]
    q, k, v = (
        tensor(s.B, n, heads, s.D, dtype=dtype).transpose(1, 2) for heads, n in ((s.Hq, s.M), (s.Hk, s.N), (s.Hk, s.N))
    )
    return s, (q, k, v), KINDS[call.kind](s, dtype)


def sweep(every: bool = False) -> Iterator[Call]:
    """The sweep: every schedule and kind where head sizes fill their tiles, less elsewhere; or the whole product."""
    for dtype in DTYPES:
        for D in (*PADDED, *OTHERS):
            for shape in shapes(D):
                for kind in KINDS:
                    if every or kind in _kinds(shape, dtype, D):
                        yield Call(shape, dtype, D, kind)


def _kinds(shape: str, dtype: str, D: int) -> tuple[str, ...]:
    if dtype == "bf16" and D in PADDED:
        few = ("plain", "ranges", "keys", "blocks", "bias", "row gate", "everything")
        kinds = {
            "two-pass": tuple(KINDS),
            "ragged": ("plain", "ranges", "bias"),
            "short keys": tuple(KINDS),
            "fewer keys": ("bias", "ranges, gate", "everything"),
            "short queries": tuple(KINDS),
            "fewer queries": ("ranges", "bias"),
            "split": few,
            "packed decode": few,
            "split queries": ("ranges",),
        }
        return kinds.get(shape, ("plain",))
    if shape == "ragged" and dtype == "bf16" and D in (40, 160):
        return ("plain",)
    if shape != "two-pass" or (dtype != "bf16" and D not in PADDED):
        return ()
    if D in PADDED:
        return ("plain", "everything") if D == 64 else ("plain",)
    return ("plain", "ranges", "keys", "bits", "bias", "ranges, gate") if D in (40, 72, 160) else ("plain", "ranges")
