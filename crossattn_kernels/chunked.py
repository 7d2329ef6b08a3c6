"""Keys and values that arrive in pieces: one softmax over their concatenation, which never exists.

Each chunk gives a `State` of its own; `merge` joins them.  In the backward every chunk sees the joint state and output,
so its gradients are those of the whole.  Chunks given as callables are called again there, one at a time.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from crossattn_kernels.functional import BACKENDS, autocast, choose, draw_seed
from crossattn_kernels.masks import Mask
from crossattn_kernels.problem import EMPTY_ROWS, Inputs, Options, canonical, fit_gate, one_of, shapes

Pair = tuple[Tensor, Tensor]
Chunk = Pair | Callable[[], Pair]
Autocasts = list[tuple[str, torch.dtype, bool]]  # type of device, dtype, enabled
BASE_2, NATURAL = (torch.exp2, math.log(2)), (torch.exp, 1.0)  # exponential, and the natural logarithm of its base
forward_op, backward_op = torch.ops.crossattn.forward, torch.ops.crossattn.backward


def cross_attention_chunked(
    q: Tensor,
    chunks: Sequence[Chunk],
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    empty_rows: str = "zero",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_attention(q, k, v)` where k and v are the chunks laid end to end, without laying them end to end.

    q: (B, Hq, M, D); chunks: a sequence of (k, v), each (B, Hk, n, D) and (B, Hk, n, Dv) with its own n (0 as well), or
    of callables without arguments that return such a pair.  A callable is called in the forward and in the backward, so
    it must be deterministic: autocast is the same in both, the state of random numbers is not.  Its k and v, and their
    gradients, live only while it is worked on.
    Gradients reach the leaf tensors it captures (the parameters of its projections); a tensor that is itself the result
    of a computation has to be an argument, `functools.partial(project, context)`.

    mask (a `Mask`) and bias: over all keys, N the sum of the chunks, which agree in everything else.  The others as in
    `cross_attention`; scale is a number here.  An empty list of chunks gives o = 0 and lse = -inf, in q's head size.
    torch.compile breaks its graph at this call, unless gradients are off and no chunk is a callable.
    Raises as `cross_attention` does, and NotImplementedError for `empty_rows` other than "zero" together with a mask:
    whether a row is empty would be known only after the last chunk.
    """
    if not isinstance(chunks, Iterable):
        raise TypeError(f"chunks must be a sequence of pairs (k, v) or of callables, got {type(chunks).__name__}")
    chunks = list(chunks)
    if torch.compiler.is_dynamo_compiling() and (torch.is_grad_enabled() or any(map(callable, chunks))):
        # not a decorator, which would import dynamo with this package
        return torch.compiler.disable(cross_attention_chunked)(
            q, chunks, mask=mask, bias=bias, gate=gate, scale=scale, softcap=softcap, dropout_p=dropout_p,
            generator=generator, empty_rows=empty_rows, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    _check_types(q, mask, bias)
    one_of("empty_rows", empty_rows, EMPTY_ROWS)
    eager = not torch.compiler.is_compiling()
    reasons = [
        (eager and forward_ad._current_level >= 0, "chunks have no forward-mode derivative"),
        (
            eager and torch._C._are_functorch_transforms_active(),
            "torch.func does not reach through chunks, so give cross_attention their concatenation",
        ),
        (backend == "reference", "backend='reference' has no chunks"),
        (isinstance(scale, Tensor), "scale must be a number, so multiply q by a learnable one"),
        (
            mask is not None and empty_rows != "zero",
            f"with empty_rows={empty_rows!r} and a mask, a row is known to be empty only after the last chunk",
        ),
    ]
    if any(holds for holds, _ in reasons):
        why = "; ".join(reason for holds, reason in reasons if holds)
        raise NotImplementedError(f"cross_attention_chunked cannot serve this call: {why}")
    one_of("backend", backend, (None, *BACKENDS))
    (cast_q,) = autocast(q)
    settings = Settings(mask, scale, softcap, dropout_p, backend)
    seed = draw_seed(q.device, generator) if dropout_p else None
    # no chunks are one without keys
    chunks = chunks or [(cast_q.new_empty(1, *q.shape[1:2], 0, *q.shape[3:]),) * 2]
    o, lse, state, plan = _forward(cast_q.detach(), chunks, bias, seed, settings)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (cast_q, bias, *plan.inputs) if t is not None):
        o, lse = Chunked.apply(plan, o, lse, state, seed, cast_q, bias, *plan.inputs)
    if gate is not None:
        t = torch.tanh(fit_gate(gate, tuple(o.shape), q))
        o = torch.empty_like(o).copy_(o * t) if not torch.is_grad_enabled() else (o * t).to(o.dtype)
    return (o, lse) if return_lse else o


class State(NamedTuple):
    """The softmax of some keys, fp32 or wider; lse alone would round `total` away beside a large `high`."""

    acc: Tensor  # (..., M, Dv), the output times total: sums of it round less than means
    high: Tensor  # (..., M), the largest logit, -inf where there is none
    total: Tensor  # (..., M), sum of the exponentials of (logit - high)


def merge(a: State, b: State, exp: Callable[[Tensor], Tensor] = torch.exp) -> State:
    """The state over both sets of keys; `exp` is the exponential of the logits, `torch.exp2` where they are in base 2.

    Associative and commutative up to rounding.  Two empty states make an empty state.
    """
    high = torch.maximum(a.high, b.high)
    pivot = high.masked_fill(high == -torch.inf, 0)
    of_a, of_b = exp(a.high - pivot), exp(b.high - pivot)
    return State(of_a[..., None] * a.acc + of_b[..., None] * b.acc, high, of_a * a.total + of_b * b.total)


class Settings(NamedTuple):
    """What all chunks have in common besides tensors."""

    mask: Mask | None
    scale: float | None
    softcap: float | None
    dropout_p: float
    backend: str | None


class Piece(NamedTuple):
    """One chunk: how to get it, where its keys lie in the whole, which of the plan's inputs want a gradient from it."""

    chunk: Callable[[], Pair] | tuple[int, int]  # k and v among the plan's inputs
    first: int
    last: int
    inputs: tuple[int, ...]


class Plan(NamedTuple):
    """All pieces, and every tensor that autograd keeps for them, each once: one that changes meanwhile is an error."""

    pieces: list[Piece]
    inputs: list[Tensor]
    settings: Settings


def _forward(
    q: Tensor, chunks: Sequence[Chunk], bias: Tensor | None, seed: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Plan]:
    """(o, lse, state, plan); state as `ops.forward_op` documents it, of all chunks."""
    plan = Plan([], _tensors(settings.mask), settings)
    joint: State | None = None
    first, sizes = 0, None
    wanted = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with _entered(_autocasts(q.device)) if any(map(callable, chunks)) else contextlib.nullcontext():
        for i, given in enumerate(chunks):
            chunk = given if callable(given) else _pair(given)
            k, v, ends = _evaluate(chunk, wanted)
            if k.ndim != 4:
                canonical(q, k, v)  # says so
            where = chunk if callable(chunk) else (_index(plan.inputs, chunk[0]), _index(plan.inputs, chunk[1]))
            piece = Piece(where, first, first + k.shape[2], tuple(_index(plan.inputs, t) for t, _ in ends))
            plan.pieces.append(piece)
            _check_widths(settings.mask, bias, piece.last, q, last=i == len(chunks) - 1)
            with torch.no_grad():
                x, options, backend = _call(q, k, v, bias, seed, piece, settings)
                sizes = _check_sizes(i, x, sizes)
                o, _, _, state, _ = forward_op(*x, *options, backend)
                exp, unit = BASE_2 if backend == "triton" and bias is None else NATURAL
                high, total = state[:, 0], 1 / state[:, 1]
                found = State(o * total[..., None], high, total)
                joint = found if joint is None else merge(joint, found, exp)
            first = piece.last
    assert joint is not None, "there is at least one chunk"
    acc, high, total = joint
    total = total.masked_fill(total == 0, 1)
    B, Hq, M, Dv = acc.shape
    o = q.new_empty(B, M, Hq, Dv).transpose(1, 2).copy_(acc / total[..., None])
    return o, high * unit + total.log(), torch.stack((high, 1 / total), 1), plan


def _call(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None, piece: Piece, settings: Settings
) -> tuple[Inputs, Options, str]:
    """The canonical call of one chunk."""
    k, v = autocast(k.detach(), v.detach())
    mask = None if settings.mask is None else settings.mask.slice_keys(piece.first, piece.last)
    if bias is not None:
        bias = _columns(bias.detach(), piece)
    x, options = canonical(
        q, k, v, mask, bias=bias, scale=settings.scale, softcap=settings.softcap, dropout_p=settings.dropout_p
    )
    backend = choose(x.kind, settings.backend)
    # chunks that nothing else tells apart are one call to the launcher
    first = piece.first if settings.dropout_p else 0
    return x._replace(seed=seed), options._replace(first_key=first, chunk=True), backend


def _columns(bias: Tensor, piece: Piece) -> Tensor:
    return bias[..., piece.first : piece.last] if bias.shape[-1:] not in ((), (1,)) else bias


def _check_types(q: Tensor, mask: Mask | None, bias: Tensor | None) -> None:
    for name, t in ("q", q), ("bias", bias):
        if not isinstance(t, Tensor) and (t is not None or name == "q"):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}: {shapes(q=q)}")
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(
            "mask must be a Mask, such as Mask.key_padding(keep) or Mask.groups(visible) of a tensor of bools, "
            f"got {type(mask).__name__}: {shapes(q=q, mask=mask)}"
        )


def _check_widths(mask: Mask | None, bias: Tensor | None, N: int, q: Tensor, last: bool) -> None:
    """Chunks see slices, so only here a mask or bias shows that is not as wide as all of them.

    N: the keys so far; all, if it is the last chunk.
    """
    widths = {"bias": (bias, N)}
    if mask is not None:
        widths |= {"mask.keys": (mask.keys, N), "mask.visible": (mask.visible, -(-N // max(1, mask.key_group)))}
    for name, (t, width) in widths.items():
        if t is None or t.shape[-1:] in ((), (1,), (width,)) or (t.shape[-1] > width and not last):
            continue
        number = N if last else f"{N} or more"
        raise ValueError(f"{name} must cover the {number} keys of all chunks, got {tuple(t.shape)}: {shapes(q=q)}")


def _check_sizes(i: int, x: Inputs, first: dict[str, int] | None) -> dict[str, int]:
    """The sizes of chunk i that those of the first must be."""
    sizes = {"batch": x.sizes[0], "number of key heads": x.k.shape[1], "head size of v": x.v.shape[3]}
    for name, size in sizes.items():
        if first is not None and size != first[name]:
            raise ValueError(
                f"chunks must have one {name}, but that of chunks[0] is {first[name]} and that of chunks[{i}] {size}: "
                f"{shapes(q=x.q, k=x.k, v=x.v)}"
            )
    return sizes


class Chunked(torch.autograd.Function):
    """(o, lse) as `_forward` found them, with the gradients of the rest: q, bias and what the chunks depend on."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, o: Tensor, lse: Tensor, state: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.autocasts = plan, _autocasts(o.device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(o, lse, state, *rest)
        return o.view_as(o), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = ChunkedBackward.apply(ctx.plan, ctx.autocasts, ctx.needs_input_grad[5:], do, dlse, *ctx.saved_tensors)
        return (None,) * 5 + tuple(grads)


class ChunkedBackward(torch.autograd.Function):
    """The gradients that `Chunked` hands on; a Function, so that a second derivative says why it does not work."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, autocasts: Autocasts, needed: Sequence[bool], *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        do, dlse, o, lse, state, seed, q, bias, *inputs = tensors
        need_q, need_bias, *need = needed
        do = torch.zeros_like(o) if do is None else do
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device) if need_q else None
        dbias = torch.zeros(bias.shape, dtype=lse.dtype, device=q.device) if need_bias else None
        grads: list[Tensor | None] = [None] * len(inputs)
        filled = q.new_empty(0, dtype=torch.bool)
        with _entered(autocasts):
            for piece in plan.pieces:
                carried = any(need[i] for i in piece.inputs)
                k, v, ends = _evaluate(piece.chunk if callable(piece.chunk) else [inputs[i] for i in piece.chunk])
                x, options, backend = _call(q, k, v, bias, seed, piece, plan.settings)
                wanted = [need_q, carried, carried, need_bias, False, False]
                dq_part, dk, dv, dbias_part, _, _ = backward_op(
                    do, dlse, o, lse, state, filled, wanted, *x, *options, backend
                )
                if dq is not None:
                    dq += dq_part
                if dbias is not None:
                    _columns(dbias, piece).add_(dbias_part.sum_to_size(_columns(dbias, piece).shape))
                if carried:
                    _carry(piece, (k, v), (dk, dv), [end for _, end in ends], grads)
        dq = None if dq is None else dq.to(q.dtype)
        dbias = None if dbias is None else dbias.to(bias.dtype)
        return dq, dbias, *grads

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "cross_attention_chunked has no second derivative; use cross_attention with backend='reference' where a "
            "gradient of a gradient is needed"
        )


def _carry(piece: Piece, pair: Pair, grads_of_pair: Pair, ends: list[Tensor], grads: list[Tensor | None]) -> None:
    """Carry dk and dv to what the chunk depends on."""
    outputs = [(t, d.to(t.dtype)) for t, d in zip(pair, grads_of_pair) if t.requires_grad]
    found = torch.autograd.grad([t for t, _ in outputs], ends, [d for _, d in outputs], allow_unused=True)
    for i, grad in zip(piece.inputs, found):
        before = grads[i]
        grads[i] = before if grad is None else grad if before is None else before + grad


# ---- what a chunk depends on ----


def _evaluate(
    chunk: Callable[[], Pair] | Sequence[Tensor], wanted: bool = True
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """(k, v, ends): ends are pairs of a tensor that wants a gradient and what stands for it in the graph of k and v.

    wanted: whether there will be gradients; if not, there are no ends, and a function builds no graph.
    """
    if not wanted:
        k, v = _pair(chunk()) if callable(chunk) else chunk
        return k, v, []
    if not callable(chunk):
        ends: list[tuple[Tensor, Tensor]] = []
        # one tensor may be both, and v may have been computed from k: autograd adds that up outside
        k, v = (_leaf(t, ends) for t in chunk)
        return k, v, ends
    with torch.enable_grad():
        function, ends = _cut(chunk)
        start = torch.ones((), requires_grad=True).neg().grad_fn._sequence_nr()  # type: ignore[union-attr]
        k, v = _pair(function())
    return k, v, ends + [(t, t) for t in _leaves(k, v, start, {id(end) for _, end in ends})]


def _pair(chunk: Any) -> Pair:
    """(k, v) of a tuple, a list or a stacked tensor."""
    parts = tuple(chunk) if isinstance(chunk, (tuple, list, Tensor)) else (chunk,)
    if len(parts) == 2 and isinstance(parts[0], Tensor) and isinstance(parts[1], Tensor):
        return parts
    got = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in parts)
    raise TypeError(f"a chunk must be a pair of tensors (k, v), or a callable that returns one, got ({got})")


def _autocasts(device: torch.device) -> Autocasts:
    """The state of autocast, for a backward that calls a function as the forward did."""
    kinds = filter(torch.amp.is_autocast_available, {device.type, "cpu"})
    return [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]


def _entered(autocasts: Autocasts) -> contextlib.ExitStack:
    with contextlib.ExitStack() as stack:
        for kind, dtype, enabled in autocasts:
            # a weight that an earlier chunk or another layer has cast would be a computation that this chunk captured
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        return stack.pop_all()


def _cut(chunk: Callable[[], Pair]) -> tuple[Callable[[], Pair], list[tuple[Tensor, Tensor]]]:
    """The tensor arguments of a `functools.partial` become leaves of the chunk's own graph."""
    if not isinstance(chunk, functools.partial):
        return chunk, []
    ends: list[tuple[Tensor, Tensor]] = []
    args = [_leaf(t, ends) for t in chunk.args]
    keywords = {name: _leaf(t, ends) for name, t in chunk.keywords.items()}
    return functools.partial(chunk.func, *args, **keywords), ends


def _leaf(t: Any, ends: list[tuple[Tensor, Tensor]]) -> Any:
    """What stands for t in the chunk's own graph."""
    if not isinstance(t, Tensor) or not t.requires_grad:
        return t
    ends.append((t, t.detach().requires_grad_()))
    return ends[-1][1]


def _leaves(k: Tensor, v: Tensor, start: int, known: set[int]) -> list[Tensor]:
    """Leaf tensors that k and v were computed from; nodes older than `start` were not made by the chunk."""
    nodes = [t.grad_fn for t in (k, v) if t.grad_fn is not None]
    leaves = [t for t in (k, v) if t.requires_grad and t.is_leaf]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
        elif node._sequence_nr() < start:
            raise ValueError(
                f"a chunk captured the result of a computation ({node.name()}), which its gradient cannot reach: "
                "pass it as an argument, functools.partial(project, context)"
            )
        else:
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
    unique = {id(t): t for t in leaves}
    return [t for i, t in unique.items() if i not in known]


def _tensors(mask: Mask | None) -> list[Tensor]:
    fields = () if mask is None else (mask.start, mask.end, mask.keys, mask.visible)
    return [t for t in fields if t is not None]


def _index(known: list[Tensor], t: Tensor) -> int:
    for i, other in enumerate(known):
        if other is t:
            return i
    known.append(t)
    return len(known) - 1
