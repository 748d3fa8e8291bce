"""Decides ADR 12: compares predicted with measured gradient errors.

For suite models as they are initialised: each kind of codec on each group of tensors, predicted from 4 bits a row; then
random sets of lossy tensors with random codecs of those offered, predicted as the root of the sum of squares of their
own errors. All on the example batch.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.lib.common import Bench, names_of, wide_console
from benchmarks.lib.results import append_record
from fxhybrid import suite
from fxhybrid.accuracy.calibration import Calibration, ErrorPair, calibrate
from fxhybrid.accuracy.compression_trial import LossyStep
from fxhybrid.accuracy.verifier import reference
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.codecs import get_codec
from fxhybrid.optional_imports import require
from fxhybrid.options import Options
from fxhybrid.pipeline import prepare

MINUTES = 15
NEEDS = "transformers"

MODELS = ("mlp", "mobilenetv2", "resnet50", "bert", "vit")
SHARES = (0.02, 0.1, 0.3, 1.0)  # of the tensors that may be lossy


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints both tables, and draws the scatter if asked to."""
    parser = argparse.ArgumentParser("python -m benchmarks.studies.errors", description=__doc__)
    parser.add_argument("--models", metavar="LIST", help=f"default: {','.join(MODELS)}")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--plans", type=int, default=20, help="random plans per model (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw predicted against measured")
    arguments = parser.parse_args(argv)
    groups, plans = Table(title="Groups of tensors"), Table(title="Random plans: measured over predicted error")
    for column in ("model", "read by", "codec", "predicted", "measured", "ratio"):
        groups.add_column(column)
    for column in ("model", "plans", "measured", "smallest ratio", "median", "largest"):
        plans.add_column(column)
    every: dict[str, list[ErrorPair]] = {}
    for name in names_of(arguments.models or ",".join(MODELS), suite.names(), "model"):
        every[name] = list(pairs(name, arguments.size, arguments.plans))
        for pair in every[name]:
            append_record(arguments.json, {"model": name, **vars(pair)})
            if pair.codec:
                figures = f"{pair.predicted:.5f}", f"{pair.measured:.5f}", f"{pair.measured / pair.predicted:.2f}"
                groups.add_row(name, pair.what, pair.codec, *figures)
        found = [pair for pair in every[name] if not pair.codec]
        ratios = sorted(pair.measured / pair.predicted for pair in found)
        errors = f"{min(p.measured for p in found):.4f} to {max(p.measured for p in found):.4f}"
        figures = f"{ratios[0]:.2f}", f"{statistics.median(ratios):.2f}", f"{ratios[-1]:.2f}"
        plans.add_row(name, str(len(found)), errors, *figures)
    console = wide_console()
    console.print(groups)
    console.print(plans)
    if arguments.plot:
        draw(every, arguments.plot)


def pairs(name: str, size: suite.Size, n_plans: int) -> Iterator[ErrorPair]:
    """Of groups by kind of codec, then of random plans."""
    target = Bench(name, size).target
    step = Step(target.model, target.loss_fn, False)
    inputs, loss_args = target.inputs, tuple(target.loss_args)
    call = StepCall((), inputs, loss_args) if isinstance(inputs, dict) else StepCall(tuple(inputs), {}, loss_args)
    prepared = prepare(step, call, Options.checked(budget=1.0, loss_fn=target.loss_fn))
    compared = reference(prepared, step, call)
    found = calibrate(prepared, compared)
    yield from found.pairs
    yield from random_plans(found, LossyStep(prepared, compared), n_plans)


def random_plans(found: Calibration, step: LossyStep, n_plans: int) -> Iterator[ErrorPair]:
    """Sets of lossy tensors of all sizes, with codecs drawn from those offered."""
    rnd = random.Random(0)
    lossy = {t: [s for s in specs if not get_codec(s).lossless] for t, specs in found.choices.items()}
    candidates = [t for t, specs in lossy.items() if specs]
    for number in range(n_plans):
        chosen = rnd.sample(candidates, math.ceil(SHARES[number % len(SHARES)] * len(candidates)))
        specs = {t: rnd.choice(lossy[t]) for t in chosen}
        predicted = sum(found.errors[t, spec] ** 2 for t, spec in specs.items()) ** 0.5
        yield ErrorPair(f"{len(chosen)} of {len(candidates)} tensors", "", predicted, step.error(specs))


def draw(every: dict[str, list[ErrorPair]], path: Path) -> None:
    """Plans as dots, groups as crosses, on logarithmic axes."""
    plt = require("matplotlib.pyplot", "--plot")
    figure, axes = plt.subplots(figsize=(6, 6))
    for color, (name, found) in enumerate(every.items()):
        for marker, kept in (("o", [p for p in found if not p.codec]), ("x", [p for p in found if p.codec])):
            label = name if marker == "o" else None
            axes.scatter(
                [p.predicted for p in kept], [p.measured for p in kept], marker=marker, color=f"C{color}", label=label
            )
    limits = axes.get_xlim()
    axes.plot(limits, limits, color="gray", linewidth=0.5)
    axes.set(xscale="log", yscale="log", xlabel="predicted gradient error", ylabel="measured")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
