"""dq by tiles of queries, past which keys stream."""

import triton
import triton.language as tl

from crossattn_kernels.kernels.scores import (
    head_scale,
    key_range,
    logit_grad,
    scale_sums,
    scores,
    store_scale_sums,
    through_softcap,
    touches,
    whole_range,
)
from crossattn_kernels.kernels.softmax import down, indices, load_row, softmax_grad
from crossattn_kernels.kernels.tiles import (
    all_finite,
    anew,
    dot,
    dot_in_pairs,
    finite,
    load_lasting,
    load_rows,
    past,
    program,
    share,
    store_rows,
    store_vec,
)


@triton.jit
def dq_kernel(q, k, v, do, sums, known, logits, drop, batches, splits, Hq, M, N, C: tl.constexpr):
    """The sums over keys for BLOCK_M queries of one (b, h); for dq also over the `batches` that share q.

    With several splits a program takes its share of the keys, and stores partial sums.
    """
    tile, rest, h = program(tl.cdiv(M, C.BLOCK_M), Hq)
    split, shared = rest % splits, rest // splits
    entries = tl.num_programs(0) // (tl.cdiv(M, C.BLOCK_M) * Hq * splits)
    rows = tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    d = tl.arange(0, C.BLOCK_D)
    q_tile = load_lasting(q, shared, h, rows, d, M, C.D)  # (BLOCK_M, BLOCK_D)
    scale = head_scale(logits, shared, h)
    operands = k, v, do, sums, known, drop, M, N
    place = shared, entries, batches, split, splits, h
    # beside random numbers two runs do not fit everywhere
    TRIES: tl.constexpr = C.SIFTS & ((drop is None) | ((C.BLOCK_D <= 128) & (logits.softcap is None)))
    narrow: tl.constexpr = C.BLOCK_M < 64 or C.BLOCK_N < 32 or C.BLOCK_D > 128
    FEW: tl.constexpr = C.BLOCK_N if C.ALONE else (16 if narrow else 32)
    # at D = 256 a second loop does not fit the registers, and the end of the keys is but one selection an entry
    ONE_LOOP: tl.constexpr = (C.EDGE_STAGES > 0) & (C.BLOCK_D > 128) & (not C.HIDES)
    STEP: tl.constexpr = C.BLOCK_N if C.SIFTS or ONE_LOOP else FEW
    acc = dq_entries(q_tile, operands, logits, scale, place, rows, STEP, C.HIDES and not TRIES, ONE_LOOP, C)
    if TRIES:
        if not all_finite(acc):  # perhaps because of what is hidden
            acc = dq_entries(q_tile, operands, logits, scale, place, anew(rows, M), FEW, True, ONE_LOOP, C)
    store_rows(sums.dq, split * entries + shared, h, anew(rows, M), d, M, C.D, acc * scale)


@triton.jit
def dq_entries(q_tile, operands, logits, scale, place, rows,
               STEP: tl.constexpr, EXACT: tl.constexpr, ONE_LOOP: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """dq without its scale, over all entries that share q; the sums for gate and scale of each are stored.

    STEP: keys at a time, of tiles that are not seen whole.
    EXACT: hidden values are looked at, and reach nothing; without, they do if they are not finite.
    """
    k, v, do, sums, known, drop, M, N = operands
    shared, entries, batches, split, splits, h = place
    acc = tl.zeros([C.BLOCK_M, C.BLOCK_D], tl.float32)
    for entry in tl.range(0, batches):
        b = shared + entry
        do_tile = load_lasting(do, b, h, rows, tl.arange(0, C.BLOCK_DV), M, C.DV)  # (BLOCK_M, BLOCK_DV)
        tiles = q_tile, do_tile, down(load_row(known, b, h, rows, M, C))
        none = tl.zeros([C.BLOCK_M], tl.float32)
        found = acc, none, (none, none, none)
        lo, hi = key_range(logits.mask, b, h, rows, M, N)
        lo = lo // C.BLOCK_N * C.BLOCK_N
        if splits > 1:  # 1 is known when the kernel is compiled, and then so is lo where nothing is masked
            lo, hi = share(lo, hi, split, splits, C.BLOCK_N)
        first, last = whole_range(logits, b, h, rows, lo, hi, M, N, C)
        if ONE_LOOP:
            first, last = lo, lo
        elif not C.SIFTS:
            for key in tl.range(first, last, C.BLOCK_N):
                found = dq_tile(found, tiles, operands, logits, scale, b, h, rows, key, C.BLOCK_N, True, False, C)
        if C.EDGE_STAGES > 0:
            rows = rows if C.SIFTS or ONE_LOOP else anew(rows, M)
            # the others, on both sides; a pipeline for the last one alone would make ptxas serialise all products
            AGAIN: tl.constexpr = C.SIFTS and STEP < C.BLOCK_N
            STAGES: tl.constexpr = 1 if AGAIN or not (C.HIDES or ONE_LOOP) else None
            for i in tl.range(lo, hi - (last - first), STEP, num_stages=STAGES):
                key = past(i, first, last)
                cols = (key + tl.arange(0, STEP))[None, :]
                if touches(logits.mask, b, h, rows[:, None], cols, M, N, C.SKIPS, C):
                    found = dq_tile(found, tiles, operands, logits, scale, b, h, rows, key, STEP, False, EXACT, C)
        acc = found[0]
        at_split = split * entries * batches + b
        if sums.gate is not None:
            store_vec(sums.gate, at_split, h, rows, M, found[1])
        if sums.scale is not None:
            store_scale_sums(sums.scale, at_split, h, rows, M, found[2])
    return acc


@triton.jit
def dq_tile(found, tiles, operands, logits, scale, b, h, rows, key,
            STEP: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """(dq without its scale, sum for the gate, sums for the scale) with one tile of keys folded in."""
    acc, gated_sum, scaled = found
    q_tile, do_tile, row = tiles
    k, v, do, sums, known, drop, M, N = operands
    hk, rows, keys = h // C.GROUP, rows[:, None], key + tl.arange(0, STEP)
    k_tile = load_rows(k, b, hk, keys, tl.arange(0, C.BLOCK_D), N, C.D, WHOLE)  # (STEP, BLOCK_D)
    v_tile = load_rows(v, b, hk, keys, tl.arange(0, C.BLOCK_DV), N, C.DV, WHOLE)  # (STEP, BLOCK_DV)
    qk = dot(q_tile, k_tile.T, None, C.TF32)  # (BLOCK_M, STEP)
    dyv = dot_in_pairs(do_tile, v_tile.T, C.TF32)
    s = scores(qk, logits, scale, b, h, rows, keys[None, :], M, N, C, WHOLE, False, EXACT)
    drawn = indices(key, drop, STEP)[None, :]
    p, _, ds, gated = softmax_grad(s, dyv, row, drop, b, h, rows, drawn, 1, EXACT, C)
    if sums.gate is not None:
        gated_sum += gated
    if sums.scale is not None:
        scaled = scale_sums(scaled, p, ds, qk, logits, scale, b, h, rows, M, 1, EXACT)
    ds = through_softcap(logit_grad(ds, logits, b, h, rows, M), qk, logits, scale)
    k_tile = finite(k_tile) if EXACT else k_tile
    return dot(ds.to(k_tile.dtype), k_tile, acc, C.TF32), gated_sum, scaled
