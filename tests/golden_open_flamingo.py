"""Writes data/open_flamingo.npz: what open_flamingo 2.0.1 computes, which cannot be installed beside this package.

    python tests/golden_open_flamingo.py path/to/open_flamingo/src/helpers.py

open_flamingo asks for torch 2.0.1, but its layers run on any: helpers.py, out of the unpacked wheel, needs torch,
einops and einops-exts only.  All is fp64 and drawn from numpy's RandomState(0), whose stream numpy keeps for good.

`LAYER/state/PARAMETER`, `LAYER/input/I`, and for each case `LAYER/CASE/...`: `output`, and the gradients `input/I` and
`grad/PARAMETER` of (output * LAYER/dy).sum(); for the gated block also its arguments `locations`, `cached`, `latest`.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

GATED = dict(dim=6, dim_visual=8, dim_head=3, heads=2, ff_mult=2)
PERCEIVER = dict(dim=6, depth=2, dim_head=3, heads=2, num_latents=3, ff_mult=2)
TEXT, MEDIA, TOKENS = 10, 3, 2


def mentions(*rows, length=TEXT):
    locations = np.zeros((len(rows), length), bool)
    for row, places in enumerate(rows):
        locations[row, places] = True
    return locations


# three entries a batch; cached media come with a prompt of another length than the text
SITUATIONS = {
    "every text after a medium": mentions([0, 4, 7], [0, 5], [0, 1, 2]),
    "text before the first medium": mentions([3, 6], [9], [5, 6, 8]),
    "text after more media than given": mentions([0, 2, 4, 6, 8], [0, 1, 2, 3], [0, 3, 6, 7]),
    "no text after a medium": mentions([], [2], []),
    "cached media": mentions([1, 5], [], [0, 1, 2, 3, 4], length=6),
}


def draw(draws, *shape):
    return torch.from_numpy(draws.standard_normal(shape))


def with_weights(module, draws):
    module.double()
    for name, p in module.named_parameters():
        drawn = draw(draws, *p.shape)
        scaled = drawn * (1.5 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.7)
        p.data = 1 + 0.3 * drawn if "norm" in name and name.endswith("weight") else scaled
    return module


def run(module, inputs, dy, **arguments):
    inputs = [x.clone().requires_grad_() for x in inputs]
    module.zero_grad()
    y = module(*inputs, **arguments)
    (y * dy).sum().backward()
    grads = {f"grad/{name}": p.grad.clone() for name, p in module.named_parameters()}
    return {"output": y.detach(), **{f"input/{i}": x.grad for i, x in enumerate(inputs)}, **grads}


def gated(library, draws):
    block = library.GatedCrossAttentionBlock
    modules = {latest: block(**GATED, only_attend_immediate_media=latest) for latest in (True, False)}
    with_weights(modules[True], draws)
    modules[False].double().load_state_dict(modules[True].state_dict())
    x, media = draw(draws, 3, TEXT, GATED["dim"]), draw(draws, 3, MEDIA, TOKENS, GATED["dim_visual"])
    found = {"dy": draw(draws, *x.shape), "input/0": x, "input/1": media}
    found |= {f"state/{name}": p for name, p in modules[True].state_dict().items()}
    for latest, module in modules.items():
        for situation, locations in SITUATIONS.items():
            cached = situation == "cached media"
            given = dict(media_locations=torch.from_numpy(locations), use_cached_media=cached)
            case = {"locations": locations, "cached": cached, "latest": latest}
            case |= run(module, (x, media), found["dy"], **given)
            name = f"{situation}: {'latest' if latest else 'all previous'}"
            found |= {f"{name}/{key}": value for key, value in case.items()}
    return found


def perceiver(library, draws, **embeddings):
    module = with_weights(library.PerceiverResampler(**PERCEIVER, **embeddings), draws)
    x = draw(draws, 2, 2, 2, 4, PERCEIVER["dim"])
    dy = draw(draws, 2, 2, PERCEIVER["num_latents"], PERCEIVER["dim"])
    found = {"dy": dy, "input/0": x} | {f"state/{name}": p for name, p in module.state_dict().items()}
    return found | {f"all/{key}": value for key, value in run(module, (x,), dy).items()}


def main(helpers):
    spec = importlib.util.spec_from_file_location("open_flamingo_helpers", helpers)
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    draws = np.random.RandomState(0)
    layers = {
        "gated": gated(library, draws),
        "perceiver": perceiver(library, draws, max_num_media=3, max_num_frames=4),
        "perceiver without embeddings": perceiver(library, draws),
    }
    named = {f"{layer}/{key}": np.asarray(value) for layer, found in layers.items() for key, value in found.items()}
    np.savez_compressed(Path(__file__).parent / "data" / "open_flamingo.npz", **named)


if __name__ == "__main__":
    main(*sys.argv[1:])
