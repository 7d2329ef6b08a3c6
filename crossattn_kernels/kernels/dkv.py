"""dk and dv by tiles of keys, past which queries stream; dq as well where one tile holds all keys."""

import triton
import triton.language as tl

from crossattn_kernels.kernels.bounds import among_pairs, pair, query_range, whole_queries
from crossattn_kernels.kernels.scores import (
    head_scale,
    logit_grad,
    own_scale,
    scale_sums,
    scores,
    store_scale_sums,
    through_softcap,
    touches,
)
from crossattn_kernels.kernels.softmax import across, indices, load_row, softmax_grad
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
def dkv_kernel(q, k, v, do, dk, dv, sums, known, ranges, logits, drop, batches, splits, Hq, M, N, C: tl.constexpr):
    """dv = pᵀ do and dk = scale * dsᵀ q for BLOCK_N keys of one (b, key head).

    If these are all keys, what is summed over them can be had as well.  dk and dv are summed over the GROUP query heads
    and the `batches` that share the keys; with several splits a program takes its share of the queries and stores
    partial sums.  sᵀ = k qᵀ is computed as such: no product takes a transposed accumulator.  dk or dv may be absent.
    """
    tile, rest, hk = program(tl.cdiv(N, C.BLOCK_N), Hq // C.GROUP)
    split, shared = rest % splits, rest // splits
    keys = tile * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    d, e = tl.arange(0, C.BLOCK_D), tl.arange(0, C.BLOCK_DV)
    tiles = load_lasting(k, shared, hk, keys, d, N, C.D), load_lasting(v, shared, hk, keys, e, N, C.DV)
    pairs = batches * C.GROUP  # (b, h) that read these keys
    readers = shared, hk, pairs
    lo, hi = query_range(ranges, shared, hk, pairs, keys, M, C)
    lo, hi = share(lo, hi, split, splits, C.BLOCK_M)
    operands = q, do, sums, known, drop, M, N
    found = dkv_init(dk, dv, C)
    # a key past the end has rows of its own, which are not stored: it is hidden from sums over the keys only
    SUMS: tl.constexpr = C.ALONE | (sums.dq is not None)
    EDGES: tl.constexpr = (C.EDGE_STAGES > 0) & (C.HIDES | SUMS)
    first, last = lo, hi  # queries that see all of these keys
    if EDGES:
        first, last = lo, lo
        if not (SUMS | C.SIFTS):
            first, last = whole_queries(ranges, shared, hk, pairs, tl.minimum(keys, N - 1), lo, hi, C)
        # hidden values that are not finite would show in dk, if not dv, or in dq: then in its tiles.  More does not fit
        FITS: tl.constexpr = C.HIDES & (C.BLOCK_D <= 64) & (C.BLOCK_M > 16) & (dk is not None) & (sums.dq is not None)
        TRIES: tl.constexpr = FITS | (C.SIFTS & (not SUMS) & ((drop is None) | (C.BLOCK_D <= 128)))
        clean = sound(tiles) if TRIES & (sums.dq is not None) else tl.full([], 1, tl.int1)
        span, gap = (lo, hi), (first, last)
        found = dkv_tiles(
            found, tiles, operands, logits, ranges, readers, keys, span, gap, C.BLOCK_M, False, C.HIDES and not TRIES, C
        )
        if TRIES:
            if not (clean & sound(found)):
                FEW: tl.constexpr = 16 if C.BLOCK_N < 64 or C.BLOCK_M < 64 else 32
                again = anew(keys, N)
                tiles = load_lasting(k, shared, hk, again, d, N, C.D), load_lasting(v, shared, hk, again, e, N, C.DV)
                found = dkv_init(dk, dv, C)
                found = dkv_tiles(
                    found, tiles, operands, logits, ranges, readers, again, span, gap, FEW, False, True, C
                )
    if not (EDGES & (SUMS | C.SIFTS)):
        span, gap = (first, last), (first, first)
        found = dkv_tiles(found, tiles, operands, logits, ranges, readers, keys, span, gap, C.BLOCK_M, True, False, C)
    entries = tl.num_programs(0) // (tl.cdiv(N, C.BLOCK_N) * (Hq // C.GROUP) * splits)
    keys = anew(keys, N)
    if dk is not None:
        store_rows(dk, split * entries + shared, hk, keys, d, N, C.D, found[0] * logits.scale)
    if dv is not None:
        store_rows(dv, split * entries + shared, hk, keys, e, N, C.DV, found[1])


@triton.jit
def dkv_init(dk, dv, C: tl.constexpr):
    """(dk, dv), of one column where there is no sum."""
    return (
        tl.zeros([C.BLOCK_N, C.BLOCK_D if dk is not None else 1], tl.float32),
        tl.zeros([C.BLOCK_N, C.BLOCK_DV if dv is not None else 1], tl.float32),
    )


@triton.jit
def sound(pair):
    """Whether two tiles are finite: a scalar."""
    return all_finite(pair[0]) & all_finite(pair[1])


@triton.jit
def dkv_tiles(found, tiles, operands, logits, ranges, readers, keys, span, gap,
              STEP: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """(dk, dv) with the queries of all readers folded in that lie in `span` and not in `gap`, both [first, last).

    EXACT: hidden values are looked at, and reach nothing; without, they do if they are not finite.
    """
    q, do, sums, known, drop, M, N = operands
    shared, hk, pairs = readers
    # one loop over all readers and their queries, in which ptxas would serialise products that make dq too
    outer, inner = (pairs, 1) if C.ALONE | (sums.dq is not None) else (1, pairs)
    turns = tl.cdiv(span[1] - span[0] - (gap[1] - gap[0]), STEP) * inner
    STAGES: tl.constexpr = 1 if STEP < C.BLOCK_M else None
    for j in tl.range(0, outer):
        for i in tl.range(0, turns, num_stages=STAGES):
            b, h = pair(j + i % inner, shared, hk, C)
            query = past(span[0] + i // inner * STEP, gap[0], gap[1])
            rows = (query + tl.arange(0, STEP))[None, :]
            if WHOLE or among_pairs(ranges, b, h, query, keys, C):
                if WHOLE or touches(logits.mask, b, h, rows, keys[:, None], M, N, sums.dq is None, C):
                    found = dkv_tile(found, tiles, operands, logits, b, h, query, keys, STEP, WHOLE, EXACT, C)
    return found


@triton.jit
def dkv_tile(found, tiles, operands, logits, b, h, query, keys,
             STEP: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """(dk, dv) with one tile of queries folded in, whose sums over the keys are stored."""
    dk_acc, dv_acc = found
    k_tile, v_tile = tiles
    q, do, sums, known, drop, M, N = operands
    rows, keys = query + tl.arange(0, STEP), keys[:, None]
    d, scale = tl.arange(0, C.BLOCK_D), head_scale(logits, b, h)
    q_tile = load_rows(q, b, h, rows, d, M, C.D)  # (STEP, BLOCK_D)
    do_tile = load_rows(do, b, h, rows, tl.arange(0, C.BLOCK_DV), M, C.DV)  # (STEP, BLOCK_DV)
    kq = dot(k_tile, q_tile.T, None, C.TF32)  # (BLOCK_N, STEP)
    vdy = dot_in_pairs(v_tile, do_tile.T, C.TF32)
    row = across(load_row(known, b, h, rows, M, C))  # not before the products, where it would take their registers
    s = scores(kq, logits, scale, b, h, rows[None, :], keys, M, N, C, WHOLE, False, EXACT)
    drawn = indices(query, drop, STEP)[None, :]
    p, pv, ds, gated = softmax_grad(s, vdy, row, drop, b, h, drawn, keys, 0, EXACT, C)
    if sums.scale is not None:
        no = tl.zeros([STEP], tl.float32)
        scaled = scale_sums((no, no, no), p, ds, kq, logits, scale, b, h, rows[None, :], M, 0, EXACT)
        store_scale_sums(sums.scale, b, h, rows, M, scaled)
    ds = through_softcap(logit_grad(ds, logits, b, h, rows[None, :], M), kq, logits, scale)
    ds *= own_scale(logits, b, h)  # and those of all heads are multiplied as sums
    if sums.dq is not None:
        if sums.gate is not None:
            store_vec(sums.gate, b, h, rows, M, gated)
        finite_k = finite(k_tile) if EXACT else k_tile
        dq = dot(finite_k.T, ds.to(k_tile.dtype), None, C.TF32)  # (BLOCK_D, STEP)
        store_rows(sums.dq, b, h, rows, d, M, C.D, (dq * logits.scale).T)
    if dv_acc.shape[1] > 1:
        dv_acc = dot((pv * row.gate).to(do_tile.dtype), do_tile, dv_acc, C.TF32)
    if dk_acc.shape[1] > 1:
        dk_acc = dot(ds.to(q_tile.dtype), q_tile, dk_acc, C.TF32)
    return dk_acc, dv_acc
