"""The command line: ``fxhybrid plan``, ``frontier``, ``demo`` and ``federated``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fxhybrid.errors import FxHybridError, InvalidArgument
from fxhybrid.options import COMPRESSIONS, OPTIONS, REORDERED, SOLVERS, Options
from fxhybrid.version import __version__

FAILED = 2

_ABOUT = "Train an unchanged PyTorch model inside a memory budget."
_EXAMPLES = """\
examples:
  fxhybrid demo
      train two small models on real data, unmodified and at two budgets each
  fxhybrid plan bert --size small --budget 0.6
      plan a model of the built-in suite for 60 % of the save-all peak
  fxhybrid plan mypackage.models:make --budget 512MiB --json plan.json
      plan your own model: make() returns (model, inputs[, loss_fn[, loss_args]])
  fxhybrid frontier mobilenetv2 --plot frontier.png
      what each budget costs by recomputing, by compressing and by both
  fxhybrid federated --policies fxhybrid,exclude,random
      train one model on simulated devices, most of which cannot hold the unmodified step
"""
_MODEL = "package.module:factory, or a suite model (resnet50, mobilenetv2, bert, gpt2, vit, t5, unet, gru, mlp)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit code.

    Args:
        argv: the arguments; ``None`` takes those of the process.
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except FxHybridError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fxhybrid", description=_ABOUT, epilog=_EXAMPLES, formatter_class=keep_lines)
    parser.add_argument("--version", action="version", version=f"fxhybrid {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{demo,plan,frontier,federated,cache}")
    _add_demo(commands.add_parser("demo", help="train two models on real data inside budgets"))
    _add_plan(commands.add_parser("plan", help="plan one model for one budget"))
    _add_frontier(commands.add_parser("frontier", help="what each budget costs"))
    _add_federated(commands.add_parser("federated", help="train one model on simulated devices of unlike memory"))
    _add_cache(commands.add_parser("cache", help="list or clear what is kept on disk"))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains a batch-norm CNN on scikit-learn's digits and a small transformer on the source text of "
        "Python's standard library, unmodified and at two budgets each, in up to three minutes on two cores."
    )
    parser.add_argument(
        "--plot", type=Path, default=Path("fxhybrid-demo.png"), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps per run (default: set per model)")
    parser.add_argument(
        "--shares",
        default="0.6,0.4",
        metavar="LIST",
        help="budgets, of the unmodified peak (default: %(default)s)",
    )
    parser.set_defaults(run=_demo)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--size", choices=("small", "full"), default="full", help="of a suite model (default: full)")
    _add_option(parser, "compression", choices=COMPRESSIONS)
    _add_option(parser, "exact", choices=(REORDERED,))
    _add_option(parser, "max_grad_error", type=float, metavar="X")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")


def _about(name: str) -> str:
    """Returns the description of an option of ``compile``."""
    return OPTIONS[name].about.replace("%", "%%")


def _add_option(parser: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """Adds an option of ``compile`` under its own name, with its default and description."""
    default, flag = getattr(Options, name), f"--{name.replace('_', '-')}"
    parser.add_argument(flag, default=default, help=f"{_about(name)} (default: {default})", **settings)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = "Plans a training step for one budget, without training."
    _add_model(parser)
    parser.add_argument("--budget", required=True, help=_about("budget"))
    _add_option(parser, "solver", choices=SOLVERS)
    parser.set_defaults(run=_plan)


def _add_frontier(parser: argparse.ArgumentParser) -> None:
    parser.description = "Plans a training step for many budgets, by recomputing, by compressing and by both."
    _add_model(parser)
    parser.add_argument("--budgets", metavar="LIST", help="such as 0.8,0.6,64MiB (default: 12 even steps)")
    parser.add_argument("--solver", choices=("mps", "ilp"), default="mps", help="of the hybrid (default: mps)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot; the suffix says the format")
    parser.set_defaults(run=_frontier)


def _add_federated(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains one model on simulated devices, most of which cannot hold the unmodified training step. Training is "
        "real; clock and memory are the devices' own."
    )
    parser.add_argument(
        "what", nargs="?", choices=("app-path",), help="print the folder of the Flower app, for `flwr run`"
    )
    parser.add_argument("--task", default="digits", help="digits, text or lora (default: %(default)s)")
    parser.add_argument("--policies", default="fxhybrid,exclude", metavar="LIST", help="default: %(default)s")
    parser.add_argument("--devices", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--capable-share", type=float, default=0.2, metavar="X", help="default: %(default)s")
    parser.add_argument(
        "--skew", type=float, default=0.8, metavar="X", help="of labels by device (default: %(default)s)"
    )
    parser.add_argument("--contention", default="steady", help="kind of memory traces (default: %(default)s)")
    parser.add_argument("--fleet", default="mixed", help="mixed, or phones only (default: %(default)s)")
    parser.add_argument(
        "--failures", default="heartbeat", help="when a death is noticed: at-once, heartbeat (default) or deadline"
    )
    parser.add_argument("--swap", action="store_true", help="devices swap what does not fit, instead of dying")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--hours", type=float, default=math.inf, metavar="H", help="virtual ones; ends a run, too")
    parser.add_argument("--deadline", type=float, metavar="S", help="of a round (default: twice the mean prediction)")
    parser.add_argument("--per-round", type=int, default=5, metavar="N", help="updates a round waits for (default: 5)")
    parser.add_argument("--local-steps", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, metavar="DIR", help="logs and checkpoints go there")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --folder")
    parser.set_defaults(run=_federated)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.description = "Lists what is kept on disk: times of operators, plans with measured errors, compiled kernels."
    parser.add_argument("--clear", action="store_true", help="remove it")
    parser.set_defaults(run=_cache)


def parse_budget(text: str) -> int | float | str:
    """Reads a budget as the shell gives it: "0.6" is a share, "1000000" bytes, anything else text with a unit."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _common(arguments: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    from fxhybrid.cli.model_spec import load_model_spec

    spec = load_model_spec(arguments.model, arguments.size)
    options = {
        "loss_fn": spec.loss_fn,
        "loss_args": spec.loss_args,
        "compression": arguments.compression,
        "exact": arguments.exact,
        "max_grad_error": arguments.max_grad_error,
        "solver": arguments.solver,
    }
    return spec.model, spec.inputs, options


def _plan(arguments: argparse.Namespace) -> None:
    import fxhybrid
    from fxhybrid.units import check_budget

    budget = check_budget(parse_budget(arguments.budget))
    model, inputs, options = _common(arguments)
    plan = fxhybrid.plan(model, inputs, budget=budget, **options)
    _console().print(Text(str(plan)))
    if arguments.json:
        _write(arguments.json, plan.to_json())


def _frontier(arguments: argparse.Namespace) -> None:
    from fxhybrid.budget_sweep import frontier
    from fxhybrid.units import check_size

    budgets = None
    if arguments.budgets:
        budgets = [check_size(parse_budget(text)) for text in arguments.budgets.split(",")]
    model, inputs, options = _common(arguments)
    found = frontier(model, inputs, budgets=budgets, **options)
    _console().print(found)
    if arguments.json:
        _write(arguments.json, found.to_json())
    if arguments.plot:
        found.plot(arguments.plot)
        _console().print(f"plot: {arguments.plot}", highlight=False)


def _demo(arguments: argparse.Namespace) -> None:
    from fxhybrid.demo import run_demo

    try:
        shares = [float(text) for text in arguments.shares.split(",")]
    except ValueError as error:
        raise InvalidArgument(f"--shares is {arguments.shares!r}; give numbers in (0, 1): 0.6,0.4") from error
    if not all(0 < share < 1 for share in shares):
        raise InvalidArgument(f"--shares is {arguments.shares!r}; each must lie between 0 and 1")
    if arguments.steps is not None and arguments.steps < 1:
        raise InvalidArgument(f"--steps is {arguments.steps}; it must be at least 1")
    run_demo(_console(), shares=shares, steps=arguments.steps, plot=arguments.plot)


def _federated(arguments: argparse.Namespace) -> None:
    from fxhybrid.federated.simulation.cli import run

    if arguments.what == "app-path":
        print(Path(__file__).parents[1] / "federated" / "flower_app")
    else:
        run(arguments)


def _console() -> Console:
    """Returns the terminal; wide enough for the tables where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"cannot write {path}: {error.strerror}") from error
    _console().print(f"written: {path}", highlight=False)


def _cache(arguments: argparse.Namespace) -> None:
    from fxhybrid.cli.cache import cache_table, clear_cache

    _console().print(clear_cache() if arguments.clear else cache_table())
