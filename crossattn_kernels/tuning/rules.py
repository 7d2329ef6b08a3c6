"""Which schedule runs when, and tiles where no table knows better."""

from __future__ import annotations

from typing import NamedTuple

from crossattn_kernels.problem import Problem
from crossattn_kernels.tuning.chips import Chip

WAVES = 2  # programs a multiprocessor that a split aims at
MOST_EVENED = 4  # splits made only to fill the last wave
EVEN_ENOUGH = 1.05  # times the least time that fewer splits may take and still be preferred
MOST_EXTRAS = 3  # options of a call beside which sums of all three gradients fit the registers
READS = 2  # a split of the forward reads at least so many times the bytes of its partial result


class Config(NamedTuple):
    """How one kernel is launched."""

    BLOCK_M: int  # queries in a tile
    BLOCK_N: int  # keys in a tile
    num_warps: int
    num_stages: int  # of the load pipeline
    splits: int = 1  # programs that share one tile's loop; their partial results are summed in order
    packed: bool = False  # a tile of queries holds all query heads of a key head
    descriptors: bool = False  # tiles of keys are loaded through tensor descriptors (TMA) where chip and strides allow


# by kernel and padded head size: what stays in registers on sm_90 with a mask and a gate or a bias; tables know more
HALF = {
    "forward": {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    "dq": {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 64, 8, 2)},
    "dkv": {64: Config(32, 128, 8, 2), 128: Config(32, 128, 8, 2), 256: Config(16, 128, 8, 2)},
    "short_keys": {64: Config(16, 128, 8, 2), 128: Config(16, 128, 8, 2), 256: Config(16, 32, 8, 1)},
    "short_queries": {64: Config(64, 64, 8, 1), 128: Config(32, 64, 8, 2), 256: Config(16, 32, 8, 1)},
    "bias_grad": {64: Config(64, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 64, 8, 1)},
}
FULL = {64: Config(32, 32, 4, 2), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def head_size(problem: Problem) -> int:
    """The padded head size that registers and shared memory depend on: 64, 128 or 256."""
    return max(64, power_of_two(max(problem.D, problem.Dv)))


def tiles(kernel: str, problem: Problem, chip: Chip) -> Config:
    """The rule where a table is silent: what fits sm_90, with fewer stages and keys where that does not fit."""
    config = FULL[head_size(problem)] if problem.dtype.itemsize == 4 else HALF[kernel][head_size(problem)]
    while shared_bytes(kernel, config, problem) > chip.shared and (config.num_stages > 1 or config.BLOCK_N > 16):
        stages = config.num_stages - 1
        config = config._replace(num_stages=stages) if stages else config._replace(BLOCK_N=config.BLOCK_N // 2)
    return config


def fitted(config: Config, problem: Problem) -> Config:
    """Tiles no larger than the problem."""
    return config._replace(
        BLOCK_M=min(config.BLOCK_M, max(16, power_of_two(problem.M))),
        BLOCK_N=min(config.BLOCK_N, max(16, power_of_two(problem.N))),
    )


# ---- schedules ----


def dk_dv_apart(problem: Problem) -> bool:
    """Whether dk and dv of two-pass are two launches, each with p anew: sums of both would leave tiles of 32 keys."""
    return head_size(problem) > 128 and problem.dtype.itemsize == 2


def reasons(problem: Problem, keys: int, queries: int) -> dict[str, str]:
    """Schedules of the backward that cannot serve a problem, each with why; keys and queries are those in a tile."""
    p, found = problem, {}
    if p.N > keys:
        found["short keys"] = f"N = {p.N} keys do not fit one tile of {keys}"
    elif p.shares_q:
        found["short keys"] = "one batch entry of q serves all, and its gradient is a sum over them"
    if p.M * p.group > queries:
        found["short queries"] = f"M x GROUP = {p.M * p.group} queries do not fit one tile of {queries}"
    elif p.shares_k:
        found["short queries"] = "one batch entry of k and v serves all, and their gradients are sums over them"
    return found


def crowded(problem: Problem) -> dict[str, str]:
    """Schedules of the backward that could serve a problem but would spill, each with why."""
    if problem.extras <= MOST_EXTRAS or problem.dtype.itemsize > 2:
        return {}
    why = f"{problem.extras} options at once leave too few registers for the sums of all three gradients"
    return dict.fromkeys(("short keys", "short queries"), why)


def num_splits(programs: int, tiles: int, chip: Chip, least: int) -> int:
    """Programs that share each loop over `tiles` so that all multiprocessors have work; each has `least` or more.

    As many as fill WAVES: a few more would wait for all others, and take as long again.
    """
    wanted = WAVES * chip.multiprocessors // max(1, programs) if programs < chip.multiprocessors else 1
    return max(1, min(wanted, tiles // least))


def split_keys(config: Config, problem: Problem, chip: Chip) -> Config:
    """The forward, split over keys where tiles of queries are few; heads are packed where they do not fill a tile."""
    p = problem
    if p.group > 1 and p.M < config.BLOCK_M // 2:
        config = config._replace(packed=True, BLOCK_M=min(config.BLOCK_M, max(16, power_of_two(p.M * p.group))))
    if config.BLOCK_M <= 32 and p.dtype.itemsize == 2:  # rows for two warps, and keys for the others
        keys = 64 if head_size(p) < 256 else 32
        config = config._replace(num_warps=min(config.num_warps, 4), BLOCK_N=min(config.BLOCK_N, keys))
    rows, heads = (p.M * p.group, p.Hk) if config.packed else (p.M, p.Hq)
    programs = -(-rows // config.BLOCK_M) * p.B * heads
    partial = 2 * 4 * config.BLOCK_M * (p.Dv + 2)  # fp32, written and read
    least = -(-READS * partial // max(1, config.BLOCK_N * (p.D + p.Dv) * p.dtype.itemsize))
    return config._replace(splits=num_splits(programs, -(-p.N // config.BLOCK_N), chip, max(2, least)))


def split_queries(config: Config, problem: Problem, chip: Chip) -> Config:
    """The kernel of dk and dv, split over queries where tiles of keys are few, or leave much of a last wave idle.

    The second not for short keys, which wait for memory, and with partial sums no larger than dq.
    """
    p = problem
    heads = p.Hk * (1 if p.shares_k else p.B)
    programs, tiles = -(-p.N // config.BLOCK_N) * heads, -(-p.M // config.BLOCK_M)
    if programs < chip.multiprocessors or p.N <= config.BLOCK_N:
        return config._replace(splits=num_splits(programs, tiles, chip, least=4))
    partial, dq = 4 * heads * p.N * (p.D + p.Dv), p.B * p.Hq * p.M * p.D * p.dtype.itemsize
    most = max(1, min(MOST_EVENED, tiles // 4, dq // partial))
    times = {splits: -(-programs * splits // chip.multiprocessors) / splits for splits in range(1, most + 1)}
    return config._replace(splits=next(n for n, time in times.items() if time <= EVEN_ENOUGH * min(times.values())))


def split_dq(config: Config, problem: Problem, chip: Chip) -> Config:
    """The kernel of dq, split over keys where tiles of queries are few."""
    p = problem
    programs = -(-p.M // config.BLOCK_M) * p.Hq * (1 if p.shares_q else p.B)
    return config._replace(splits=num_splits(programs, -(-p.N // config.BLOCK_N), chip, least=4))


def split_terms(config: Config, problem: Problem, chip: Chip) -> Config:
    """The kernel of the bias gradient, whose programs share the terms of an entry where tiles of entries are few."""
    p = problem
    by_batch, by_head, by_query, by_key = p.bias_varies or (True,) * 4
    by_query, by_key = by_query or p.M == 1, by_key or p.N == 1
    summed = by_query and by_key  # over batch and heads; elsewhere each (b, h) has programs of its own
    rows, columns = -(-p.M // config.BLOCK_M), -(-p.N // config.BLOCK_N)
    programs = (rows if by_query else 1) * (columns if by_key else 1)
    programs *= (p.B if by_batch or not summed else 1) * (p.Hq if by_head or not summed else 1)
    steps = rows * columns * p.B * p.Hq // max(1, programs)
    return config._replace(splits=num_splits(programs, steps, chip, least=4))


def all_queries(config: Config, problem: Problem, chip: Chip) -> Config:
    """One tile of the queries of all heads of a key head; keys are split."""
    p = problem
    rows = min(config.BLOCK_M, max(16, power_of_two(p.M * p.group)))
    splits = num_splits(p.B * p.Hk, -(-p.N // config.BLOCK_N), chip, least=4)
    return fitted(config, problem)._replace(BLOCK_M=rows, packed=p.group > 1, splits=splits)


# ---- what a chip has room for ----


def shared_bytes(kernel: str, config: Config, problem: Problem) -> int:
    """Shared memory of one program, at most: what stays, the stages of what streams, and a tile of logits or two."""
    stays, streams = operand_bytes(kernel, config, problem)
    logits = (1 if kernel == "forward" else 2) * config.BLOCK_M * config.BLOCK_N * problem.dtype.itemsize
    return stays + config.num_stages * streams + logits


def operand_bytes(kernel: str, config: Config, problem: Problem) -> tuple[int, int]:
    """Bytes of the tiles that stay for a program's whole life, and of those of one turn of its loop."""
    D, Dv = (max(16, power_of_two(n)) for n in (problem.D, problem.Dv))
    of_query, of_key = config.BLOCK_M * (D + Dv), config.BLOCK_N * (D + Dv)
    stays = {"forward": config.BLOCK_M * D, "dq": of_query, "bias_grad": 0, "short_queries": of_query}.get(
        kernel, of_key
    )
    streams = of_query if kernel in ("dkv", "short_keys") else of_query + of_key if kernel == "bias_grad" else of_key
    return stays * problem.dtype.itemsize, streams * problem.dtype.itemsize


def accumulators(kernel: str, config: Config, problem: Problem) -> int:
    """Registers a thread that hold sums over the whole loop."""
    D, Dv = (max(16, power_of_two(n)) for n in (problem.D, problem.Dv))
    sizes = dict(forward=config.BLOCK_M * Dv, dq=config.BLOCK_M * D, short_queries=config.BLOCK_M * D)
    sizes["bias_grad"] = config.BLOCK_M * config.BLOCK_N
    if kernel == "dkv" and dk_dv_apart(problem):
        sizes["dkv"] = config.BLOCK_N * max(D, Dv)
    return sizes.get(kernel, config.BLOCK_N * (D + Dv)) // (32 * config.num_warps)


def check_fit(kernel: str, config: Config, problem: Problem, chip: Chip) -> None:
    """ValueError unless a forced configuration can run; whether one that may be too large is, Triton says."""
    (stays, streams), registers = operand_bytes(kernel, config, problem), accumulators(kernel, config, problem)
    least = stays + max(1, config.num_stages - 1) * streams  # the last stage may be in registers
    if least > chip.shared:
        raise ValueError(
            f"the forced {kernel} {config} needs {least} bytes of shared memory or more, "
            f"a program on {chip.arch} has {chip.shared}"
        )
    if registers > 255:
        raise ValueError(
            f"the forced {kernel} {config} needs {registers} registers for its sums, a thread on {chip.arch} has 255"
        )
