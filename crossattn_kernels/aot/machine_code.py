"""What a kernel became: registers, spills and the instructions that matter, from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton

from crossattn_kernels.aot.products import BANDWIDTH, ENTRIES, NARROW_RATE, wide_product
from crossattn_kernels.tuning import CHIPS

# instructions by the field that counts them, at the beginning of an opcode
COUNTED = {
    "hgmma": r"HGMMA\b",
    "hmma": r"HMMA\b",
    "utchmma": r"UTC[A-Z]*MMA\b",
    "mfma": r"v_mfma_",
    "waits": r"WARPGROUP\.DEPBAR\b",
    "exponentials": r"MUFU\.EX2\b|v_exp_f32",
    "tma_loads": r"UTMALDG\b",
    "wide_copies": r"LDGSTS[.\w]*\.128\b",
    "narrow_loads": r"LDG\.E[.\w]*\.U16\b|(?:global|buffer)_load_(?:u16|ushort|d16|short)",
    "spill_loads": r"LDL\b",
    "spill_stores": r"STL\b",
}
CYCLES = ("product_cycles", "shared_cycles", "issue_cycles")
MOVED = {".128": 16, "88.4": 16, ".64": 8, "88.2": 8}  # bytes a thread by a part of the opcode; 4 without one
REGISTERS, THREADS, PROGRAMS = 65536, {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048}, 32  # of a multiprocessor


class Figures(NamedTuple):
    """One compiled kernel.  Counts are of instructions in its code, wherever they stand."""

    registers: int  # a thread
    stack: int  # bytes a thread
    spill_loads: int  # LDL
    spill_stores: int  # STL
    shared: int  # bytes a program
    programs: int | None  # that fit a multiprocessor at once; None where that is not known
    hgmma: int  # tensor-core instructions of sm_90
    hmma: int  # of sm_80, and of sm_90 where a tile is too short for HGMMA
    utchmma: int  # of sm_100
    mfma: int  # of AMD
    waits: int  # for HGMMA: as many as there are HGMMA if ptxas serialised them
    exponentials: int
    overlapped: float | None  # share of a loop's exponentials issued while a product is under way (sm_90)
    overwritten: int  # instructions that write what an HGMMA under way may still read: wrong code
    tma_loads: int
    wide_copies: int  # 16 bytes from global to shared memory
    narrow_loads: int  # 2 bytes
    # cycles that 128 x 128 logits keep parts of a multiprocessor busy, at least; 0 without HGMMA and HMMA
    product_cycles: int = 0  # the tensor cores, or shared memory with what they read by themselves
    shared_cycles: int = 0  # shared memory with the rest
    issue_cycles: int = 0  # one instruction each for four warps


def figures(compiled: Any, arch: str, entries: int, brief: bool = False) -> Figures:
    """Those of what Triton compiled for tiles of `entries` logits; if brief, without counts, which take most time."""
    shared, threads = compiled.metadata.shared, compiled.metadata.num_warps * compiled.metadata.target.warp_size
    if "cubin" in compiled.asm:
        usage, code = disassembled(compiled.asm["cubin"], brief)
        registers, stack = _numbers(r"REG:(\d+) STACK:(\d+)", usage)
        spills = {}
    else:
        code = compiled.asm["amdgcn"]
        (registers,), (stack,) = (
            _numbers(pattern, code) for pattern in (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
        )
        (spilled,) = _numbers(r"\.vgpr_spill_count:\s+(\d+)", code)
        spills = dict(spill_loads=spilled, spill_stores=spilled)
    opcodes = [opcode for _, opcode, _ in instructions(code)]
    counts = {name: sum(bool(re.match(p, o)) for o in opcodes) for name, p in COUNTED.items()}
    cycles = zip(CYCLES, busy(code, compiled.metadata.num_warps))
    return Figures(
        registers=registers,
        stack=stack,
        shared=shared,
        programs=programs(arch, registers, shared, threads),
        overlapped=overlapped(code),
        overwritten=overwritten(code),
        **{name: round(n * ENTRIES / entries) for name, n in cycles},
        **(counts | spills),
    )


def programs(arch: str, registers: int, shared: int, threads: int) -> int | None:
    """Programs of one kernel that a multiprocessor of NVIDIA holds at once.

    Registers are given to warps by 256; a program takes 1 KiB of shared memory besides its own.
    """
    if not arch.startswith("sm_"):
        return None
    warps = threads // 32
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = (CHIPS[arch].shared + 1024) // (shared + 1024)
    return min(by_registers, by_shared, 2048 // threads, PROGRAMS)


def disassembled(cubin: bytes, brief: bool) -> tuple[str, str]:
    """(resource usage, SASS unless brief), by the tool in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
        code = "" if brief else subprocess.run([tool, "-sass", file.name], capture_output=True, text=True).stdout
    return usage.stdout + usage.stderr, code


def instructions(code: str) -> Iterator[tuple[int, str, str]]:
    """(address, opcode, operands) of SASS, without what an instruction is predicated on; addresses of AMD are 0."""
    sass = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)
    found = False
    for match in sass.finditer(code):
        found = True
        yield int(match[1], 16), match[2], match[3]
    if not found:
        yield from ((0, match[1], match[2]) for match in re.finditer(r"^\s+([a-z]\w+)[ \t]+(.*)$", code, re.M))


Listing = list[tuple[int, str, str]]


def loops(code: str) -> Iterator[Listing]:
    """The instructions of every loop."""
    listing = list(instructions(code))
    at = {address: i for i, (address, _, _) in enumerate(listing)}
    for i, (address, opcode, operands) in enumerate(listing):
        target = re.search(r"(0x[0-9a-f]+)$", operands) if opcode.startswith("BRA") else None
        if target is not None and int(target[1], 16) < address:
            yield listing[at[int(target[1], 16)] : i + 1]


def busy(code: str, warps: int) -> tuple[float, ...]:
    """`CYCLES` of one turn of the loop with the fewest instructions for what it multiplies."""
    counted = [cycles for cycles in map(_counted, loops(code)) if cycles[0]]
    least = min(counted, key=lambda cycles: cycles[2] / cycles[0], default=(0.0, 0.0, 0.0))
    return tuple(cycles * warps for cycles in least)


def _counted(loop: Listing) -> tuple[float, float, float]:
    """The same of one turn of a loop, for one warp."""
    product = shared = 0.0
    for _, opcode, operands in loop:
        wide = re.match(r"HGMMA\.64x(\d+)x", opcode)
        if wide is not None:
            in_registers = re.match(r"R\d+, R\d+,", operands) is not None
            product += wide_product(int(wide[1]), not in_registers) / 4  # of four warps
        elif opcode.startswith("HMMA"):
            product += 16 * 8 * (16 if ".16816" in opcode else 8) / NARROW_RATE
        elif re.match("LDS|STS|LDGSTS", opcode):
            moved = next((size for part, size in MOVED.items() if part in opcode), 4)
            shared += moved * 32 / BANDWIDTH
    return product, shared, len(loop) / 4


def overlapped(code: str) -> float | None:
    """The share of a loop's exponentials issued between a product and the wait for it: the most of all loops."""
    shares = [hidden / total for hidden, total in map(_hidden, loops(code)) if total]
    return round(max(shares), 2) if shares else None


def _hidden(loop: Listing) -> tuple[int, int]:
    """(exponentials under a product, all of them) of a loop; none where it has no HGMMA."""
    under_way, hidden, total = False, 0, 0
    if any(opcode.startswith("HGMMA") for _, opcode, _ in loop):
        for _, opcode, operands in loop:
            if opcode.startswith("HGMMA"):
                under_way = True
            elif opcode.startswith("WARPGROUP.DEPBAR"):
                under_way = not operands.endswith(", 0x0")
            elif opcode.startswith("MUFU.EX2"):
                hidden, total = hidden + under_way, total + 1
    return hidden, total


# instructions whose first operand is no register that they write, besides those of the uniform registers
WRITE_NONE = re.compile(
    r"[DFI]SETP|HSETP2|PLOP3|R2P|R2UR|ST[GLS]?|STSM|RED|LDGSTS|LDGDEPBAR|DEPBAR|WARP|BAR|BRA|BRX|CALL|RET|MEMBAR|"
    r"CCTL|ERRBAR|FENCE|ARRIVES|SYNCS|U"
)


def overwritten(code: str) -> int:
    """Instructions that write a register from which an HGMMA under way may still read its left operand.

    The assembler must keep these until the product is waited for.  That of CUDA 12 does not always; fixed in CUDA 13.3,
    see https://github.com/triton-lang/triton/pull/11781.
    """
    listing = list(instructions(code))
    at = {address: i for i, (address, _, _) in enumerate(listing)}
    found, seen = set(), set()
    # all paths: an instruction, and the registers read by each group under way and by the one that is still open
    todo: list[tuple[int, tuple[frozenset[int], ...], frozenset[int]]] = [(0, (), frozenset())]
    while todo:
        i, groups, last = todo.pop()
        while i < len(listing) and (i, groups, last) not in seen:
            seen.add((i, groups, last))
            _, opcode, operands = listing[i]
            if opcode.startswith("HGMMA"):
                left = re.match(r"R\d+, R(\d+),", operands)
                last |= _span(int(left[1]), 4) if left else frozenset()
                if operands.endswith("gsb0"):
                    groups, last = (*groups, last), frozenset()
            elif opcode.startswith("WARPGROUP.DEPBAR"):
                groups = groups[max(0, len(groups) - int(operands.split(", ")[1], 16)) :]
            elif written(opcode, operands) & last.union(*groups):
                found.add(i)
            target = re.search(r"(0x[0-9a-f]+)$", operands) if opcode.startswith("BRA") else None
            if target is not None:
                todo.append((at[int(target[1], 16)], groups, last))
            i += 1
    return len(found)


def written(opcode: str, operands: str) -> frozenset[int]:
    """The registers that an instruction of NVIDIA's writes."""
    register = re.match(r"(?:!?U?PT?\d?, )?R(\d+)(?=,|$)", operands)
    if register is None or WRITE_NONE.match(opcode):
        return frozenset()
    if opcode.startswith("HMMA"):
        return _span(int(register[1]), 4)
    wide = re.search(r"\.128|\.M88\.4", opcode), re.search(r"\.64|\.M88\.2|WIDE|^D[AFM]|^CS2R(?!\.32)", opcode)
    return _span(int(register[1]), 4 if wide[0] else 2 if wide[1] else 1)


def _span(first: int, count: int) -> frozenset[int]:
    return frozenset(range(first, first + count))


def _numbers(pattern: str, text: str) -> tuple[int, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern!r} in what the disassembler says: {text[:200]!r}")
    return tuple(map(int, match.groups()))
