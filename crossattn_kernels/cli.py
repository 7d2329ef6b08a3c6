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


def add_compile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "compile the kernels for a GPU that need not be here, and report registers, spills and instructions"
    compile_ = commands.add_parser("compile", help=text, description=text.capitalize() + ".")
    compile_.add_argument("--arch", default="sm_90", help="sm_80, sm_90, sm_100 or gfx942 (default: %(default)s)")
    compile_.add_argument("-k", dest="only", metavar="TEXT", default="", help="only calls with this in their name")
    compile_.add_argument("--every", action="store_true", help="every shape x dtype x head size x kind: hours")
    compile_.add_argument("--json", action="store_true", help="the report as it is kept in bench/results")
    compile_.add_argument(
        "--jobs", type=_positive, metavar="N", default=1, help="processes that compile (default: %(default)s)"
    )
    compile_.set_defaults(run=run_compile)


def run_compile(args: argparse.Namespace) -> int:
    try:
        from crossattn_kernels.aot import report
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return _refuse("compilation needs triton: pip install 'crossattn_kernels[triton]'")
    try:
        return report.run(args.arch, args.only, args.every, args.json, args.jobs)
    except ValueError as error:  # an architecture that is not known, or the interpreter instead of the compiler
        return _refuse(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m crossattn_kernels", description="Triton kernels for cross-attention.")
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    add_demo(commands)
    add_compile(commands)
    args = parser.parse_args(argv)
    return args.run(args)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2
