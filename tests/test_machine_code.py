"""What is read from a disassembly."""

import re

import pytest

from crossattn_kernels.aot.machine_code import busy, instructions, overlapped, overwritten, programs

SASS = """
        /*0000*/                   MUFU.EX2 R1, R2 ;                    /* 0x0 */
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;  /* 0x0 */
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;      /* 0x0 */
        /*0030*/               @P0 MUFU.EX2 R1, R2 ;                    /* 0x0 */
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], RZ, gsb0 ;  /* 0x0 */
        /*0050*/                   MUFU.EX2 R3, R2 ;                    /* 0x0 */
        /*0060*/                   MUFU.EX2 R3, R2 ;                    /* 0x0 */
        /*0070*/                   MUFU.EX2 R3, R2 ;                    /* 0x0 */
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;      /* 0x0 */
        /*0090*/              @!P0 BRA 0x10 ;                           /* 0x0 */
        /*00a0*/                   EXIT ;                               /* 0x0 */
"""


def replaced(address, instruction, code=SASS):
    return re.sub(rf"(/\*{address}\*/\s+).*? ;", rf"\1{instruction} ;", code)


def test_instructions_and_what_runs_under_a_product():
    listing = list(instructions(SASS))
    assert listing[0] == (0, "MUFU.EX2", "R1, R2") and listing[3][1] == "MUFU.EX2" and listing[-1][1:] == ("EXIT", "")
    assert overlapped(SASS) == 0.75
    assert overlapped(SASS.replace("BRA 0x10", "BRA 0xa0")) is None


def test_what_a_loop_keeps_busy():
    # a product with both operands in shared memory reads 4 KiB for 64 columns, 32 cycles, as long as it multiplies
    assert busy(SASS, 4) == (64, 0, 9)  # instructions 0x10 to 0x90
    assert busy(replaced("0010", "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], RZ"), 4) == (20 + 32, 0, 9)
    moving = replaced("0050", "LDSM.16.M88.4 R4, [R2]", replaced("0060", "STS R4, [R2]"))
    assert busy(moving, 8) == (128, 8 * (4 + 1), 18)
    narrow = replaced("0010", "HMMA.16816.F32.BF16 R4, R8, R12, R4", replaced("0040", "NOP"))
    assert busy(narrow, 8) == (16, 0, 18)
    assert busy(SASS.replace("BRA 0x10", "BRA 0xa0"), 4) == (0, 0, 0)


@pytest.mark.parametrize(
    "address, instruction, expected",
    [
        ("0050", "MUFU.EX2 R7, R2", 1),  # the fourth register of the left operand
        ("0050", "MUFU.EX2 R8, R2", 0),
        ("0050", "LDS.128 R0, [R2]", 0),
        ("0050", "LDS.128 R1, [R2]", 1),  # and R2 to R4
        ("0050", "CS2R R2, SRZ", 0),
        ("0050", "IMAD.WIDE R3, R9, 0x4, R10", 1),
        ("0050", "SHFL.BFLY PT, R5, R9, 0x1, 0x1f", 1),
        ("0050", "FSETP.GT.AND P0, PT, R5, R6, PT", 0),
        ("0050", "STS.128 [R5], R4", 0),
        ("0010", "MUFU.EX2 R7, R2", 0),  # nothing is under way
        ("00a0", "MUFU.EX2 R7, R2", 0),  # it was waited for
    ],
)
def test_what_a_product_reads_is_not_written_before_it_is_waited_for(address, instruction, expected):
    assert overwritten(replaced(address, instruction)) == expected


def test_a_product_that_is_under_way_around_a_loop():
    code = replaced("0010", "MUFU.EX2 R7, R2")
    assert overwritten(code) == 0
    assert overwritten(replaced("0080", "WARPGROUP.DEPBAR.LE gsb0, 0x1", code)) == 1


def test_amd_instructions():
    assert list(instructions("\tv_mfma_f32 a[0:3], v0, v1\n\ts_endpgm\t; done\n.text\n"))[0][1] == "v_mfma_f32"


@pytest.mark.parametrize(
    "arch, registers, shared, threads, expected",
    [
        ("sm_90", 128, 65536, 256, 2),
        ("sm_90", 129, 65536, 256, 1),
        ("sm_90", 32, 116_000, 256, 1),
        ("sm_90", 32, 115_000, 256, 2),
        ("sm_90", 32, 0, 128, 16),
        ("sm_80", 64, 81_000, 128, 2),
        ("gfx942", 64, 0, 256, None),
    ],
)
def test_programs_of_a_multiprocessor(arch, registers, shared, threads, expected):
    assert programs(arch, registers, shared, threads) == expected
