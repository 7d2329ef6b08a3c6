"""A machine that executes PTX in NumPy, so that compiled kernels run where there is no GPU.

`parse` reads what Triton's compiler wrote, `machine` runs one program (CTA) at a time with an array a register,
`driver` takes the place of Triton's driver.  It is test equipment: exact about values, addresses and ordering, silent
about time.
"""
