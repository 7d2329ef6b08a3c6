"""Backend "torch" against `F.scaled_dot_product_attention`: dense, and with ranges that hide half of the keys."""

import pytest
import torch

from bench.providers import MODES, PROVIDERS, bind
from bench.workloads import DENSE, HALF_HIDDEN


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", DENSE, ids=str)
def test_dense(workload, mode, race):
    _race("dense fp32 against SDPA", workload, mode, race, target=0.9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", HALF_HIDDEN, ids=str)
def test_half_hidden(workload, mode, race):
    _race("ranges against SDPA with the dense bool mask", workload, mode, race, target=1.5)


def _race(table, workload, mode, race, target):
    call, c = workload.draw(), workload.case
    with torch.no_grad():  # a wrong result is not timed
        torch.testing.assert_close(PROVIDERS["ours"](call)(), PROVIDERS["sdpa"](call)(), atol=1e-5, rtol=1e-4)
    hidden = {} if call.mask is None else dict(hidden=f"{1 - call.mask.as_dense(c.B, 1, c.M, c.N).double().mean():.0%}")
    race(table, f"{workload} {mode}", {who: bind(who, call, mode) for who in ("ours", "sdpa")}, target, **hidden)
