"""Every schedule gives what the general one gives: the battery with each forced, tiles small and splits uneven."""

from dataclasses import replace

import pytest
import torch

from crossattn_kernels import Mask, cross_attention, explain, tuning
from crossattn_kernels.kernels import launch
from crossattn_kernels.testing import DRAWS, FEATURES, PLAIN, assert_within_budget, check, compare, draw, run, worst
from crossattn_kernels.tuning import Config

TILE = Config(16, 16, 4, 1)
SCHEDULES = {
    # keys split in three for the forward, and for the backward with all queries of the group on chip
    "short queries": dict(
        forward=TILE._replace(splits=3, packed=True),
        backward_schedule="short queries",
        short_queries=Config(128, 16, 4, 1, splits=3, packed=True),
    ),
    # keys on chip, queries split in two
    "short keys": dict(
        forward=TILE._replace(splits=2), backward_schedule="short keys", dkv=Config(16, 64, 4, 1, splits=2)
    ),
    # heads packed, keys not split; keys of dq split in two, queries of dk and dv and terms of the bias in three
    "two-pass": dict(
        forward=TILE._replace(packed=True),
        backward_schedule="two-pass",
        dq=TILE._replace(splits=2),
        dkv=Config(16, 32, 4, 1, splits=3),
        bias_grad=Config(16, 32, 4, 1, splits=3),
    ),
    # of the forward alone; the larger the tiles of the backward, the sooner the interpreter is done with it
    "descriptors": dict(
        forward=TILE._replace(descriptors=True),
        backward_schedule="two-pass",
        **dict.fromkeys(("dq", "dkv", "bias_grad"), Config(64, 64, 4, 1)),
    ),
}
REFUSES = {"short keys": "one batch entry of q", "short queries": "one batch entry of k and v"}
# one of each kind; what only changes the layout or a constant is the battery's
NAMES = [
    "plain", "mask ranges", "mask head ranges", "mask packed", "mask padding", "mask head dense", "mask tiles",
    "mask blocks", "mask nothing", "mask all fields", "uniform ranges", "uniform all fields", "attend_all ranges",
    "attend_all every second", "bias (1, 1, 1, 1)", "bias (0, 0, 1, 1)", "bias (0, 1, 0, 1)", "gate scalar",
    "gate head", "gate channel", "gate head at 0", "scale head", "softcap", "dropout", "layout sliced", "share q",
    "share kv", "share q, gate, scale", "everything", "everything by channel",
]  # fmt: skip
CASES = [c for c in FEATURES if c.name in NAMES]


def refused(name, case):
    if name == "short keys":
        return (case.share or "").startswith("q")
    return name == "short queries" and (case.share or "").startswith("kv")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_within_budget(name, case):
    with tuning.force(**SCHEDULES[name]):
        if refused(name, case):
            with pytest.raises(ValueError, match=REFUSES[name]):
                check(case, "triton")
        else:
            assert_within_budget(check(case, "triton"), f"{name}, {case}")


# all options in fp16 are the battery's, too
@pytest.mark.parametrize(
    ("case", "dtype"), [("plain", torch.bfloat16), ("plain", torch.float16), ("everything", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_within_budget_in_half_precision(name, case, dtype):
    case = replace(next(c for c in FEATURES if c.name == case), dtype=dtype)
    with tuning.force(**SCHEDULES[name]):
        assert_within_budget(check(case, "triton"), f"{name}, {case}")


def test_names_exist():
    assert len(CASES) == len(NAMES)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("M, N", [(1, 53), (37, 1), (1, 1), (3, 50), (37, 16), (33, 17)])
def test_odd_sizes(name, M, N):
    """Tiles that are full, one too many, or hold one row; more splits than tiles."""
    with tuning.force(**SCHEDULES[name]):
        assert_within_budget(check(replace(PLAIN, M=M, N=N, B=1, D=16, mask="ranges"), "triton"), f"{name} {M} {N}")


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_runs_are_bitwise_equal(name):
    call = draw(replace(next(c for c in FEATURES if c.name == "everything"), M=19, N=37, D=16))
    with tuning.force(**SCHEDULES[name]):
        first, second = run(call, "triton"), run(call, "triton")
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", ["short keys", "short queries", "two-pass"])
@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv", "gate"])
def test_some_gradients_only(name, wanted):
    """What is not asked for is not computed, and the rest is right without it."""
    check_some(name, wanted, replace(PLAIN, gate="head", M=9, N=21, D=16, B=1))


@pytest.mark.parametrize("wanted", ["k", "v", "kv", "qk"])
def test_some_gradients_of_large_heads_only(wanted, monkeypatch):
    """dk and dv are launches of their own."""
    ran, launched = [], launch.Launcher.__call__

    def count(self, kernel, *args, label=""):
        ran.append((kernel.__name__, label))
        return launched(self, kernel, *args, label=label)

    monkeypatch.setattr(launch.Launcher, "__call__", count)
    check_some("two-pass", wanted, replace(PLAIN, M=9, N=21, D=136, B=1, dtype=torch.bfloat16))
    assert {label for kernel, label in ran if kernel == "dkv_kernel"} == set(wanted) - {"q"}


def check_some(name, wanted, case):
    names = ["gate"] if wanted == "gate" else list(wanted)

    def gradients(call, backend, dtype=case.dtype):
        leaves = {n: t.to(dtype).requires_grad_(n in names) for n, t in call.tensors.items()}
        y = cross_attention(**leaves, backend=backend)
        return dict(zip(names, torch.autograd.grad(y, [leaves[n] for n in names], call.dy.to(dtype))))

    def rows(call):
        ways = gradients(call, "triton"), gradients(call, "reference", torch.float64), gradients(call, "reference")
        return compare(*ways)

    with tuning.force(**SCHEDULES[name]):
        # a gate has a few elements only, so that one draw is a matter of luck
        assert_within_budget(worst([rows(draw(case, seed=seed)) for seed in range(DRAWS)]), wanted)


@pytest.mark.parametrize("shared", ["keys of a batch", "heads of a group"])
def test_ranges_that_differ_among_those_who_share_keys(shared):
    """A tile of keys meets only the queries that may see it: a NaN in one query reaches the keys in its own range."""
    q, k, start = torch.randn(4, 1, 40, 16), torch.randn(1, 1, 128, 16, requires_grad=True), torch.arange(4) * 32
    start = start[:, None, None].expand(4, 1, 40)
    if shared == "heads of a group":
        q, start = q.transpose(0, 1), start.transpose(0, 1)
    q.flatten(0, 1)[2, 3] = torch.nan
    with tuning.force(**SCHEDULES["two-pass"]):
        y = cross_attention(q, k, k.detach(), Mask(start, start + 32), backend="triton")
        (dk,) = torch.autograd.grad(y.sum(), [k])
    assert dk.isnan().any(-1).flatten().nonzero().flatten().tolist() == list(range(64, 96))


PARTS = {  # tiles of which steps are parts, and shares without a key
    "short queries": dict(
        forward=Config(16, 64, 4, 1, splits=3),
        backward_schedule="short queries",
        short_queries=Config(16, 16, 4, 1, splits=5, packed=True),
    ),
    "two-pass": dict(
        forward=Config(32, 128, 4, 1), backward_schedule="two-pass", dq=Config(64, 64, 4, 1), dkv=Config(16, 64, 4, 1)
    ),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("mask", ["ranges", "padding", "few", "none"])
def test_tiles_that_all_queries_see_and_that_some_see_in_part(mask, name):
    """And those that none sees, whose gradients are 0."""
    start = torch.tensor([[70, 21, 40], [0, 16, 5]])[:, None]
    masks = {
        "ranges": Mask(start, torch.tensor([250, 300, 208])),
        "padding": Mask.key_padding((torch.arange(300) % 299 >= 70) & (torch.arange(300) != 200)),
        "few": Mask.lengths(torch.tensor([3, 1])),
        "none": Mask.lengths(torch.tensor([0, 300])),
    }
    call = draw(replace(PLAIN, B=2, Hq=4, M=3, N=300, D=16))._replace(mask=masks[mask])
    with tuning.force(**PARTS[name]):
        ways = run(call, "triton"), run(call, "reference", torch.float64), run(call, "reference")
    assert_within_budget(compare(*ways), f"{mask}, {name}")


def test_a_schedule_that_cannot_serve_says_so():
    q, k = torch.zeros(2, 4, 300, 16), torch.zeros(2, 2, 300, 16)
    with tuning.force(backward_schedule="short keys"):
        with pytest.raises(ValueError, match="'short keys' cannot serve this call: N = 300 keys do not fit one tile"):
            cross_attention(q, k, k, backend="triton")
    said = str(explain(q, k, k, backend="triton"))
    assert "not short keys: N = 300 keys" in said and "not short queries: M x GROUP = 600 queries" in said


@pytest.mark.parametrize(
    ("field", "config", "says"),
    [
        ("forward", Config(256, 256, 8, 4), r"needs 458752 bytes of shared memory or more, .* sm_90 has 232448"),
        ("dkv", Config(16, 128, 1, 1), r"needs 1024 registers for its sums, a thread on sm_90 has 255"),
        ("dkv", Config(16, 512, 8, 1), r"the forced short_keys .* needs .*"),
    ],
)
def test_a_configuration_that_does_not_fit(field, config, says):
    q = torch.zeros(1, 1, 300, 128, dtype=torch.bfloat16)
    with tuning.force(**{field: config}), pytest.raises(ValueError, match=says):
        cross_attention(q, q, q, backend="triton")


def test_only_fields_of_a_plan_can_be_forced():
    with pytest.raises(ValueError, match="a plan has .*, not speed"), tuning.force(speed=9):
        pass
