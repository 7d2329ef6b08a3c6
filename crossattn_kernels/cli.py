"""The command line: `python -m crossattn_kernels <command>`.

A command is a function that adds its arguments and one that runs it and returns the exit status.  What a command needs
is imported when it runs, so that `--help` works without any extra.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from crossattn_kernels import __version__

DEMO_EXTRA = ("matplotlib", "rich", "sklearn")


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "check parity on this machine, then teach a frozen language model to name handwritten digits"
    demo = commands.add_parser("demo", help=text, description=f"C{text[1:]}.")
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
    # the picture is written after minutes of training
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        return _refuse(f"--out must be a file in a folder that exists, got {args.out}")
    try:
        from crossattn_kernels import demo
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_EXTRA:
            raise
        return _refuse(f"the demo needs {error.name}: pip install '.[demo]' in the checkout")
    if args.out.suffix.lower() not in demo.PICTURES:
        return _refuse(f"--out must end in one of {', '.join(demo.PICTURES)}, got {args.out}")
    try:
        return demo.run(args.backend, args.steps, args.seed, args.out)
    except NotImplementedError as error:  # the backend asked for cannot run here
        return _refuse(str(error))


def add_compile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "compile the kernels for a GPU that need not be here, and report registers, spills and instructions"
    compile_ = commands.add_parser("compile", help=text, description=f"C{text[1:]}.")
    compile_.add_argument("--arch", default="sm_90", help="sm_80, sm_90, sm_100 or gfx942 (default: %(default)s)")
    only = (
        "only calls with this in their name, which is shape, dtype, head size and options: 'short keys bf16 D64 plain'"
    )
    compile_.add_argument("-k", dest="only", metavar="TEXT", default="", help=only)
    compile_.add_argument("--every", action="store_true", help="every shape x dtype x head size x kind: hours")
    compile_.add_argument("--json", action="store_true", help="the report as it is kept in bench/results")
    choose = "where kernels spill, write the largest tiles that do not into the table of this Triton"
    compile_.add_argument("--choose", action="store_true", help=choose)
    compile_.add_argument(
        "--jobs", type=_positive, metavar="N", default=1, help="processes that compile (default: %(default)s)"
    )
    compile_.set_defaults(run=run_compile)


def run_compile(args: argparse.Namespace) -> int:
    try:
        from crossattn_kernels.aot import choose, report, sweep
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return _refuse("compilation needs triton: pip install '.[triton]' in the checkout")
    names = [str(call) for call in sweep(args.every)]
    if not any(args.only in name for name in names):
        some = ", ".join(map(repr, names[:: len(names) // 4][:4]))
        return _refuse(f"no call has {args.only!r} in its name; names are like {some}")
    try:
        if args.choose:
            return choose.run(args.arch, args.only, args.every)
        return report.run(args.arch, args.only, args.every, args.json, args.jobs)
    except ValueError as error:  # an architecture that is not known, or the interpreter instead of the compiler
        return _refuse(str(error))


def add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "time launch configurations on the GPU that is here, and write a table of the fastest"
    tune = commands.add_parser("tune", help=text, description=f"T{text[1:]}; never needed for correct results.")
    tune.add_argument("workloads", nargs="*", metavar="workload", help="what to time, by name (default: all)")
    tune.add_argument("--shape", action="append", default=[], metavar="B,Hq,Hk,M,N,D", help="a plain call; repeatable")
    dtypes = ("bfloat16", "float16", "float32")
    tune.add_argument("--dtype", choices=dtypes, default=dtypes[0], help="of all tensors (default: %(default)s)")
    tune.add_argument(
        "--kernels", metavar="NAMES", help="as a table calls them, separated by commas (default: all that run)"
    )
    tune.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of table and log (default: the package's, else the current one)"
    )
    tune.add_argument("--budget", type=_positive, metavar="SECONDS", help="stop then, with the best so far")
    tune.set_defaults(run=run_tune)


def run_tune(args: argparse.Namespace) -> int:
    from crossattn_kernels import tune

    kernels, budget = args.kernels.split(",") if args.kernels else [], args.budget or math.inf
    try:
        return tune.run(args.workloads, args.shape, args.dtype, kernels, args.out, budget)
    except (OSError, ValueError) as error:  # no GPU, an unknown name, a folder that cannot be written
        return _refuse(str(error))


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "which attention modules of a model can run on this package, and why the others cannot"
    report = commands.add_parser("report", help=text, description=f"Say w{text[1:]}; no weights are loaded.")
    what = "a name on the hub, a folder or a config.json: of a model of transformers or diffusers, or of a pipeline"
    report.add_argument("model", metavar="MODEL_OR_CONFIG", help=what)
    report.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> int:
    from crossattn_kernels.integrations import diffusers, transformers

    here = Path(args.model)
    if here.is_absolute() and not here.exists():
        return _refuse(f"there is no {here}")
    index, config = here / "model_index.json", here / "config.json" if here.is_dir() else here
    if index.exists() or (config.is_file() and '"_class_name"' in config.read_text(errors="replace")):
        homes = [diffusers]
    else:
        homes = [transformers] if here.exists() else [transformers, diffusers]
    refusals = []
    for home in homes:
        try:
            print(home.report_of_config(args.model))
            return 0
        except (ImportError, ValueError) as error:  # the library is missing, or does not know such a model
            refusals.append(" ".join(str(error).split()))
    return _refuse(refusals[0])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m crossattn_kernels", description="Triton kernels for cross-attention.")
    parser.add_argument("--version", action="version", version=f"crossattn_kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    add_demo(commands)
    add_compile(commands)
    add_tune(commands)
    add_report(commands)
    args = parser.parse_args(argv)
    return args.run(args)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2
