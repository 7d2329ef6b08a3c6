"""Keys and values of a text that stays the same from one denoising step to the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# model: what it does to the text, in every step, before its cross-attention sees it
MODELS: dict[str, tuple[str, ...]] = {
    "UNet2DConditionModel": (),
    "ControlNetModel": (),
    "PixArtTransformer2DModel": ("caption_projection",),
    "SanaTransformer2DModel": ("caption_projection", "caption_norm"),
    "LTXVideoTransformer3DModel": ("caption_projection",),
    "WanTransformer3DModel": ("condition_embedder.text_embedder",),
}
# guidance sends two texts in turn
TEXTS = 2


class Entry(NamedTuple):
    """A result, and the argument that it belongs to: held, so that no other tensor can come to lie where it lies."""

    argument: Tensor
    result: Tensor
    version: int  # of the result: whoever writes on it spoils it


class Memo:
    """The forward of a module that gives the same result again for the same tensor, as long as nothing has changed.

    The same tensor is one that lies in the same memory with the same version (PyTorch counts writes), also as another
    view of it.  Results are kept for the last two tensors, under `torch.no_grad()` only, and not while compiling or
    capturing a CUDA graph, nor under `torch.inference_mode()`, where writes are not counted.  Weights count by the same
    rule; a LoRA layer computes anew, around a linear layer that is kept.  Writes through `.data`, which PyTorch does
    not count (`fuse_lora` and `EMAModel.copy_to` are such), need another call of `apply`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.former: Any = vars(module).get("forward")  # of another package; None: that of the class
        self.compute: Callable[..., Tensor] = module.forward
        self.entries: OrderedDict[Any, Entry] = OrderedDict()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # the step of an optimiser may follow, and those of fused ones are not counted
            self.entries.clear()
        if torch.compiler.is_compiling() or args or kwargs or not self._may_keep(x):
            return self.compute(x, *args, **kwargs)
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # a weight may be replaced by another in the same place, and is too large to be held for that
        weights = ((ref(p), _identity(p)) for p in self.module.parameters())
        key = (autocast, _identity(x), *weights)
        entry = self.entries.pop(key, None)
        if entry is None or entry.result._version != entry.version:
            result = self.compute(x)
            entry = Entry(x.detach(), result, result._version)
        self.entries[key] = entry
        if len(self.entries) > TEXTS:
            self.entries.popitem(last=False)
        return entry.result

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module has weights of its own, and results of its own."""
        return {**vars(self), "entries": OrderedDict()}

    def _may_keep(self, x: Tensor) -> bool:
        return (
            type(x) is Tensor
            and not torch.is_grad_enabled()
            and not torch.is_inference_mode_enabled()
            and not x.is_inference()
            and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
            and not any(hasattr(layer, "base_layer") for layer in self.module.modules())
            and not any(map(is_traceable_wrapper_subclass, self.module.parameters()))  # which lie in no memory
        )


def _identity(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t._version, t.shape, t.stride(), t.dtype, t.device


def text_modules(model: nn.Module) -> Iterator[nn.Module]:
    """What makes the text that a model's cross-attention projects; ValueError for a model that is not known."""
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    name = type(model).__name__
    if name not in MODELS:
        raise ValueError(f"cache_context serves {', '.join(MODELS)}, not {name}")
    for path in MODELS[name]:
        module = attrgetter(path)(model)
        if module is not None:  # PixArt projects no text that has its size already
            yield module


def projections(attention: nn.Module) -> Iterator[nn.Module]:
    """The linear layers that make keys and values, below any LoRA."""
    # LTX fuses what its processor then does not use
    fused = getattr(attention, "fused_projections", False) and hasattr(attention, "to_kv")
    for name in ("to_kv",) if fused else ("to_k", "to_v"):
        layer = getattr(attention, name)
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        yield layer
