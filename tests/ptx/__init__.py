"""A machine that executes PTX in NumPy, so that compiled kernels run where there is no GPU.

`parse` reads what Triton's compiler wrote, `machine` runs one program (CTA) at a time with an array a register, `steps`
and `arithmetic` are its instructions, `tensor_cores` its products, `memory` what it checks; `driver` takes the place of
Triton's driver, so that a call on CPU tensors goes all the way from `cross_attention` to the machine.

What it finds: wrong values, addresses outside of tensors or unaligned, races in shared memory, and what is read before
it has arrived.  What it does not: ptxas, time, races between programs or within a warp, and the last bits of
approximate instructions.
"""
