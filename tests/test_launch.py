"""What reaches a GPU: calls through Triton's own launcher, down to a CUDA driver that writes their arguments down.

The rest of the tests binds kernels to Triton's interpreter, so these run in a process of their own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = """
import gc
import struct
import sys

import torch

from bench import libcuda
from crossattn_kernels import cross_attention, cross_attention_chunked
from crossattn_kernels.kernels.launch import CONFIGS, Launcher
from crossattn_kernels.testing import FEATURES, SIZES, draw, run

arrived, checked = [], []
launch = Launcher.__call__


def bits(value, type):
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if type == "fp32":
        return int.from_bytes(struct.pack("<f", value), "little")
    return int(value) % 2 ** (8 * libcuda.BYTES[type])


def values(arguments, types):
    for argument, type in zip(arguments, types, strict=True):
        if isinstance(type, tuple):
            yield from values(argument, type)
        elif type != "constexpr":
            yield bits(argument, type)


def launch_and_look(self, kernel, arguments, *tensors, label=""):
    launch(self, kernel, arguments, *tensors, label=label)
    programs, *expected = arguments(*tensors)
    compiled, config = self.launches[kernel.__name__, label].kernel, getattr(self.plan, CONFIGS[kernel.__name__])
    expected = tuple(values((*expected, self.constants(config)), compiled.src.signature.values()))
    assert arrived.pop() == (kernel.__name__, programs, 32 * config.num_warps, compiled.metadata.shared, expected)
    assert not arrived
    ptx = compiled.asm["ptx"]
    if kernel.__name__ == "dkv_kernel":  # PTX's other minimum takes NaN for the highest number
        assert ("min.NaN.f32" in ptx) is self.problem.biased
    entry = ptx.partition(".entry")[2].partition("{")[0]
    assert entry.count(".param") == len(expected) + 2, entry  # memory that Triton may want comes last
    checked.append(kernel.__name__)


def alive():  # bytes of all tensors
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


Launcher.__call__ = launch_and_look
with libcuda.launching("sm_90", arrived.append):
    for case in FEATURES + SIZES:
        if case.name in sys.argv[1:]:
            for _ in range(2):  # compiled; found again, with other tensors
                call = draw(case, "cpu")
                run(call, "triton")
    q, *chunks = (torch.randn(1, 2, n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (600, 30, 40))
    for _ in range(2):
        cross_attention(q, chunks[0], chunks[0], backend="triton").sum().backward()
        cross_attention_chunked(q, [(c, c) for c in chunks], backend="triton").sum().backward()
    del call
    before = alive()
    call = draw(FEATURES[0], "cpu")._replace(options={"bias": torch.zeros(37, 53)})  # a signature that is new
    run(call, "triton")
    del call
    assert alive() == before, "a launch keeps the tensors of its first call"
print(*sorted(set(checked)))
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler, which Triton's launcher needs")
def test_every_argument_reaches_its_parameter(tmp_path):
    script = tmp_path / "launches.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    cases = "plain, long padding, everything, everything by channel, 1 x 130, D 40, empty N".split(", ")
    cases.append("share q, gate, scale")
    command = [sys.executable, str(script), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = "bias_grad delta dkv dq filled fold forward key_bounds merge short_queries tile_ranges".split()
    assert done.stdout.split() == [f"{name}_kernel" for name in kernels]
