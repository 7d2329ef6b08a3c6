"""The command line: `python -m crossattn_kernels <command>`.

A command is a function that adds its arguments and one that runs it and returns the exit status.  What a command needs
is imported when it runs, so that `--help` works without any extra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DEMO_EXTRA = ("matplotlib", "rich", "sklearn")


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "check parity on this machine, then teach a frozen language model to name handwritten digits"
    demo = commands.add_parser("demo", help=text, description=text.capitalize() + ".")
    backends = ("triton", "torch", "reference")
    demo.add_argument("--backend", choices=backends, help="who computes the attention (default: chosen, and shown)")
    demo.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        default=1000,
        help="training steps of the gated layers (default: %(default)s)",
    )
    demo.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    demo.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    demo.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> int:
    try:
        from crossattn_kernels import demo
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_EXTRA:
            raise
        return _refuse(f"the demo needs {error.name}: pip install 'crossattn_kernels[demo]'")
    try:
        return demo.run(args.backend, args.steps, args.seed, args.out)
    except NotImplementedError as error:  # the backend asked for cannot run here
        return _refuse(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m crossattn_kernels", description="Triton kernels for cross-attention.")
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    add_demo(commands)
    args = parser.parse_args(argv)
    return args.run(args)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2
