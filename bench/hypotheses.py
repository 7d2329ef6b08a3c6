"""What else could be done than what ships, and what it is predicted to gain: written here before it is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bench.named import NAMED
from crossattn_kernels import trial, tuning
from crossattn_kernels.testing import Case
from crossattn_kernels.tuning import Config, Plan

FORWARD = trial.LAUNCHES["forward"]
BACKWARD = ("delta_kernel", *(name for names in trial.LAUNCHES.values() for name in names if name not in FORWARD))


class Way(NamedTuple):
    """Something else than what ships."""

    name: str
    predicted: float  # its time over that of what ships
    changes: dict[str, Any] = {}  # arguments of `tuning.force`
    variant: str = ""  # of bench/variants.py


class Experiment(NamedTuple):
    name: str
    question: str
    because: str  # where the prediction comes from
    case: Case
    kernels: tuple[str, ...]  # whose launches are timed
    ways: Callable[[Plan], list[Way]]
    verdict: str = ""  # what was concluded, once it was measured


def waves(heads: int, splits: int, resident: int) -> float:
    """The time of a loop that `splits` programs a head share, over that of one program that does all of it.

    resident: programs that a multiprocessor of an H200 has room for.
    """
    return math.ceil(heads * splits / (132 * resident)) / splits


def sweep(field: str, heads: int, resident: int, splits: tuple[int, ...]) -> Callable[[Plan], list[Way]]:
    """Other numbers of splits; predicted by waves of programs alone."""

    def ways(p: Plan) -> list[Way]:
        ships: Config = getattr(p, field)
        base = waves(heads, ships.splits, resident)
        return [
            Way(f"{n} x {heads} programs", waves(heads, n, resident) / base, {field: ships._replace(splits=n)})
            for n in splits
            if n != ships.splits
        ]

    return ways


BIASED = Case("bias", 2, 16, 16, 4096, 77, 128, bias=(1, 1, 1, 1), layout="bshd", source="a bias for every pair")
SHARED_BIAS = Case("shared bias", 16, 12, 12, 1024, 512, 64, bias=(0, 1, 1, 1), layout="bshd", source="one for a batch")
WINDOWS = Case("windows", 4096, 6, 6, 49, 49, 32, bias=(0, 1, 1, 1), layout="bshd", source="Swin, windows of 7 x 7")
QUERIES = Case("queries", 2, 8, 8, 100, 16384, 32, layout="bshd", source="Mask2Former, 100 queries, 128 x 128 pixels")
ONE_HEAD = Case(
    "one head", 1, 1, 1, 4096, 4096, 64, layout="bshd", source="a VAE's mid block, narrower: 64 x 64 latents"
)
VIDEO = Case("video", 1, 16, 16, 64, 65536, 64, layout="bshd", source="resampler, 64 latents, 256 frames of 256 tokens")
EVEN = Case("even", 16, 20, 20, 448, 1536, 64, layout="bshd", source="Whisper, training, with keys to fill whole tiles")
IN_ORDER = "The second product of a tile waits in the loop for the exponentials of the same tile instead of the next."
TILES_64 = "Tiles of 128 keys instead of 64, or another number of stages."
SPECIALISED = "`warp_specialize=True`: one warp loads tiles of keys, and two warpgroups take half of the queries each."


def specialised(*keys: int) -> Callable[[Plan], list[Way]]:
    """By tiles of so many keys."""
    tiles = {n: dict(forward=Config(128, n, 4, 2, descriptors=True)) for n in keys}
    return lambda p: [Way(f"tiles of {n} keys", 0.95, tile, "specialised") for n, tile in tiles.items()]


def tile_64(keys: int, stages: int = 2) -> dict[str, Any]:
    return dict(forward=Config(128, keys, 8, stages))


EXPERIMENTS = (
    Experiment(
        "delayed product, D = 128", IN_ORDER,
        "Exponentials take 0.4 of the products' time at D = 128. Without overlap that is a factor of 1.4, and two "
        "warpgroups hide about half of it from each other.",
        NAMED["W2a"].case, FORWARD, lambda p: [Way("in order", 1.2, variant="in order")],
    ),
    Experiment(
        "delayed product, D = 64", IN_ORDER,
        "At D = 64 exponentials take 0.8 of the products' time, but two programs share a multiprocessor, and one "
        "multiplies while the other takes exponentials.",
        NAMED["W8a"].case, FORWARD, lambda p: [Way("in order", 1.1, variant="in order")],
    ),
    Experiment(
        "specialised warps, D = 128", SPECIALISED,
        "Warpgroups that do not wait for each other hide more of each other's exponentials, and hold no addresses; but "
        "registers leave room for one program instead of two, and its first tile and its store are hidden by nothing.",
        NAMED["W2a"].case, FORWARD, specialised(64, 128),
    ),
    Experiment(
        "specialised warps, D = 64", SPECIALISED,
        "As at D = 128.",
        EVEN, FORWARD, specialised(64, 128),
    ),
    Experiment(
        "descriptors", "Tiles of keys are loaded through tensor descriptors instead of pointers.",
        "Fewer registers, but the compiler then waits for the product before the exponentials.",
        NAMED["W2a"].case, FORWARD,
        lambda p: [Way("descriptors", 1.15, dict(forward=p.forward._replace(BLOCK_N=64, descriptors=True)))],
    ),
    Experiment(
        "packing", "Each query head reads its keys, instead of one program for all heads that share them.",
        "Keys and values are read four times, three of them from L2.",
        NAMED["W7a"].case, FORWARD,
        lambda p: [Way("a head a program", 2.0, dict(forward=p.forward._replace(packed=False)))],
    ),
    Experiment(
        "forward splits", "How many programs share the keys of 64 latents. 16 for each of 16 heads ship.",
        "Waves of two programs a multiprocessor, merging for nothing: 17 leave 8 programs to a second wave.",
        VIDEO, FORWARD, sweep("forward", 16, 2, (1, 4, 8, 17, 33)),
    ),
    Experiment(
        "forward splits, few heads",
        "How many programs share the keys of a tile of queries. 7 for each of 32 tiles ship.",
        "Waves of one program a multiprocessor: one program a tile leaves 100 of 132 idle. Partial states for nothing.",
        ONE_HEAD, FORWARD, sweep("forward", 32, 1, (1, 2, 4, 8, 16)),
    ),
    Experiment(
        "short keys, splits",
        "How many programs share the queries of a head in the one-pass backward. 13 for each of 20 heads ship.",
        "Waves of one program a multiprocessor: 14 leave 16 programs to a third wave. Partial sums for nothing, though "
        "13 move 1.40 times what q, o, dy and dq are, and 6 move 1.07 times as much.",
        NAMED["W1a"].case, BACKWARD, sweep("dkv", 20, 1, (1, 2, 4, 6, 8, 14, 19, 26, 32)),
    ),
    Experiment(
        "short queries, splits",
        "How many programs share the keys of a head in the backward of few queries. 16 for each of 16 heads ship.",
        "Waves of one program a multiprocessor: 17 leave 8 programs to a third wave. Partial sums for nothing.",
        VIDEO, BACKWARD, sweep("short_queries", 16, 1, (1, 4, 8, 17, 24, 32)),
    ),
    Experiment(
        "two-pass, splits",
        "How many programs share the queries of a tile of keys. 4 for each of 160 tiles ship.",
        "Waves of one program a multiprocessor, for dk and dv alone: 160 programs leave 28 to a second wave, 640 leave "
        "112 to a fifth. Partial sums for nothing.",
        NAMED["W2a"].case, ("dkv_kernel", "fold_kernel"), sweep("dkv", 160, 1, (1, 2, 3, 5)),
    ),
    Experiment(
        "two-pass, splits of dq",
        "How many programs share the keys of a tile of queries. 16 for each of 16 tiles ship.",
        "Waves of one program a multiprocessor, for dq alone: one program a tile leaves 116 of 132 idle. Partial sums "
        "for nothing.",
        QUERIES, ("dq_kernel", "fold_kernel"), sweep("dq", 16, 1, (1, 4, 8, 24, 32)),
    ),
    Experiment(
        "bias gradient, splits",
        "How many programs share the windows over which the gradient of their bias is summed. 22 for each of 12 tiles "
        "ship.",
        "Waves of one program a multiprocessor: one program a tile leaves 120 of 132 idle. Partial sums for nothing.",
        WINDOWS, ("bias_grad_kernel", "fold_kernel"), sweep("bias_grad", 12, 1, (1, 6, 11, 33)),
    ),
    Experiment(
        "tiles of the forward, D = 64, whole", TILES_64,
        "Where keys fill whole tiles two programs share a multiprocessor, and each takes 71 % of its exponentials "
        "while it multiplies itself. Tiles of 128 keys leave room for one program, with 0.79 of the instructions and "
        "82 % of the exponentials under a product. Two stages of 64 keys have 0.97 of the instructions but load later.",
        EVEN, FORWARD, lambda p: [Way("128 x 128", 1.05, tile_64(128)), Way("128 x 64, two stages", 1.0, tile_64(64))],
    ),
    Experiment(
        "tiles of the forward, D = 64, ragged", TILES_64,
        "Where the last tile is not full, two stages ship; with three the code is the same but for the loads. Tiles of "
        "128 keys leave room for one program instead of two.",
        NAMED["W8a"].case, FORWARD,
        lambda p: [Way("128 x 128", 1.05, tile_64(128)), Way("128 x 64, three stages", 1.0, tile_64(64, stages=3))],
    ),
    Experiment(
        "tiles of the forward, D = 128", "Tiles of 64 keys instead of 128.",
        "The same products and exponentials, and twice as many barriers, each of which waits for the slower warpgroup.",
        NAMED["W2a"].case, FORWARD,
        lambda p: [
            Way(f"128 x 64, {stages} stages", 1.1, dict(forward=p.forward._replace(BLOCK_N=64, num_stages=stages)))
            for stages in (2, 3)
        ],
    ),
    Experiment(
        "tiles of dk and dv, D = 128", "Smaller tiles than the 64 queries and 128 keys that ship.",
        "The time of products by `aot/products.py`: narrow ones read as many keys from shared memory as wide ones.",
        NAMED["W4a"].case, ("dkv_kernel",),
        lambda p: [
            Way(f"{m} x {n}", slower, dict(dkv=p.dkv._replace(BLOCK_M=m, BLOCK_N=n, num_stages=2)))
            for m, n, slower in ((32, 128, 1.25), (16, 128, 1.75), (32, 64, 3.0))
        ],
    ),
    Experiment(
        "one pass for short keys, batch 2", "Two passes, as for any number of keys.",
        "7 tensors as large as q move instead of 4 and partial sums of 1.6.",
        NAMED["W1a"].case, BACKWARD, lambda p: [Way("two-pass", 1.25, dict(backward_schedule="two-pass"))],
    ),
    Experiment(
        "one pass for short keys, batch 8", "Two passes, as for any number of keys.",
        "7 tensors as large as q move instead of 4 and partial sums of 0.6.",
        NAMED["W1b"].case, BACKWARD, lambda p: [Way("two-pass", 1.5, dict(backward_schedule="two-pass"))],
    ),
    Experiment(
        "loads of the bias gradient", "One stage: tiles are loaded when they are needed.",
        "Two products a tile are over long before its four loads, and two programs a multiprocessor hide half of that.",
        SHARED_BIAS, ("bias_grad_kernel",),
        lambda p: [Way("one stage", 1.5, dict(bias_grad=p.bias_grad._replace(num_stages=1)))],
    ),
    Experiment(
        "spills", "The larger tile of the rule (`tuning/rules.py: tiles`); it spills 384 bytes a thread.",
        "A spill is written and read in L1, once a tile; smaller tiles load the same bias and compute as much.",
        BIASED, FORWARD, lambda p: [Way("128 x 64", 1.1, dict(forward=Config(128, 64, 8, 2)))],
    ),
)  # fmt: skip


def plan_of(case: Case, device: torch.device) -> Plan:
    return tuning.plan(trial.problem_of(case, device))


def ways_of(experiment: Experiment, device: torch.device) -> dict[str, Way]:
    """By name, for the GPU of the device, or for an H200."""
    return {way.name: way for way in experiment.ways(plan_of(half(experiment.case), device))}


def half(case: Case) -> Case:
    return replace(case, dtype=torch.bfloat16)
