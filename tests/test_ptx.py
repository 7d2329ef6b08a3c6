"""The machine of `tests/ptx` on instructions written by hand, and compiled kernels on the machine.

Kernels run in processes of their own, for the rest of the tests binds them to Triton's interpreter.
"""

import math

import pytest
import torch

from tests.ptx.by_hand import run
from tests.test_compile import without_interpreter

ARCHS = ("sm_80", "sm_90")

LANES = torch.arange(32, dtype=torch.int32)

# ---- arithmetic ----


def test_two_floats_are_packed_upper_first():
    values = torch.randn(32, 2)
    found = run("cvt.rn.bf16x2.f32 %d0, %a0, %a1;", values).view(torch.bfloat16)
    assert torch.equal(found, values.flip(1).bfloat16())


@pytest.mark.parametrize(
    "value, expected",
    [(1.00390625, 1.0), (1.01171875, 1.015625), (3.4e38, math.inf), (-math.inf, -math.inf), (1e-40, 1e-40)],
)
def test_bf16_is_to_nearest_and_ties_to_even(value, expected):
    found = run("cvt.rn.bf16x2.f32 %d0, %a0, %a0;", torch.full((32, 1), value)).view(torch.bfloat16)
    assert (found == torch.tensor(expected).bfloat16()).all()


@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_comparisons_know_nan(name):
    values = torch.tensor([(a, b) for a in (0.0, 1.0, math.nan, -math.inf) for b in (0.0, 1.0, math.nan, 2.0)] * 2)
    found = run(f"setp.{name}.f32 %p1, %a0, %a1;\nselp.b32 %d0, 1, 0, %p1;", values)[:, 0].bool()
    unordered = values.isnan().any(1)
    if name in ("num", "nan"):
        assert torch.equal(found, unordered if name == "nan" else ~unordered)
        return
    ordered = getattr(torch, name[:2])(*values.unbind(1))
    assert torch.equal(found, torch.where(unordered, torch.tensor(name.endswith("u")), ordered))


@pytest.mark.parametrize(
    "instruction, function",
    [
        ("add.s32 %d0, %a0, %a1", lambda a, b: a + b),
        ("mul.hi.u32 %d0, %a0, %a1", lambda a, b: (a % 2**32) * (b % 2**32) >> 32),
        ("mul.lo.s32 %d0, %a0, %a1", lambda a, b: a * b),
        ("div.s32 %d0, %a0, %a1", lambda a, b: int(a / b)),
        ("rem.s32 %d0, %a0, %a1", lambda a, b: int(math.fmod(a, b))),
        ("shr.s32 %d0, %a0, %a1", lambda a, b: a >> min(b % 2**32, 31)),
        ("shl.b32 %d0, %a0, 33", lambda a, b: 0),
        ("bfe.s32 %d0, %a0, 4, 3", lambda a, b: (a >> 4 & 7) - 8 * (a >> 6 & 1)),
        ("bfe.u32 %d0, %a0, 4, 3", lambda a, b: a >> 4 & 7),
        ("prmt.b32 %d0, %a0, %a1, 0x7410U", lambda a, b: a & 0xFFFF | (b & 255) << 16 | (b >> 24 & 255) << 24),
        ("prmt.b32 %d0, %a0, %a1, 0x8888U", lambda a, b: -(a >> 7 & 1)),
        ("min.relu.s32 %d0, %a0, %a1", lambda a, b: max(0, min(a, b))),
        ("min.u32 %d0, %a0, %a1", lambda a, b: min(a % 2**32, b % 2**32)),
    ],
)
def test_integers(instruction, function):
    values = torch.randint(-(2**31), 2**31, (32, 2), generator=torch.Generator().manual_seed(0)).int()
    found = run(f"{instruction};", values)[:, 0]
    assert [x % 2**32 for x in found.tolist()] == [function(a, b) % 2**32 for a, b in values.tolist()]


def test_subnormal_numbers_are_flushed_where_it_says_so():
    values = torch.tensor([1e-40, -1e-40] * 16)
    kept, flushed = run("add.f32 %d0, %a0, 0f00000000;\nadd.ftz.f32 %d1, %a0, 0f00000000;", values, 2).unbind(1)
    assert torch.equal(kept.view(torch.float32), values) and not flushed.view(torch.float32).any()


def test_a_fused_product_is_rounded_once():
    values = torch.tensor([[1 + 2**-12, 1 + 2**-12, -(1 + 2**-11)]] * 32)
    assert (run("fma.rn.f32 %d0, %a0, %a1, %a2;", values).view(torch.float32) == 2**-24).all()


def test_the_larger_is_the_one_that_is_a_number():
    values = torch.tensor([math.nan, 1.0] * 16)
    found = run("max.f32 %d0, %a0, 0f00000000;\nmax.NaN.f32 %d1, %a0, 0f00000000;", values, 2).view(torch.float32)
    assert found[:2].nan_to_num(nan=7).tolist() == [[0, 7], [1, 1]]


# ---- threads ----


@pytest.mark.parametrize(
    "operands, source",
    [
        ("bfly.b32 %d0|%p1, %a0, 3, 31", lambda lane: lane ^ 3),
        ("idx.b32 %d0|%p1, %a0, 5, 31", lambda lane: 5),
        ("idx.b32 %d0|%p1, %a0, 5, 6175", lambda lane: lane & 24 | 5),
        ("up.b32 %d0|%p1, %a0, 2, 0", lambda lane: lane - 2 if lane >= 2 else None),
        ("down.b32 %d0|%p1, %a0, 2, 31", lambda lane: lane + 2 if lane < 30 else None),
        ("bfly.b32 %d0|%p1, %a0, 16, 15", lambda lane: lane ^ 16 if lane >= 16 else None),
    ],
)
def test_shuffles(operands, source):
    found = run(f"shfl.sync.{operands}, -1;\nselp.b32 %d1, 1, 0, %p1;", 100 + LANES, 2)
    assert found.tolist() == [
        [100 + (lane if source(lane) is None else source(lane)), source(lane) is not None] for lane in range(32)
    ]


COUNT = """
	mov.b32 %d0, 0;
$L_more:
	setp.ge.s32 %p1, %d0, %a0;
	@%p1 bra $L_done;
	add.s32 %d0, %d0, 1;
	bra.uni $L_more;
$L_done:
	bar.sync 0;
	add.s32 %d0, %d0, 100;
	{ .reg .b32 %a0; mov.b32 %a0, 7; add.s32 %d0, %d0, %a0; }
	add.s32 %d0, %d0, %a0;
"""


def test_threads_part_and_meet_and_scopes_have_names_of_their_own():
    assert torch.equal(run(COUNT, LANES % 5)[:, 0], 2 * (LANES % 5) + 107)


def test_a_barrier_that_some_do_not_reach():
    body = "setp.lt.s32 %p1, %r0, 5;\n@%p1 bra $L_on;\nbar.sync 0;\n$L_on:\nmov.b32 %d0, 0;"
    with pytest.raises(
        AssertionError, match="by_hand, program 0: `bar.sync 0` of by_hand.py:7:7: 27 of 32 threads meet"
    ):
        run(body, LANES)


@pytest.mark.parametrize(
    "instruction",
    ["atom.global.add.u32 %d0, [%x1], 1", "add.sat.s32 %d0, %a0, 1", "add.relu.s32 %d0, %a0, 1", "sin.f64 %x1, %x2"],
)
def test_what_is_unknown_is_refused_by_name(instruction):
    with pytest.raises(NotImplementedError, match=instruction.partition(" ")[0]):
        run(f"{instruction};", LANES)


# ---- memory ----


@pytest.mark.parametrize(
    "instruction, said",
    [
        ("ld.global.b32 %d0, [%x1+4]", "thread 31: 4 bytes at .* lie in no tensor, 4 past the end"),
        ("ld.global.b32 %d0, [%x1+-4]", "thread 0: .* in no tensor"),
        ("@%p1 st.global.b32 [%x1+8], %d0", "thread 30: .* in no tensor, 4 past"),
        ("@!%p1 ld.global.v2.b32 {%d0, %d1}, [%x1]", "thread 1: 8 bytes at .* not a multiple"),
        ("st.global.b32 [%x4], %r0", "in no tensor"),
        ("cp.async.ca.shared.global [%r1], [%x1+4], 4", "thread 31: .* in no tensor, 4 past"),
        ("st.shared.b32 [%r0+5117], %r0", "thread 0: 4 bytes at shared address 5117 of 5120"),
    ],
)
def test_an_access_out_of_bounds(instruction, said):
    with pytest.raises(AssertionError, match=said):
        run(f"setp.ge.s32 %p1, %r0, 30;\n{instruction};", LANES)


EXCHANGE = """
	shl.b32 %r2, %r0, 2;
	add.s32 %r2, %r2, %r1;
	st.shared.b32 [%r2], %a0;
	{barrier}
	xor.b32 %r3, %r0, {other};
	shl.b32 %r3, %r3, 2;
	add.s32 %r3, %r3, %r1;
	ld.shared.b32 %d0, [%r3];
"""


def test_a_race_between_warps_is_found():
    values = torch.arange(64, dtype=torch.int32)
    assert torch.equal(run(EXCHANGE.format(barrier="bar.sync 0;", other=32), values, threads=64)[:, 0], values ^ 32)
    assert torch.equal(run(EXCHANGE.format(barrier="", other=1), values, threads=64)[:, 0], values ^ 1)
    with pytest.raises(AssertionError, match="warp 0 reads shared byte 1152, which warp 1 writes without a barrier"):
        run(EXCHANGE.format(barrier="", other=32), values, threads=64)


OVERWRITE = """
	ld.shared.b32 %d0, [%r1];
	{barrier}
	setp.eq.s32 %p1, %r0, {who};
	@%p1 st.shared.b32 [%r1], {what};
"""


@pytest.mark.parametrize(
    "barrier, who, what, fine",
    [("", 40, 7, False), ("bar.sync 0;", 40, 7, True), ("", 40, 0x7FFF7FFF, True)],
    ids=["a race", "a barrier", "what is there"],
)
def test_a_write_after_another_warp_has_read(barrier, who, what, fine):
    body = OVERWRITE.format(barrier=barrier, who=who, what=what)
    if fine:
        run(body, torch.zeros(64), threads=64)
    else:
        with pytest.raises(AssertionError, match="warp 1 writes shared byte 1024, which warp 0 reads or writes"):
            run(body, torch.zeros(64), threads=64)


def test_threads_that_write_one_place_at_once_agree():
    run("st.shared.b32 [%r1], 7;\nmov.b32 %d0, 0;", LANES)
    with pytest.raises(AssertionError, match="thread 0: another stores something else to the same place"):
        run("st.shared.b32 [%r1], %r0;", LANES)


COPY = """
	shl.b32 %r2, %r0, 4;
	add.s32 %r2, %r2, %r1;
	setp.lt.s32 %p1, %r0, 30;
	selp.b32 %r3, 16, 0, %p1;
	cp.async.cg.shared.global [ %r2 + 0 ], [ %x1 + 0 ], 0x10, %r3;
	cp.async.commit_group;
	{wait}
	ld.shared.b32 %d0, [%r2+8];
"""


def test_copies_arrive_when_they_are_waited_for_and_the_rest_is_zero():
    values = torch.arange(128, dtype=torch.int32).reshape(32, 4)
    found = run(COPY.format(wait="cp.async.wait_group 0;"), values)[:, 0]
    assert found.tolist() == [*values[:30, 2].tolist(), 0, 0]
    for too_early in ("", "cp.async.wait_group 1;"):
        assert run(COPY.format(wait=too_early), values).view(torch.float32).isnan().all()


def test_nothing_is_left_over_from_another_program():
    assert run("mov.b32 %d0, %r7;\nld.shared.b32 %d1, [%r1];", LANES, 2).view(torch.float32).isnan().all()


# ---- tensor cores ----


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_are_spread_over_a_warp(trans):
    """Row r of matrix m holds 100 m + 8 r + column; a thread gets two neighbours of a row or of a column."""
    elements = (torch.arange(4)[:, None] * 100 + torch.arange(64)).short().reshape(32, 8)
    body = f"""
        shl.b32 %r2, %r0, 4;
        add.s32 %r2, %r2, %r1;
        st.shared.v4.b32 [%r2], {{%a0, %a1, %a2, %a3}};
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%d0, %d1, %d2, %d3}}, [%r2];
    """
    found = run(body, elements, 4).view(torch.int16).reshape(32, 4, 2)
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        pair = [8 * column + row, 8 * column + 8 + row] if trans else [8 * row + column, 8 * row + column + 1]
        assert found[lane].tolist() == [[100 * m + x for x in pair] for m in range(4)]


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count, names", [(1, "{%d0}"), (2, "{%d0, %d1}"), (4, "{%d0, %d1, %d2, %d3}")])
def test_matrices_are_stored_as_they_are_loaded(trans, count, names):
    body = f"""
        shl.b32 %r2, %r0, 4;
        add.s32 %r2, %r2, %r1;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r2], {names.replace("d", "a")};
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names}, [%r2];
    """
    values = torch.arange(32 * count, dtype=torch.int32).reshape(32, count)
    assert torch.equal(run(body, values, count), values)


def test_a_product_of_a_warp():
    """Fragments as the manual of PTX draws them: a, b and c of lane l hold rows and columns around l // 4 and l % 4."""
    A, B, C = torch.randint(-9, 9, (16, 16)), torch.randint(-9, 9, (16, 8)), torch.randint(-9, 9, (16, 8))
    rows = []
    for lane in range(32):
        g, t = lane // 4, 2 * (lane % 4)
        halves = [A[g, t], A[g, t + 1], A[g + 8, t], A[g + 8, t + 1], A[g, t + 8], A[g, t + 9], A[g + 8, t + 8],
                  A[g + 8, t + 9], B[t, g], B[t + 1, g], B[t + 8, g], B[t + 9, g]]  # fmt: skip
        sums = torch.tensor([C[g, t], C[g, t + 1]], dtype=torch.float32)
        rows.append(torch.cat([torch.tensor(halves).bfloat16().view(torch.int32), sums.view(torch.int32)]))
    body = """
        mov.b32 %d0, %a6;  mov.b32 %d1, %a7;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, {%a4, %a5}, {%d0, %d1, %r7, %r7};
    """
    found = run(body, torch.stack(rows), 4).view(torch.float32)
    expected = (A @ B + C).float()
    for lane in range(32):
        g, t = lane // 4, 2 * (lane % 4)
        assert found[lane, :2].tolist() == expected[g, t : t + 2].tolist() and found[lane, 2:].isnan().all()


GROUP = """
	shl.b32 %r2, %r0, 2;
	add.s32 %r2, %r2, %r1;
	st.shared.b32 [%r2], %a0;
	bar.sync 0;
	fence.proxy.async.shared::cta;
	and.b32 %r3, %r1, 16383;
	shr.u32 %r3, %r3, 4;
	cvt.u64.u32 %x4, %r3;
	or.b64 %x4, %x4, {strides};
	mov.b32 %d0, %a1;  mov.b32 %d1, %a1;  mov.b32 %d2, %a1;  mov.b32 %d3, %a1;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
		{{%d0, %d1, %d2, %d3}}, {{%a0, %a0, %a0, %a0}}, %x4, {add}, 1, 1, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned {allowed};
"""


@pytest.mark.parametrize("add, allowed, expected", [(1, 0, 21), (0, 0, 16), (1, 1, math.nan)])
def test_a_product_of_a_group_is_there_when_it_is_waited_for(add, allowed, expected):
    """Ones times ones, and fives to start from; rows of 16 bytes without a pattern."""
    ones = torch.ones(128, 2).bfloat16().view(torch.int32)
    fives = torch.full((128, 1), 5.0).view(torch.int32)
    body = GROUP.format(add=add, allowed=allowed, strides=8 << 16 | 16 << 32)
    found = run(body, torch.cat([ones, fives], 1), 4, threads=128).view(torch.float32)
    torch.testing.assert_close(found, torch.full((128, 4), float(expected)), rtol=0, atol=0, equal_nan=True)


# ---- compiled kernels ----


@pytest.mark.parametrize("arch", ARCHS)
def test_products_of_every_layout(arch):
    lines = without_interpreter("-m", "tests.ptx.products", arch).splitlines()
    assert len(lines) == 84 and all(line.startswith("ok ") for line in lines), lines


CASES = [
    "two-pass, plain-bfloat16", "two-pass, mask all fields-bfloat16", "two-pass, bias (0, 0, 1, 1)-bfloat16",
    "two-pass, layout last strided-bfloat16", "short keys, mask padding-bfloat16", "short keys, dropout-float16",
    "two-pass, mask lengths-bfloat16", "short queries, mask lengths-bfloat16",
    "short queries, mask ranges-bfloat16", "split, gate channel-bfloat16", "packed decode, everything-bfloat16",
    "size, plain 72-bfloat16", "size, 3 x 77-float32", "packed decode, everything by channel-float32",
]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_within_budget(arch):
    assert without_interpreter("-m", "tests.ptx", "--arch", arch, *CASES).endswith(
        f"0 of {len(CASES)} failed for {arch}\n"
    )


def test_a_tensor_may_lie_anywhere():
    """Rows past 2^31 elements, and addresses that are not aligned where those of the call before were."""
    lines = without_interpreter("-m", "tests.ptx.views", "sm_90").splitlines()
    assert len(lines) == 8 and all(line.endswith(" 0.0") for line in lines), lines


@pytest.mark.parametrize("arch", ARCHS)
def test_the_order_of_programs_and_of_what_is_asynchronous_does_not_matter(arch):
    assert without_interpreter("-m", "tests.ptx.broken", arch) == "True\n"


@pytest.mark.parametrize(
    "arch, left_out, races, said",
    [
        ("sm_80", r"bar\.sync.*;", True, "a race"),
        ("sm_80", r"cp\.async\.wait_group.*;", True, "a race"),
        ("sm_80", r"cp\.async\.wait_group.*;", False, "NaN"),
        ("sm_90", r"bar\.sync.*;", True, "a race"),
        ("sm_90", r"cp\.async\.wait_group.*;", False, "NaN"),
        ("sm_90", r"wgmma\.wait_group.*;", True, "a race"),
        ("sm_90", r"wgmma\.wait_group.*;", False, "NaN"),
        ("sm_90", r"fence\.proxy.*;", True, "without a fence"),
        ("sm_90", r"wgmma\.fence.*;", True, "sums were written after the last wgmma.fence"),
    ],
)
def test_what_is_left_out_of_a_kernel_is_missed(arch, left_out, races, said):
    options = () if races else ("--no-races",)
    assert said in without_interpreter("-m", "tests.ptx.broken", arch, "--without", left_out, *options)
