"""The battery: every feature of the call on every backend, results and all gradients within the error budget."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from crossattn_kernels.testing import (
    FEATURES,
    GATES,
    LAYOUTS,
    MASKS,
    SIZES,
    Case,
    assert_within_budget,
    check,
    draw,
    run,
    with_dtypes,
)

HALF = (torch.bfloat16, torch.float16)
# under the interpreter a case takes seconds: all features in fp32, and in half precision those that touch its casts
HALF_NAMES = (
    "plain", "everything", "everything by channel", "gate head", "gate head at 0", "bias (1, 1, 1, 1)",
    "bias (0, 1, 0, 1)",
    "dropout", "mask ranges", "share q", "D 40", "D 160", "D 96 Dv 64", "3 x 77",
)  # fmt: skip
BATTERY = [("torch", c) for c in with_dtypes(FEATURES + SIZES, torch.float32, *HALF)]
BATTERY += [("triton", c) for c in FEATURES + SIZES]
BATTERY += [("triton", c) for c in with_dtypes([c for c in FEATURES + SIZES if c.name in HALF_NAMES], *HALF)]


@pytest.mark.parametrize(("backend", "case"), BATTERY, ids=str)
def test_within_budget(backend, case):
    assert_within_budget(check(case, backend), case)


def test_the_battery_can_fail(monkeypatch):
    """One percent of a wrong scale is over the budget."""
    case = Case("plain")
    call = draw(case)
    wrong = call._replace(options=call.options | {"scale": 1.01 * case.D**-0.5})
    monkeypatch.setattr("crossattn_kernels.testing.run", lambda c, b, *a: run(wrong if b == "torch" else c, b, *a))
    with pytest.raises(AssertionError, match=r"y: error .* dv: error"):
        assert_within_budget(check(case, "torch"))


cases = st.builds(
    Case,
    name=st.just("drawn"),
    B=st.integers(1, 3),
    Hk=st.integers(1, 2),
    M=st.integers(0, 40),
    N=st.integers(0, 50),
    D=st.integers(1, 40),
    Dv=st.none() | st.integers(1, 40),
    mask=st.none() | st.sampled_from(sorted(MASKS)),
    bias=st.none() | st.tuples(*[st.integers(0, 1)] * 4),
    gate=st.none() | st.sampled_from(sorted(GATES)) | st.tuples(*[st.integers(0, 1)] * 4),
    scale=st.sampled_from([None, "scalar", "head", 0.3]),
    softcap=st.sampled_from([None, 2.0]),
    dropout_p=st.sampled_from([0.0, 0.25]),
    empty_rows=st.sampled_from(["zero", "uniform", "attend_all"]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    share=st.sampled_from([None, "q", "kv", "q expanded", "kv expanded"]),
)


def with_group(case: Case, group: int) -> Case:
    return Case(**{**vars(case), "Hq": case.Hk * group})


quiet = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(max_examples=150, **quiet)
@given(case=cases, group=st.integers(1, 3), seed=st.integers(0, 99))
def test_drawn_problems_torch(case, group, seed):
    assert_within_budget(check(with_group(case, group), "torch", seed=seed), case)


# no shrinking under the interpreter: it would take an hour
@settings(max_examples=20, phases=[Phase.explicit, Phase.generate], **quiet)
@given(case=cases, group=st.integers(1, 3), seed=st.integers(0, 99))
def test_drawn_problems_triton(case, group, seed):
    assert_within_budget(check(with_group(case, group), "triton", seed=seed), case)
