"""The demo: a frozen language model learns to read images through gated cross-attention.

A character language model is trained on the names of the ten digits and frozen: it can spell, but it is blind.  Gated
cross-attention to the patches of an image is put in front of each of its blocks and only that is trained, as in
Flamingo, https://arxiv.org/abs/2204.14198.  While the gates are 0 all images get one name; as they open, their own.

Letters: B images, M characters, N patches, C channels, H heads, D = C // H head size.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from crossattn_kernels import __version__, cross_attention, explain
from crossattn_kernels.layers.heads import merge_heads, split_heads
from crossattn_kernels.maps import attention_weights
from crossattn_kernels.testing import Case, check, with_dtypes

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BEGIN, END = "^", "$"
ALPHABET = BEGIN + END + "".join(sorted(set("".join(NAMES))))
CONTEXT = max(map(len, NAMES)) + 1  # characters of a name and one END
SIDE, PATCH = 8, 2  # pixels along an image, along a patch
GRID = SIDE // PATCH  # patches along an image
REQUIRED_ACCURACY = 0.95
PICTURES = tuple(f".{ending}" for ending in sorted(Figure().canvas.get_supported_filetypes()))


# ---- models ----


def feed_forward(channels: int) -> nn.Sequential:
    hidden = 2 * channels
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))


class Block(nn.Module):
    """A pre-norm transformer block in which a character sees the earlier ones."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.ffn = feed_forward(channels)

    def forward(self, x: Tensor) -> Tensor:  # (B, M, C) -> (B, M, C)
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        return x + self.ffn(x)


class LanguageModel(nn.Module):
    """A character language model; it never sees an image."""

    def __init__(self, channels: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), channels)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, channels))
        self.blocks = nn.ModuleList(Block(channels, heads) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, len(ALPHABET)))

    def embed(self, tokens: Tensor) -> Tensor:  # (B, M) -> (B, M, C)
        return self.characters(tokens) + self.positions[: tokens.shape[1]]

    def forward(self, tokens: Tensor) -> Tensor:  # (B, M) -> (B, M, alphabet)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class GatedCrossAttention(nn.Module):
    """x + tanh(gate) * attention, then x + tanh(gate) * feed-forward; both gates start at 0, where it does nothing."""

    def __init__(self, channels: int, heads: int, backend: str | None) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.norm = nn.LayerNorm(channels)
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(channels, channels, bias=False) for _ in range(4))
        self.ffn = feed_forward(channels)
        self.gate, self.ffn_gate = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, patches: Tensor, weights: list[Tensor] | None = None) -> Tensor:
        """(B, M, C), (B, N, C) -> (B, M, C); the softmax weights, (B, H, M, N), are added to a list that is given."""
        q = split_heads(self.to_q(self.norm(x)), self.heads)  # (B, H, M, D)
        k, v = (split_heads(to(patches), self.heads) for to in (self.to_k, self.to_v))  # (B, H, N, D)
        if weights is not None:
            weights.append(attention_weights(q, k))
        # a scalar gate commutes with the projection behind it, so the attention itself can apply it
        x = x + self.out(merge_heads(cross_attention(q, k, v, gate=self.gate, backend=self.backend)))
        return x + self.ffn_gate.tanh() * self.ffn(x)


class Captioner(nn.Module):
    """A frozen language model with gated cross-attention to image patches in front of each block."""

    def __init__(self, language_model: LanguageModel, heads: int = 4, backend: str | None = None) -> None:
        super().__init__()
        channels = language_model.positions.shape[1]
        self.language_model = language_model.requires_grad_(False)
        self.patches = nn.Linear(PATCH**2, channels)
        self.positions = nn.Parameter(0.2 * torch.randn(GRID**2, channels))
        self.ffn, self.norm = feed_forward(channels), nn.LayerNorm(channels)
        self.readers = nn.ModuleList(GatedCrossAttention(channels, heads, backend) for _ in language_model.blocks)

    def encode(self, images: Tensor) -> Tensor:  # (B, SIDE, SIDE) -> (B, N, C)
        pixels = F.unfold(images[:, None], PATCH, stride=PATCH).mT  # (B, N, PATCH²)
        x = self.patches(pixels) + self.positions  # no patch sees another: what is read from a patch is in that patch
        return self.norm(x + self.ffn(x))

    def forward(self, tokens: Tensor, patches: Tensor, weights: list[Tensor] | None = None) -> Tensor:
        x = self.language_model.embed(tokens)  # (B, M) -> (B, M, C)
        for reader, block in zip(self.readers, self.language_model.blocks):
            x = block(reader(x, patches, weights))
        return self.language_model.head(x)  # (B, M, alphabet)

    def gates(self) -> list[Tensor]:
        """Of attention and of feed-forward, layer by layer."""
        return [p for name, p in self.readers.named_parameters() if name.endswith("gate")]

    def openings(self) -> list[float]:
        return torch.stack(self.gates()).tanh().tolist()


# ---- images and names ----


class Digits(NamedTuple):
    images: Tensor  # (B, SIDE, SIDE) in [0, 1]
    labels: Tensor  # (B,)


def load(device: torch.device, held_out: int = 360) -> tuple[Digits, Digits]:
    """Handwritten digits to train on and to hold out; the split is the same for every seed."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order].to(device) / 16
    labels = torch.tensor(data.target)[order].to(device)
    return Digits(images[held_out:], labels[held_out:]), Digits(images[:held_out], labels[:held_out])


def jitter(images: Tensor, amount: float = 0.06) -> Tensor:  # (B, SIDE, SIDE) -> (B, SIDE, SIDE)
    """A small random affine map for each image, as the images to train on are few."""
    maps = torch.eye(2, 3, device=images.device) + amount * torch.randn(len(images), 2, 3, device=images.device)
    grid = F.affine_grid(maps, [len(images), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def tokenize(names: Sequence[str], device: torch.device) -> Tensor:  # (B, 1 + CONTEXT)
    padded = (BEGIN + name.ljust(CONTEXT, END) for name in names)
    return torch.tensor([[ALPHABET.index(character) for character in name] for name in padded], device=device)


@torch.no_grad()
def caption(captioner: Captioner, images: Tensor) -> list[str]:
    """The name of each image, greedily, character by character."""
    patches = captioner.encode(images)
    tokens = torch.full((len(images), 1), ALPHABET.index(BEGIN), device=images.device)
    for _ in range(CONTEXT):
        tokens = torch.cat([tokens, captioner(tokens, patches)[:, -1:].argmax(-1)], dim=1)
    return ["".join(ALPHABET[t] for t in row).partition(END)[0] for row in tokens[:, 1:].tolist()]


def accuracy(names: Sequence[str], truth: Sequence[str]) -> float:
    return sum(name == t for name, t in zip(names, truth)) / len(truth)


@torch.no_grad()
def reading_maps(captioner: Captioner, images: Tensor, names: Sequence[str]) -> Tensor:  # (B, M, GRID, GRID)
    """How much each character reads from each patch: softmax weights, averaged over layers and heads."""
    weights: list[Tensor] = []
    captioner(tokenize(names, images.device)[:, :-1], captioner.encode(images), weights)
    return torch.stack(weights).mean((0, 2)).unflatten(-1, (GRID, GRID))


# ---- training ----


def spelling_loss(logits: Tensor, tokens: Tensor) -> Tensor:  # (B, M, alphabet), (B, 1 + M) -> ()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def fit(
    title: str, groups: list[dict[str, Any]], loss_of: Callable[[], Tensor], steps: int, console: Console
) -> Iterator[int]:
    """AdamW on a one-cycle schedule behind a progress bar; yields after every step."""
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        task = progress.add_task(title, total=steps, loss=float("nan"))
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, loss=loss.item())
            yield step


def train_language_model(model: LanguageModel, steps: int, console: Console) -> None:
    """On the ten names; no model of them gets below ln(10) / CONTEXT, as the first character is a guess."""
    tokens = tokenize(NAMES, model.positions.device)
    groups = [{"params": list(model.parameters()), "lr": 3e-3}]
    for _ in fit("language model", groups, lambda: spelling_loss(model(tokens[:, :-1]), tokens), steps, console):
        pass


def train_captioner(model: Captioner, digits: Digits, steps: int, console: Console) -> list[list[float]]:
    """Everything but the language model; returns the openings of the gates, at first and after every step."""
    names = tokenize(NAMES, digits.labels.device)

    def loss() -> Tensor:
        drawn = torch.randint(len(digits.labels), (64,), device=digits.labels.device)
        tokens = names[digits.labels[drawn]]
        return spelling_loss(model(tokens[:, :-1], model.encode(jitter(digits.images[drawn]))), tokens)

    weights = [p for p in model.parameters() if p.requires_grad and p.ndim]
    # a gate is one number with far to go: larger steps than a weight's, and nothing that pulls it back to 0
    groups = [{"params": weights, "lr": 3e-3}, {"params": model.gates(), "lr": 3e-2, "weight_decay": 0.0}]
    start = model.openings()
    return [start, *(model.openings() for _ in fit("gated cross-attention", groups, loss, steps, console))]


# ---- what is shown ----


def machine_table(device: torch.device, backend: str | None) -> Table:
    q, k = (torch.empty(64, 4, length, 16, device=device) for length in (CONTEXT, GRID**2))  # as in training
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    table = Table(title="this machine", title_justify="left", show_header=False)
    table.add_row("device", f"{device.type} ({name})")
    table.add_row("versions", f"python {platform.python_version()}, torch {torch.__version__}, triton {triton}")
    table.add_row("crossattn_kernels", __version__)
    table.add_row("chosen", str(explain(q, k, k, gate=q.new_zeros(()), backend=backend)))
    return table


def parity_table(device: torch.device, backend: str | None) -> tuple[Table, bool]:
    """Errors against the fp64 reference on a few calls, and whether all are within the budgets of testing.py."""
    table = Table("call", "dtype", "output", "gradients (the worst)", "ok", title_justify="left")
    table.title = "parity with the fp64 reference: error / budget"
    plain, passed = Case("plain"), True
    calls = [plain, replace(plain, name="key ranges", mask="ranges"), replace(plain, name="gated", gate="head")]
    for case in with_dtypes(calls, torch.float32, torch.bfloat16):
        rows = check(case, backend, device)
        ok = all(row.ok for row in rows)
        passed &= ok
        worst = max((row for row in rows if row.name.startswith("d")), key=lambda row: row.error / row.budget)
        y, gradient = (f"{row.name} {row.error:.1e} / {row.budget:.1e}" for row in (rows[0], worst))
        table.add_row(case.name, str(case.dtype).removeprefix("torch."), y, gradient, "[green]yes" if ok else "[red]NO")
    return table, passed


def caption_table(images: Tensor, truth: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Table:
    table = Table("held out", *map(thumbnail, images), title="captions", title_justify="left")
    for row, names in (("gates at 0", before), ("gates open", after)):
        table.add_row(row, *(f"[{'green' if name == t else 'red'}]{name}" for name, t in zip(names, truth)))
    return table


def thumbnail(image: Tensor) -> str:  # (SIDE, SIDE) -> SIDE // 2 lines, two pixels a character
    ink = (image > 0.4).int()
    return "\n".join("".join(" ▀▄█"[pair] for pair in line) for line in (ink[::2] + 2 * ink[1::2]).tolist())


def gate_table(history: list[list[float]], width: int = 32) -> Table:
    table = Table("tanh(gate)", "start", "during training (size)", "end", title="the gates open", title_justify="left")
    places = [step * (len(history) - 1) // (width - 1) for step in range(width)]
    for i, opening in enumerate(zip(*history)):
        bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * abs(opening[place])))] for place in places)
        name = ("attention", "feed-forward")[i % 2]
        table.add_row(f"layer {i // 2} {name}", f"{opening[0]:.2f}", bars, f"{opening[-1]:+.2f}")
    return table


def draw(images: Tensor, truth: Sequence[str], names: Sequence[str], maps: Tensor, path: Path) -> None:
    """Two digits a row: each with its whole name, then with each character and the patches it was read from."""
    rows, columns = -(-len(images) // 2), CONTEXT  # a digit has a panel for its name and one for each character
    figure = Figure(figsize=(15, 1.6 * rows + 0.5), layout="constrained", dpi=110)
    figure.suptitle("where each character was read from (orange: more attention than an even share)")
    ratios = [1.0] * columns + [0.3] + [1.0] * columns
    axes = figure.subplots(rows, 2 * columns + 1, squeeze=False, gridspec_kw={"width_ratios": ratios})
    orange = np.full((96, 96), 0.4)  # of the colour map; how much of it is seen is the attention
    for panel in axes.flat:
        panel.set_axis_off()
    for i, (image, name, read) in enumerate(zip(images.cpu(), names, maps.cpu())):
        panels = axes[i // 2, (columns + 1) * (i % 2) :]
        whole = read[: max(1, len(name))].mean(0)
        for j, (panel, title, weights) in enumerate(zip(panels, [name, *name[: columns - 1]], [whole, *read])):
            excess = (weights * GRID**2 - 1) / 3  # an even share is 0, four times as much is 1
            panel.imshow(smooth(image), cmap="gray_r", vmin=-0.06, vmax=1.2)
            panel.imshow(orange, cmap="autumn", vmin=0, vmax=1, alpha=0.9 * smooth(excess))
            colour = "#1a7f37" if name == truth[i] else "#cf222e"
            panel.set_title(title, color=colour, fontsize=13, fontweight="normal" if j else "bold")
    figure.savefig(path)


def smooth(x: Tensor) -> np.ndarray:  # any square -> (96, 96), within [0, 1]
    return F.interpolate(x[None, None], (96, 96), mode="bicubic")[0, 0].clamp(0, 1).numpy()


# ---- the command ----


def run(backend: str | None, steps: int, seed: int, out: Path) -> int:
    """Exit status: 0, or 1 when parity, the frozen weights or the accuracy are not as they must be."""
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # tensors this small are slower on more, and far slower beside a busy neighbour
    torch.manual_seed(seed)

    console.print(machine_table(device, backend))
    table, agrees = parity_table(device, backend)
    console.print(table)
    if not agrees:
        console.print("[red]This backend does not agree with the reference on this machine.")
        return 1

    digits, held_out = load(device)
    language_model = LanguageModel().to(device)
    train_language_model(language_model, 200, console)
    frozen = [p.clone() for p in language_model.parameters()]
    captioner = Captioner(language_model, backend=backend).to(device)
    before = caption(captioner, held_out.images)
    openings = train_captioner(captioner, digits, steps, console)
    after = caption(captioner, held_out.images)
    truth = [NAMES[label] for label in held_out.labels.tolist()]

    shown = [truth.index(name) for name in NAMES]  # the first of each, whether its caption is right or not
    images, named = held_out.images[shown], [after[i] for i in shown]
    console.print(caption_table(images[::2], NAMES[::2], [before[i] for i in shown[::2]], named[::2]))
    console.print(gate_table(openings))
    draw(images, NAMES, named, reading_maps(captioner, images, named), out)

    unchanged = all(map(torch.equal, frozen, language_model.parameters()))
    first, last = accuracy(before, truth), accuracy(after, truth)
    console.print(f"frozen language model: {sum(p.numel() for p in frozen):,} weights, {'un' * unchanged}changed")
    console.print(f"{len(truth)} held-out digits, whole name right: {first:.1%} with the gates at 0, {last:.1%} now")
    console.print(f"where each character was read from: {out}")
    if last < REQUIRED_ACCURACY:
        console.print(f"[red]At least {REQUIRED_ACCURACY:.0%} were to be right.")
    return int(not unchanged or last < REQUIRED_ACCURACY)
