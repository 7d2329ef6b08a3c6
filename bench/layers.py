"""Layers and models beside the library's own: what a user gains who replaces one class or calls `apply`.

`python -m bench.layers --device cuda` times them on a GPU and writes bench/results/layers-<device>.json; on a CPU
`make bench` does.  A pair that is wrong, or whose library is not installed, gets a row that says so and no times.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    sys.exit(f"bench.layers needs a python3 with torch: this one, {sys.executable}, has no {error.name}")

from bench import clocks, jobs, rows
from bench.measure import peak_of
from crossattn_kernels.layers import CrossAttention, GatedCrossAttentionBlock

FORWARD, BOTH = "forward", "forward+backward"
Run = Callable[[], Tensor]


class Pair(NamedTuple):
    """The same computation twice, on the same parameters; inputs of theirs and of ours are the same tensors."""

    ours: Run
    theirs: Run
    of_ours: list[Tensor]  # what gradients are taken of
    of_theirs: list[Tensor]

    def bind(self, mode: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        runs = dict(ours=(self.ours, self.of_ours), theirs=(self.theirs, self.of_theirs))
        return {who: _bound(run, tensors, mode) for who, (run, tensors) in runs.items()}


def _bound(run: Run, tensors: list[Tensor], mode: str) -> Callable[[], tuple[Tensor, ...]]:
    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (run(),)

    def both() -> tuple[Tensor, ...]:
        y = run()
        # a sum of squares, so that no gradient of a norm or a softmax vanishes
        return (y, *torch.autograd.grad(y.square().sum(), tensors))

    return {FORWARD: forward, BOTH: both}[mode]


def _pair(ours: Run, theirs: Run, a: nn.Module, b: nn.Module, *inputs: Tensor) -> Pair:
    of = [[*inputs, *(p for _, p in sorted(module.named_parameters()) if p.requires_grad)] for module in (a, b)]
    return Pair(ours, theirs, *of)


class Place(NamedTuple):
    """Where, how large and in which type: a CPU gets narrower models of the same shape, in fp32; a GPU bf16."""

    device: str
    exact: bool = False  # the same numbers, computed with in fp64

    @property
    def drawn(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.exact else self.drawn

    def size(self, small: int, full: int) -> int:
        return small if self.device == "cpu" else full

    def put(self, x: Any) -> Any:
        """A tensor or a module."""
        return x.to(self.device, self.drawn).to(self.dtype)

    def randn(self, *shape: int) -> Tensor:
        leaf: Tensor = self.put(torch.randn(shape))
        return leaf.requires_grad_()


# ---- pairs ----


def flamingo(place: Place, dim: int, feed_forward: bool = True) -> Pair:
    """flamingo-pytorch's gated block: 16 images of 64 latents, 1024 text tokens that see the latest image."""
    from flamingo_pytorch import GatedCrossAttentionBlock as Theirs

    theirs = Theirs(dim=dim)
    ours = GatedCrossAttentionBlock(dim)
    with torch.no_grad():
        theirs.attn_gate.fill_(0.5)
        theirs.ff_gate.fill_(0.5)
    ours.load_state_dict(theirs.state_dict())
    if not feed_forward:
        ours.ff, theirs.ff = nn.Identity(), nn.Identity()
    ours, theirs = place.put(ours), place.put(theirs)
    x, media = place.randn(1, 1024, dim), place.randn(1, 16, 64, dim)
    locations = torch.zeros(1, 1024, dtype=torch.bool, device=place.device)
    locations[:, ::64] = True
    return _pair(lambda: ours(x, media, locations), lambda: theirs(x, media, locations), ours, theirs, x, media)


def mllama(place: Place) -> Pair:
    """Llama-3.2-Vision's cross-attention layer, 2 images of 4 tiles of 1601 tokens, from the mask of tiles on.

    The whole model makes that mask once for all its layers; here one layer bears it.
    """
    from transformers.models.mllama import modeling_mllama as upstream
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    from crossattn_kernels.integrations.transformers import apply
    from crossattn_kernels.integrations.transformers.mllama import tile_mask

    width, tokens = place.size(1024, 4096), place.size(256, 2048)
    config = MllamaTextConfig(
        hidden_size=width, num_attention_heads=width // 128, num_key_value_heads=width // 512,
        intermediate_size=place.size(2048, 14336), num_hidden_layers=1, cross_attention_layers=[0],
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    theirs = upstream.MllamaCrossAttentionDecoderLayer(config, 0)
    with torch.no_grad():
        theirs.cross_attn_attn_gate.fill_(0.5)
        theirs.cross_attn_mlp_gate.fill_(0.5)
    theirs = place.put(theirs)
    ours = copy.deepcopy(theirs)
    apply(ours)
    visible = torch.ones(1, tokens, 2, 4, dtype=torch.long, device=place.device)
    visible[:, : tokens // 2, 1] = 0  # the second image comes half-way through the text
    x, states = place.randn(1, tokens, width), place.randn(1, 2 * 4 * TILE, width)

    def run(layer: nn.Module, masks: Callable[..., tuple[Any, Tensor]]) -> Tensor:
        mask, rows_seen = masks(visible, TILE, place.dtype)
        return layer(
            x, cross_attention_states=states, cross_attention_mask=mask, attention_mask=None,
            full_text_row_masked_out_mask=rows_seen,
        )  # fmt: skip

    dense = upstream._prepare_cross_attention_mask
    return _pair(lambda: run(ours, tile_mask), lambda: run(theirs, dense), ours, theirs, x, states)


def qformer(place: Place) -> Pair:
    """BLIP-2's Q-Former of two layers: 32 queries read 257 image tokens."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    from crossattn_kernels.integrations.transformers import apply

    config = Blip2QFormerConfig(num_hidden_layers=2, encoder_hidden_size=1408)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    theirs = place.put(Blip2QFormerModel._from_config(config, attn_implementation="sdpa"))
    ours = copy.deepcopy(theirs)
    apply(ours)
    batch = place.size(4, 32)
    queries, image = place.randn(1, 32, 768), place.randn(batch, 257, 1408)

    def run(model: nn.Module) -> Tensor:
        return model(query_embeds=queries.expand(batch, -1, -1), encoder_hidden_states=image).last_hidden_state

    return _pair(lambda: run(ours), lambda: run(theirs), ours, theirs, queries, image)


def sdxl(place: Place) -> Pair:
    """SDXL's `attn2` at 64 x 64 latents: 4096 queries, 77 text tokens, 10 heads of 64."""
    from diffusers.models.attention_processor import Attention

    from crossattn_kernels.integrations.diffusers import apply

    theirs = place.put(Attention(query_dim=640, cross_attention_dim=2048, heads=10, dim_head=64))
    holder = nn.ModuleDict(dict(attn2=copy.deepcopy(theirs)))
    apply(holder)
    ours = holder["attn2"]
    x, text = place.randn(2, 4096, 640), place.randn(2, 77, 2048)
    return _pair(lambda: ours(x, text), lambda: theirs(x, text), ours, theirs, x, text)


def decode(place: Place) -> Pair:
    """One token reads a context of 1024 keys: its projections kept, against projected again at every step."""
    width = place.size(1024, 4096)
    layer = place.put(CrossAttention(width, heads=width // 64, qk_norm=True))
    x, context = place.randn(1, 1, width), place.randn(1, 1024, width)
    with torch.no_grad():
        cache = layer.project_context(context)
    return Pair(lambda: layer(x, context_cache=cache), lambda: layer(x, context), [x], [x])


TILE = 1601  # tokens of an image tile at 560 pixels
# name: (pair, modes, target of the last mode on a CPU)
PAIRS: dict[str, tuple[Callable[[Place], Pair], tuple[str, ...], float | None]] = {
    "Flamingo, block 256 wide": (lambda p: flamingo(p, 256), (FORWARD, BOTH), 3.0),
    "Flamingo, block 512 wide": (lambda p: flamingo(p, 512), (FORWARD, BOTH), 3.0),
    "Flamingo, block 1024 wide": (lambda p: flamingo(p, 1024), (FORWARD, BOTH), 3.0),
    "Flamingo, the same without feed-forward, 512 wide": (lambda p: flamingo(p, 512, False), (FORWARD, BOTH), 3.0),
    "Mllama, cross layer, 2 images in 4 tiles": (mllama, (FORWARD, BOTH), None),
    "BLIP-2, Q-Former of 2 layers": (qformer, (FORWARD, BOTH), None),
    "SDXL, attn2": (sdxl, (FORWARD, BOTH), None),
    "decode, 1024 keys, cached against projected again": (decode, (FORWARD,), 5.0),
}


def checked(build: Callable[[Place], Pair], mode: str, device: str) -> Pair:
    """The pair, if ours is right: AssertionError if it is over the error budget of the package (docs/numerics.md).

    The oracle is the library in fp64 on the same numbers, the yardstick its own error.  Outputs and gradients have a
    budget each; errors are relative to the largest value, of small gradients to a hundredth of the largest gradient.
    """
    exact = [t.detach() for t in _built(build, Place(device, exact=True)).bind(mode)["theirs"]()]
    pair = _built(build, Place(device))
    runs = pair.bind(mode)
    found = {who: runs[who]() for who in ("ours", "theirs")}
    eps = torch.finfo(found["ours"][0].dtype).eps
    for kind, part, slack in (("output", slice(1), 2), ("gradient", slice(1, None), 3)):
        ours, theirs = (_worst(found[who][part], exact[part]) for who in ("ours", "theirs"))
        budget = slack * theirs + eps / 2
        assert ours <= budget, f"the worst {kind} is off by {ours:.1e}, where {budget:.1e} is the budget"
    return pair


def _built(build: Callable[[Place], Pair], place: Place) -> Pair:
    torch.manual_seed(0)
    return build(place)


def _worst(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    largest = [t.abs().max().item() for t in exact]
    floor = 1e-2 * max(largest, default=0.0)
    errors = [(a.double() - b).abs().max() / max(m, floor) for a, b, m in zip(found, exact, largest, strict=True)]
    return torch.stack(errors).max().item() if errors else 0.0  # of NaN and numbers, NaN


def mask_memory(who: str, tokens: int = 2048) -> int:
    """Peak bytes that Mllama's mask takes, from the mask of tiles to what attention gets; 2 images of 4 tiles."""
    from transformers.models.mllama import modeling_mllama as upstream

    from crossattn_kernels.integrations.transformers.mllama import tile_mask

    make = dict(ours=tile_mask, theirs=upstream._prepare_cross_attention_mask)[who]
    make(torch.ones(1, 2, 2, 4, dtype=torch.long), 3, torch.float32)  # what a first call loads is not the call's
    visible = torch.ones(1, tokens, 2, 4, dtype=torch.long)
    return peak_of(lambda: make(visible, TILE, torch.float32))


# ---- on a GPU ----


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=rows.FOLDER, help="folder of the results")
    parser.add_argument("--commit", help="what was measured, if the tree has no .git")
    parser.add_argument(
        "--mask-memory", choices=("ours", "theirs"), help="print the bytes of one mask, and nothing else"
    )
    args = parser.parse_args(argv)
    if args.mask_memory:
        print(mask_memory(args.mask_memory))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.layers --device cuda needs an NVIDIA GPU that this torch can use; there is none")
        return 2
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    machine, found = rows.machine(name, args.commit), []
    path = rows.path_of(args.out, f"layers-{name}").with_suffix(".json")
    part = path.with_suffix(".part.json")
    part.parent.mkdir(parents=True, exist_ok=True)
    for what, (build, modes, _) in PAIRS.items():
        for mode in modes:
            found.append(dict(name=what, mode=mode, **timed(build, mode, args.device), **machine))
            print({k: v for k, v in found[-1].items() if k not in machine}, flush=True)
            # at once: a run that is cut off keeps what it has measured, and the last complete one
            part.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
            if not jobs.answers(args.device):
                print(f"the device no longer answers: {part}")
                return 1
    part.replace(path)
    print(path)
    return 0


def timed(build: Callable[[Place], Pair], mode: str, device: str) -> dict[str, Any]:
    """Medians in microseconds of both, and their ratio; or why there are none."""
    try:
        times = {who: clocked(run, device) for who, run in checked(build, mode, device).bind(mode).items()}
    except Exception as error:
        return dict(status=clocks.said(error))
    shown: dict[str, Any] = dict(status="ok")
    for clock in clocks.Times._fields:
        ours, theirs = (getattr(times[who], clock) for who in ("ours", "theirs"))
        if ours and theirs:
            shown[f"{clock}_us"] = [float(f"{1e6 * t.p50:.4g}") for t in (ours, theirs)]
            shown[f"{clock}_ratio"] = float(f"{theirs.p50 / ours.p50:.3g}")
    return shown


def clocked(run: Callable[[], Any], device: str) -> clocks.Times:
    if device == "cpu":
        return clocks.on_cpu(run)
    with torch.cuda.stream(torch.cuda.Stream()):
        return clocks.on_cuda(run, torch.zeros(jobs.flush_bytes() // 4, device="cuda"))[0]


if __name__ == "__main__":
    sys.exit(main())
