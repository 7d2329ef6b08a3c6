"""The one door: `cross_attention`, and `explain`, which says what it would do."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from crossattn_kernels import ops, reference, tuning
from crossattn_kernels.masks import Mask
from crossattn_kernels.problem import Inputs, Kind, Options, Problem, canonical, one_of
from crossattn_kernels.tiled.flash import FEW, beyond

if TYPE_CHECKING:
    from typing_extensions import Unpack

BACKENDS = ("triton", "torch", "reference")
HAS_TRITON = find_spec("triton") is not None


class Arguments(TypedDict, total=False):
    """The keyword arguments of `cross_attention` that do not change what it returns, for type checkers."""

    bias: Tensor | None
    gate: Tensor | None
    scale: float | Tensor | None
    softcap: float | None
    dropout_p: float
    generator: torch.Generator | None
    empty_rows: str
    backend: str | None


@overload
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = ...,
    *,
    return_lse: Literal[False] = ...,
    **rest: Unpack[Arguments],
) -> Tensor: ...
@overload
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = ...,
    *,
    return_lse: Literal[True],
    **rest: Unpack[Arguments],
) -> tuple[Tensor, Tensor]: ...
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    empty_rows: str = "zero",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """tanh(gate) * softmax(softcap(scale * q kᵀ) + bias) v over the keys that each query may see.

    q: (B, Hq, M, D)   k: (B, Hk, N, D)   v: (B, Hk, N, Dv)      fp16, bf16 or fp32, one dtype, one device
        Hq is a multiple of Hk.  A batch of 1 broadcasts, and its gradient is one sum over all entries; an expanded one
        is not copied, and has a gradient an entry.  Under autocast all are cast first.
    mask: a `Mask`, or a tensor with SDPA's meaning (bool: True may attend; float: added to the logits).
    bias: float, broadcastable to (B, Hq, M, N); added to the logits; differentiable.
    gate: raw gate of shape (), (Hq,), (Hq, Dv) or broadcastable to (B, Hq, M, Dv); differentiable.
    scale: float, or a tensor () or (Hq,) with a gradient; default D ** -0.5.
    softcap: c > 0 replaces the scaled product s by c * tanh(s / c).
    dropout_p: share of the probabilities dropped, in [0, 1); the draw depends on (seed, batch, head, query, key) only,
        and the seed comes from `generator` or from the default generator of q's device.
    empty_rows: what a query that may see no key returns: "zero" (o = 0, lse = -inf, no gradient), "uniform" (the mean
        of v over all N keys) or "attend_all" (as if it were not masked).
    return_lse: return also lse, (B, Hq, M), fp32: natural log of the sum of exp of the logits; differentiable.
    backend: "triton", "torch" (any device, bounded memory) or "reference" (the definition, quadratic memory); None
        chooses, see `explain`.  An explicit backend never falls back.

    Returns y: (B, Hq, M, Dv) in q's dtype, for which `y.transpose(1, 2).flatten(2)` is a view; or (y, lse).
    The same call gives the same bits, gradients included.  Memory beyond the arguments: O(M + N).
    Raises ValueError (shapes, devices, values), TypeError (types), NotImplementedError (a named backend that cannot).
    Sources: FlashAttention-2, https://arxiv.org/abs/2307.08691; tanh gates: Flamingo, https://arxiv.org/abs/2204.14198.
    """
    q, k, v = autocast(q, k, v)
    x, options = canonical(
        q, k, v, mask, bias=bias, gate=gate, scale=scale, softcap=softcap, dropout_p=dropout_p, empty_rows=empty_rows
    )
    chosen = choose(x.kind, one_of("backend", backend, (None, *BACKENDS), q=q, k=k, v=v))
    if options.dropout_p:
        x = x._replace(seed=draw_seed(q.device, generator))
    y, lse = attend(x, options, chosen)
    return (y, lse) if return_lse else y


def attend(x: Inputs, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """(y, lse) of a canonical call."""
    if backend == "reference":
        return reference.attend(x, options)
    return ops.attend(x, options, backend)


@dataclass(frozen=True)
class Explanation:
    """Which backend and schedules a call would run, and for every other each reason why not."""

    backend: str
    schedule: str
    reasons: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}, schedule: {self.schedule}"]
        lines += [f"not {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    empty_rows: str = "zero",
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
    """What `cross_attention` would do with these arguments; it takes the same ones and computes nothing."""
    q, k, v = autocast(q, k, v)
    x, options = canonical(
        q, k, v, mask, bias=bias, gate=gate, scale=scale, softcap=softcap, dropout_p=dropout_p, empty_rows=empty_rows
    )
    chosen = choose(x.kind, one_of("backend", backend, (None, *BACKENDS), q=q, k=k, v=v))
    schedules = {
        "torch": _on_the_cpu(x, options) if q.device.type == "cpu" else "tiles",
        "reference": "the definition, quadratic memory",
    }
    reasons = {}
    for name in BACKENDS:
        if name != chosen:
            reasons[name] = unsupported(x.kind, name) or _not_chosen(name, backend)
    if chosen == "triton":
        plan = tuning.plan(Problem.of(x, options))
        schedules["triton"] = f"forward {plan.forward_schedule}, backward {plan.backward_schedule}"
        reasons |= {name: (why,) for name, why in plan.reasons}
    return Explanation(chosen, schedules[chosen], reasons)


def _on_the_cpu(x: Inputs, options: Options) -> str:
    """What the torch backend does on the CPU, as far as no value decides it."""
    N, flash, never = x.k.shape[2], "PyTorch's CPU flash kernel", beyond(x, options)
    if never:
        return f"tiles, as {flash} does not do {' and '.join(never)}"
    sure = x.start is x.end is x.keys is x.visible is x.bias is None
    here = flash if sure else f"{flash} where it can, else tiles"
    if x.bias is not None and x.bias.requires_grad:
        return f"forward {here}, backward tiles, as the bias wants a gradient"
    return f"forward {here}, backward tiles, as N < {FEW}" if N < FEW else here


def unsupported(kind: Kind, backend: str) -> tuple[str, ...]:
    """Every reason why a backend cannot serve a call."""
    if backend == "triton":
        if not HAS_TRITON:
            return ("triton is not installed",)
        from crossattn_kernels import kernels

        return kernels.unsupported(*kind)
    return ()


def _not_chosen(name: str, backend: str | None) -> tuple[str, ...]:
    if backend is not None:
        return (f"backend={backend!r} was asked for",)
    return {
        "triton": ("it would run in Triton's interpreter, which is for tests",),
        "torch": ("the Triton kernels can serve this call",),
        "reference": ("it is the definition, not an implementation",),
    }[name]


def choose(kind: Kind, backend: str | None) -> str:
    """The backend that runs; NotImplementedError with every reason if an explicit one cannot."""
    if backend is None:
        return "torch" if kind[0].type == "cpu" or unsupported(kind, "triton") else "triton"
    reasons = unsupported(kind, backend)
    if reasons:
        raise NotImplementedError(f"backend={backend!r} cannot serve this call: {'; '.join(reasons)}")
    return backend


class CastOnce(torch.autograd.Function):
    """A cast of a tensor that is expanded over its batch, and stays so: a plain one would write every copy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, dtype: torch.dtype) -> Tensor:
        return t.narrow(0, 0, 1).to(dtype).expand_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, q, k and v take the autocast dtype, as SDPA's do; fp64 stays as it is there too."""
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)

    def cast(t: Tensor) -> Tensor:
        if not isinstance(t, Tensor) or not t.dtype.is_floating_point or t.dtype in (dtype, torch.float64):
            return t
        expanded = t.ndim > 0 and t.shape[0] > 1 and t.stride(0) == 0
        return CastOnce.apply(t, dtype) if expanded else t.to(dtype)

    return tuple(cast(t) for t in tensors)


def autocasts(t: Tensor) -> bool:
    """Whether autocast is on where `t` is."""
    # torch.compile of torch 2.11 can trace none of these questions but is_autocast_enabled
    compiling = torch.compiler.is_compiling()
    if not isinstance(t, Tensor) or not (compiling or torch._C._is_any_autocast_enabled()):
        return False
    kind = t.device.type
    return (compiling or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A fresh seed on q's device, drawn where the generator lives; nothing is read back."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    source = device if generator is None else generator.device
    return torch.randint(2**62, (), dtype=torch.int64, device=source, generator=generator).to(device, non_blocking=True)
