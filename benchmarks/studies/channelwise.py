"""Decides ADR 12: compares gradient errors of widths per channel and of uniform 4 bits.

Trains a convolutional network on scikit-learn's digits, enlarged, and compares the gradient error of keeping the inputs
of all convolutions and batch norms at 4 bits a row with that of channel-wise widths of no more bytes, on a batch that
the widths were not chosen on: after training, and after some more steps with the same widths. "all" shares bytes
among all tensors, which is what a plan does; the other rows among the tensors of one class of readers, or leave each
tensor its own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lib.checks import Check, checks_table
from benchmarks.lib.common import names_of, wide_console
from benchmarks.lib.results import append_record
from fxhybrid.accuracy.calibration import channels_at_4_bits
from fxhybrid.accuracy.channel_widths import channelwise_specs
from fxhybrid.accuracy.compression_trial import LossyStep
from fxhybrid.accuracy.verifier import Reference, reference
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.codecs import coarsest_lossy, get_codec
from fxhybrid.options import Options
from fxhybrid.pipeline import Prepared, prepare
from fxhybrid.suite.convnets import MobileNetV2, ResNet
from fxhybrid.suite.sample_data import load_digits

MINUTES = 10
NEEDS = "scikit-learn"

MODELS = {
    "resnet50": (lambda: ResNet((3, 4, 6, 3), n_classes=10), 8, 112),
    "mobilenetv2": (lambda: MobileNetV2(n_classes=10), 16, 96),
}
LIMIT = 0.7  # of uniform's error
Specs = Mapping[int, str]


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    model: str
    when: str
    sharing: str
    share_of_bytes: float
    uniform: float
    mixed: float

    @property
    def ratio(self) -> float:
        """Channel-wise over uniform."""
        return self.mixed / self.uniform


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison, prints its table and judges it."""
    parser = argparse.ArgumentParser("python -m benchmarks.studies.channelwise", description=__doc__)
    parser.add_argument("--models", metavar="LIST", help=f"default: all of {','.join(MODELS)}")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: 200)")
    parser.add_argument("--later", type=int, default=100, help="more steps with the same widths (default: 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file")
    arguments = parser.parse_args(argv)
    table = Table(title="Gradient error: channel-wise widths against uniform 4 bits")
    for column in ("model", "when", "bytes shared by", "bytes", "uniform", "channel-wise", "ratio"):
        table.add_column(column)
    checks = []
    for name in names_of(arguments.models, MODELS, "model"):
        results = list(compare(name, arguments.steps, arguments.later))
        for r in results:
            errors = f"{r.share_of_bytes:.4f}", f"{r.uniform:.4f}", f"{r.mixed:.4f}", f"{r.ratio:.2f}"
            table.add_row(r.model, r.when, r.sharing, *errors)
            record = {"part": "channelwise", "key": f"{r.sharing}, {r.when}", "ratio": r.ratio, **asdict(r)}
            append_record(arguments.json, record)
        worst = max(r.ratio for r in results if r.sharing == "all")
        checks.append(Check(f"{name}, all", f"<= {LIMIT} x uniform", f"{worst:.2f}", worst <= LIMIT))
    wide_console().print(table)
    wide_console().print(checks_table(checks))


def compare(name: str, steps: int, more: int) -> Iterator[Result]:
    """Trains, chooses widths, compares; trains on and compares again."""
    make, batch, pixels = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = make()
    step, data = Step(model, F.cross_entropy, False), batches(batch, pixels)
    chosen_on, tested_on = next(data), next(data)
    prepared = prepare(step, chosen_on, Options.checked(budget=1.0, loss_fn=F.cross_entropy))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    loss = train(step, optimizer, itertools.islice(data, steps))
    choices = dict(all_choices(prepared, reference(prepared, step, chosen_on)))
    yield from results(
        name, f"after {steps} steps, loss {loss:.2f}", prepared, reference(prepared, step, tested_on), choices
    )
    if more:
        loss = train(step, optimizer, itertools.islice(data, more))
        later = reference(prepared, step, tested_on)
        yield from results(name, f"{more} steps later, loss {loss:.2f}", prepared, later, choices)


def train(step: Step, optimizer: torch.optim.Optimizer, data: Iterator[StepCall]) -> float:
    """Plain training; gives the mean of the last losses."""
    losses = []
    for call in data:
        optimizer.zero_grad()
        loss = step(*call)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.zero_grad()
    return sum(losses[-20:]) / max(len(losses[-20:]), 1)


def all_choices(prepared: Prepared, on: Reference) -> Iterator[tuple[str, tuple[Specs, Specs]]]:
    """Uniform and channel-wise codecs, by what shares bytes."""
    channels = channels_at_4_bits(prepared, LossyStep(prepared, on))
    yield "all", pair(prepared, {t: errors for group in channels.values() for t, errors in group.items()})
    for name, group in channels.items():
        if group:
            yield name, pair(prepared, group)
    single = [pair(prepared, {t: errors}) for group in channels.values() for t, errors in group.items()]
    uniform, mixed = ({t: spec for specs in part for t, spec in specs.items()} for part in zip(*single, strict=True))
    yield "none", (uniform, mixed)


def pair(prepared: Prepared, channels: Mapping[int, Tensor]) -> tuple[Specs, Specs]:
    """The 4-bit codecs of these tensors, and the best channel-wise ones that take no more bytes."""
    four = coarsest_lossy(prepared.choices, channels)
    return four, four | channelwise_specs({t: prepared.meta(t) for t in channels}, channels, four)


def results(
    name: str, when: str, prepared: Prepared, on: Reference, choices: Mapping[str, tuple[Specs, Specs]]
) -> Iterator[Result]:
    """One comparison for each way to share bytes."""
    step = LossyStep(prepared, on)
    for sharing, (uniform, mixed) in choices.items():
        n_bytes = [
            sum(sum(get_codec(s).encoded_bytes(prepared.meta(t))) for t, s in specs.items())
            for specs in (uniform, mixed)
        ]
        yield Result(name, when, sharing, n_bytes[1] / n_bytes[0], step.error(uniform), step.error(mixed))


def batches(batch: int, pixels: int) -> Iterator[StepCall]:
    """Endless batches of enlarged digits."""
    images, labels = load_digits("the benchmark")
    generator = torch.Generator().manual_seed(0)
    while True:
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        large = F.interpolate(images[chosen], size=pixels, mode="bilinear").expand(-1, 3, -1, -1)
        yield StepCall((large.contiguous(),), {}, (labels[chosen],))


if __name__ == "__main__":
    main()
