"""Compares planned steps of convolution nets, which may run in channels_last, with plain eager steps.

Three nets are the suite's; two are torchvision's and one, which mixes convolutions with attention, is transformers'.
Each runs at its own peak and at half of it, steps of both in turn; the gradient of tier "reordered" is compared with
eager's, and so is that of the eager model in channels_last: both round in other ways, by chance more or less on a
batch, so that means over several batches are judged, within two standard errors.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

import fxhybrid
from benchmarks.lib.checks import Check, check_of, checks_table
from benchmarks.lib.common import (
    MARGIN,
    Bench,
    Step,
    add_record_files,
    names_of,
    records_of,
    table_of_rows,
    wide_console,
)
from benchmarks.lib.results import Record
from fxhybrid import BudgetError, suite
from fxhybrid.accuracy.step_result import StepResult, relative_difference
from fxhybrid.suite.case import SuiteCase, class_loss

MINUTES = 40
NEEDS = "torchvision, transformers"

PIXELS, CLASSES = 96, 10
BATCHES = 6  # on which gradients are compared
HALF = {"resnet50": 0.65}  # parameters and gradients alone are 0.38 of its peak
LIMITS = {"mobilenetv2": (0.75, 0.85)}  # of eager's time, at the whole peak and at half of it
USUAL_LIMITS = (0.92, 1.0)
TITLE = "Convolution nets against plain eager, medians of pairs run in turn"
COLUMNS = (
    *("model", "budget, of eager's peak", "planned peak", "measured peak", "time, of eager's", "processor time"),
    *("tier", "gradient difference of tier reordered", "of eager in channels_last"),
)


def efficientnet() -> nn.Module:
    """Builds EfficientNet-B0: depthwise convolutions, squeeze and excitation."""
    return torchvision_models().efficientnet_b0(num_classes=CLASSES, stochastic_depth_prob=0.0)


def densenet() -> nn.Module:
    """Builds DenseNet-121: each layer reads all before it."""
    return torchvision_models().densenet121(num_classes=CLASSES)


def torchvision_models() -> Any:
    """Imports torchvision's models."""
    from benchmarks.lib.torchvision_import import torchvision

    return torchvision.models


class MobileViT(nn.Module):
    """Classifies images by MobileViT: convolutions, and attention between their pixels."""

    def __init__(self) -> None:
        super().__init__()
        torchvision_models()  # which transformers imports, too
        from transformers import MobileViTConfig, MobileViTForImageClassification

        config = MobileViTConfig(image_size=PIXELS)
        config.num_labels = CLASSES
        config.hidden_dropout_prob = config.classifier_dropout_prob = 0.0
        self.model = MobileViTForImageClassification(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Gives logits (batch, classes) of images (batch, 3, height, width)."""
        return self.model(pixels).logits


OTHERS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # with the batch
    "efficientnet_b0": (efficientnet, 16),
    "densenet121": (densenet, 8),
    "mobilevit": (MobileViT, 16),
}
MODELS = ("mobilenetv2", "resnet50", "unet", *OTHERS)


@dataclass
class NetBench(Bench):
    """Holds a net of the suite, or another one, with its batch."""

    @cached_property
    def case(self) -> SuiteCase:
        """Model, images and loss."""
        if self.name not in OTHERS:
            return suite.load(self.name, self.size)
        make, batch = OTHERS[self.name]
        torch.manual_seed(0)
        model = make().train()
        return SuiteCase(
            self.name, model, (torch.randn(batch, 3, PIXELS, PIXELS),), class_loss, (torch.arange(batch) % CLASSES,)
        )

    def with_images(self, seed: int) -> NetBench:
        """Returns the same net on random images."""
        generator = torch.Generator().manual_seed(seed)
        return self.with_case(inputs=tuple(torch.randn(x.shape, generator=generator) for x in self.case.inputs))

    def with_case(self, **changes: Any) -> NetBench:
        """Returns a bench whose case differs in these fields."""
        other = NetBench(self.name, self.size)
        other.case = replace(self.case, **changes)
        return other

    def observe_in_channels_last(self) -> StepResult:
        """Returns what the eager step leaves behind where model and images are in channels_last."""
        model = copy.deepcopy(self.case.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = tuple(x.to(memory_format=torch.channels_last) for x in self.case.inputs)
        other = self.with_case(model=model, inputs=images)
        return other.observe(other.case.loss)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the nets and prints their table."""
    parser = argparse.ArgumentParser("python -m benchmarks.convnets", description=__doc__)
    parser.add_argument("--models", metavar="LIST", help=f"default: all of {','.join(MODELS)}")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="of the suite's nets")
    parser.add_argument("--pairs", type=int, default=31, help="steps of each in turn (default: 31)")
    add_record_files(parser)
    arguments = parser.parse_args(argv)
    models = names_of(arguments.models, MODELS, "model")

    def run() -> Iterator[Record]:
        for model in models:
            yield from measured(NetBench(model, arguments.size), arguments.pairs)

    records = records_of(arguments, run, lambda r: f"{r['model']} at {r['key']}: {r['ratio']:.3f}")
    console = wide_console()
    console.print(table_of_rows(TITLE, COLUMNS, rows(records)))
    console.print(checks_table(judge(records)))


def measured(bench: NetBench, pairs: int) -> Iterator[Record]:
    """Yields a record for each budget of a net."""
    peak_bytes = bench.eager.peak_bytes
    start = time.perf_counter()
    hybrid = bench.compile(peak_bytes)
    compile_s = time.perf_counter() - start
    reordered = bench.compile(peak_bytes, exact="reordered", compression="off")
    benches = (bench, *(bench.with_images(seed) for seed in range(1, BATCHES)))
    gradients = gradients_compared([differences(other, reordered) for other in benches])
    for share in (1.0, HALF.get(bench.name, 0.5)):
        at_budget(hybrid, int(share * peak_bytes))
        step, plan = bench.step_of(hybrid), hybrid.plan
        measured_bytes = bench.measure(step).peak_bytes
        wall, processor = both_ratios(bench.eager_step, step, pairs)
        yield {
            "model": bench.name,
            "part": "convnets",
            "key": share,
            "eager_peak_bytes": peak_bytes,
            "budget_bytes": plan.budget_bytes,
            "planned_bytes": plan.peak_bytes,
            "measured_bytes": measured_bytes,
            "exactness": str(plan.exactness),
            "pairs": pairs,
            "ratio": wall,
            "cpu_ratio": processor,
            "gradient_error": plan.gradient_error.value,
            **gradients,
            "compile_s": compile_s,
        }


def differences(bench: NetBench, reordered: nn.Module) -> tuple[float, float]:
    """Computes how far the gradient of tier "reordered", and that of eager in channels_last, lies from eager's."""
    expected = bench.observe(bench.case.loss).gradients
    ours = bench.observe(partial(bench.loss_of, reordered)).gradients
    theirs = bench.observe_in_channels_last().gradients
    return relative_difference(ours, expected), relative_difference(theirs, expected)


def gradients_compared(found: Sequence[tuple[float, float]]) -> Record:
    """Gathers means over batches, and the standard error of the mean of their ratios."""
    ours, theirs = zip(*found, strict=True)
    standard_error = statistics.stdev(a / b for a, b in found) / len(found) ** 0.5
    return {
        "reordered_difference": statistics.mean(ours),
        "channels_last_difference": statistics.mean(theirs),
        "standard_error": standard_error,
    }


def at_budget(hybrid: fxhybrid.HybridModule, budget_bytes: int) -> None:
    """Moves to a budget, or to the smallest that has a plan."""
    try:
        hybrid.set_budget(budget_bytes)
    except BudgetError as error:
        hybrid.set_budget(int(error.minimum_bytes * MARGIN))


def both_ratios(first: Step, second: Step, n_pairs: int) -> tuple[float, float]:
    """Computes medians of the second's wall and processor time over the first's, in pairs run in turn."""

    def clocks(step: Step) -> tuple[float, float]:
        start = time.perf_counter(), time.process_time()
        step()
        return time.perf_counter() - start[0], time.process_time() - start[1]

    first()
    second()
    wall, processor = [], []
    for i in range(n_pairs):
        order = (first, second) if i % 2 else (second, first)
        found = {step: clocks(step) for step in order}
        wall.append(found[second][0] / found[first][0])
        processor.append(found[second][1] / found[first][1])
    return statistics.median(wall), statistics.median(processor)


def rows(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """Yields a row for each net and budget."""
    for r in records:
        budget, planned = (f"{r[name] / r['eager_peak_bytes']:.2f}" for name in ("budget_bytes", "planned_bytes"))
        off = "as planned" if r["measured_bytes"] == r["planned_bytes"] else f"{r['measured_bytes']} bytes"
        times = f"{r['ratio']:.2f}", f"{r['cpu_ratio']:.2f}"
        gradients = f"{r['reordered_difference']:.1e}", f"{r['channels_last_difference']:.1e}"
        yield r["model"], budget, planned, off, *times, r["exactness"], *gradients


def judge(records: Sequence[Record]) -> list[Check]:
    """Checks times, peaks and gradients."""
    times = {
        f"{r['model']} at {r['key']}": r["ratio"] / LIMITS.get(r["model"], USUAL_LIMITS)[r["key"] < 1] for r in records
    }
    off = {f"{r['model']} at {r['key']}": abs(r["measured_bytes"] - r["planned_bytes"]) for r in records}
    ratios = {r["model"]: r["reordered_difference"] / r["channels_last_difference"] for r in records}
    gradients = {r["model"]: round(ratios[r["model"]] - 2 * r.get("standard_error", 0.0), 3) for r in records}
    return [
        check_of("time, of what is asked of the net", "at most 1", times, 1.0, "{:.3f}"),
        check_of("measured peak less the planned one, bytes", "0", off, 0, "{:.0f}"),
        check_of(
            'gradient of tier "reordered", of that of eager in channels_last, less two standard errors',
            "at most 1",
            gradients,
            1.0,
            "{:.3f}",
        ),
    ]


if __name__ == "__main__":
    main()
