"""A few instructions as a kernel: operands come from a tensor, results go to another."""

from __future__ import annotations

from typing import Any

import torch

from tests.ptx.machine import Machine
from tests.ptx.memory import Global
from tests.ptx.parse import parse

KERNEL = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry by_hand(
	.param .u64 .ptr .global .align 1 source,
	.param .u64 .ptr .global .align 1 target
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %h<9>;
	.reg .b32 %r<9>;
	.reg .b32 %a<9>;
	.reg .b32 %d<9>;
	.reg .b64 %x<9>;
	.loc	1 7 7                         // by_hand.py:7:7
	ld.param.b64 	%x1, [source];
	ld.param.b64 	%x2, [target];
	mov.u32 	%r0, %tid.x;
	mov.b32 	%r1, global_smem;
	mul.wide.u32 	%x3, %r0, {read};
	add.s64 	%x1, %x1, %x3;
	mul.wide.u32 	%x3, %r0, {written};
	add.s64 	%x2, %x2, %x3;
	{loads}
	{body}
	{stores}
	ret;
}}
"""


def run(body: str, source: Any, results: int = 1, threads: int = 32) -> torch.Tensor:
    """What `body` leaves in %d0, %d1, ... of every thread, as int32; %a0, %a1, ... hold its row of `source`."""
    source = torch.as_tensor(source).reshape(threads, -1).contiguous()
    words = source.view(torch.int32)
    target = torch.full((threads, results), -1, dtype=torch.int32)
    loads = "".join(f"ld.global.b32 %a{i}, [%x1+{4 * i}];\n" for i in range(words.shape[1]))
    stores = "".join(f"st.global.b32 [%x2+{4 * i}], %d{i};\n" for i in range(results))
    text = KERNEL.format(
        threads=threads, read=4 * words.shape[1], written=4 * results, loads=loads, body=body, stores=stores
    )
    machine = Machine(parse(text), shared_bytes=4096)
    for held, tensor in zip(machine.params.values(), (source, target)):
        held[0] = tensor.data_ptr()
    machine.run(0, 1, Global((source, target)))
    return target
