"""Drawn problems in which keys hold NaN or infinity: to queries that do not see them they might as well hold 0."""

import math
from dataclasses import replace

import hypothesis.strategies as st
import torch
from hypothesis import Phase, given, settings

from crossattn_kernels import tuning
from crossattn_kernels.testing import DRAWS, MORE_DRAWS, assert_within_budget, compare, draw, run, worst
from crossattn_kernels.tuning import Config
from tests.test_battery import cases, quiet, with_group


def visible(call, case):
    """Who sees what, also by the bias: (B, Hq, M, N)."""
    sizes = case.B, case.Hq, case.M, case.N
    seen = torch.ones(sizes, dtype=torch.bool) if call.mask is None else call.mask.as_dense(*sizes).expand(sizes)
    empty = ~seen.any(-1, keepdim=True)
    shown = call.tensors.get("bias", torch.zeros(1)) > -math.inf
    if case.empty_rows == "uniform":  # whatever the bias
        return (seen & shown) | empty
    return (seen | (empty & (case.empty_rows == "attend_all"))) & shown


def check(case, backend, seed, names, bad, often):
    """Results where no bad key is seen, by a loss of these alone, against the reference with 0 for what is bad."""
    g, call = torch.Generator().manual_seed(seed), draw(case, seed=seed)
    if "bias" in call.tensors:
        bias = call.tensors["bias"]
        bias[torch.rand(bias.shape, generator=g) < 0.3] = -math.inf
    keys, seen = torch.rand(case.B, case.N, generator=g) < often, visible(call, case)
    sees = (seen & keys[:, None, None]).any(-1)  # (B, Hq, M)
    touched = (seen & sees[..., None]).any(2).unflatten(1, (case.Hk, -1)).any(2)  # (B, Hk, N)
    call = call._replace(dy=call.dy.masked_fill(sees[..., None], 0), dlse=call.dlse.masked_fill(sees, 0))

    def results(value, backend, dtype=None):
        tensors = {n: call.tensors[n].masked_fill(keys[:, None, :, None], value) for n in names}
        found = run(call._replace(tensors=call.tensors | tensors), backend, dtype)
        reached = dict(y=sees[..., None], lse=sees, dq=sees[..., None], dk=touched[..., None], dv=touched[..., None])
        return {name: found[name].masked_fill(rows, 0) for name, rows in reached.items()}

    return compare(results(bad, backend), *(results(0.0, "reference", dtype) for dtype in (torch.float64, None)))


hidden = dict(
    case=cases.map(lambda case: replace(case, share=None)),
    group=st.integers(1, 2),
    seed=st.integers(0, 99),
    names=st.sampled_from(["k", "v", "kv"]),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    often=st.sampled_from([0.05, 0.3]),
)


@settings(max_examples=60, **quiet)
@given(**hidden)
def test_drawn_problems_torch(case, group, seed, names, bad, often):
    case = with_group(case, group)
    rows = [check(case, "torch", seed + i, names, bad, often) for i in range(MORE_DRAWS)]
    assert_within_budget(worst(rows), case)


@settings(max_examples=20, phases=[Phase.explicit, Phase.generate], **quiet)
@given(**hidden, schedule=st.sampled_from(["two-pass", "short keys", "short queries"]), tile=st.sampled_from([16, 32]))
def test_drawn_problems_triton(case, group, seed, names, bad, often, schedule, tile):
    case = with_group(case, group)
    if schedule != "two-pass":  # a tile holds all keys, or the queries of all heads of a group
        case = replace(case, N=min(case.N, tile), M=min(case.M, tile // group))
    tiles = Config(tile, tile, 4, 1)
    with tuning.force(forward=tiles, dq=tiles, dkv=tiles, backward_schedule=schedule if case.M * case.N else None):
        rows = [check(case, "triton", seed + i, names, bad, often) for i in range(DRAWS)]
    assert_within_budget(worst(rows), case)
