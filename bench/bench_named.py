"""The named workloads, scaled down, against SDPA: what `python -m bench.run` times whole on a GPU.

At these sizes a call is mostly overhead, so there is no target; a result over its error budget fails.
"""

import pytest
import torch

from bench.named import DENSE, MASKED
from bench.providers import MODES, bind
from bench.verdict import judge, truths
from crossattn_kernels.testing import assert_within_budget

RACERS = ("ours", "sdpa auto")


@pytest.fixture
def one_thread():
    """Calls this small are not worth a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", (*DENSE, *MASKED), ids=lambda w: w.name)
def test_named(workload, mode, race, one_thread):
    known = truths(lambda seed: workload.inputs("cpu", small=True, seed=seed))
    for who in RACERS:
        assert_within_budget(judge(lambda call, who=who: bind(who, call, mode), known, mode), who)
    contenders = {who: bind(who, known[0].call, mode) for who in RACERS}
    race("named workloads, scaled down, against SDPA", f"{workload.name} {mode}", contenders, target=None, threads=1)
