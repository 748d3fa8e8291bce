"""Measures whole iterations: forward, backward and the optimizer's step, or several backward passes before it.

Each optimizer trains a model that is mostly parameters and one that is mostly activations at the smallest budget; both
add up the gradients of several calls within less than eager's peak; and ResNet-50 is updated in the backward pass.
Every peak is the allocator's. Judges the checks at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

import fxhybrid
from benchmarks.lib.checks import Check, check_of, checks_table
from benchmarks.lib.common import wide_console
from benchmarks.lib.results import Record, append_record, read_records
from fxhybrid import suite
from fxhybrid.suite.case import class_loss

MINUTES = 20
NEEDS = ""

CALLS = 4  # backward passes before one step of the optimizer
SHARE = 0.95  # of eager's peak, in which they are to fit
MOST = 0.40  # of eager's peak that ResNet-50 may take with its updates in the backward pass
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[], torch.Tensor]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-4),
    "AdamW, for-loop": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-4),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-4),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the parts, and judges the records."""
    parser = argparse.ArgumentParser("python -m benchmarks.iterations", description=__doc__)
    parser.add_argument("--part", choices=tuple(PARTS), help="run this one only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="judge the records of a file; runs nothing")
    arguments = parser.parse_args(argv)
    records: list[Record] = []
    if arguments.summary is None:
        for part in [arguments.part] if arguments.part else PARTS:
            for found in PARTS[part]():
                records.append({"part": part, **found})
                append_record(arguments.json, records[-1])
                print(records[-1], flush=True)
    path = arguments.summary or arguments.json
    wide_console().print(checks_table(checks(read_records(path) if path else records)))


def mostly_parameters() -> suite.SuiteCase:
    """Builds a net of wide layers, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(8)), nn.Linear(512, 10))
    return suite.SuiteCase("parameters", model, (torch.randn(256, 512),), class_loss, (torch.arange(256) % 10,))


def mostly_activations() -> suite.SuiteCase:
    """Builds a small U-Net."""
    return suite.load("unet", "small")


CASES = {"parameters": mostly_parameters, "activations": mostly_activations}


def loss_of(case: suite.SuiteCase, model: nn.Module) -> torch.Tensor:
    """Computes the loss by a compiled model."""
    return model(*case.inputs, loss_args=case.loss_args)


def measured(
    case: suite.SuiteCase, optimizer: torch.optim.Optimizer, losses: Sequence[Callable[[], torch.Tensor]]
) -> int:
    """Measures the peak of an iteration with a backward pass for each loss."""

    def iteration() -> None:
        optimizer.zero_grad()
        for loss in losses:
            loss().backward()
        optimizer.step()

    found = fxhybrid.measure_step(iteration, modules=case.model, tensors=case.tensors, optimizer=optimizer, repeats=0)
    optimizer.zero_grad()
    return found.peak_bytes


def compared(case: suite.SuiteCase, make: Make, budget: float | str, n_calls: int = 1, **options: object) -> Record:
    """Compares the peak of an iteration with the budget, and with eager's peak.

    Args:
        case: model and batch.
        make: makes the optimizer.
        budget: as ``compile`` takes it; a number is a share of eager's peak.
        n_calls: backward passes in each iteration.
        options: further ones of ``compile``.
    """
    optimizer = make(case.model.parameters())
    eager = measured(case, optimizer, [case.loss] * n_calls)
    hybrid = fxhybrid.compile(
        case.model,
        budget=budget if isinstance(budget, str) else int(budget * eager),
        example_inputs=case.inputs,
        loss_fn=case.loss_fn,
        loss_args=case.loss_args,
        optimizer=optimizer,
        **options,  # type: ignore[arg-type]
    )
    peak = measured(case, optimizer, [lambda: loss_of(case, hybrid)] * n_calls)
    return {
        "eager_bytes": eager,
        "budget_bytes": hybrid.plan.budget_bytes,
        "peak_bytes": peak,
        "gradient_error": hybrid.plan.gradient_error.value,
    }


def run_optimizers() -> Iterator[Record]:
    """Trains both models by each optimizer at the smallest budget."""
    for model, load in CASES.items():
        for name, make in OPTIMIZERS.items():
            yield {"model": model, "task": name} | compared(load(), make, "smallest", compression="lossless")


def run_accumulation() -> Iterator[Record]:
    """Adds up gradients of several calls within less than eager takes."""
    for model, load in CASES.items():
        found = compared(load(), OPTIMIZERS["SGD momentum"], SHARE, CALLS, compression="lossless", accumulate=True)
        yield {"model": model, "task": "SGD momentum"} | found


def run_step_in_backward() -> Iterator[Record]:
    """Trains ResNet-50 at the smallest budget, updated after and in the backward pass."""
    for within in (True, False):
        found = compared(suite.load("resnet50"), OPTIMIZERS["SGD"], "smallest", step_in_backward=within)
        yield {"model": "resnet50", "task": "in the backward pass" if within else "after it"} | found


PARTS: dict[str, Callable[[], Iterator[Record]]] = {
    "optimizers": run_optimizers,
    "accumulation": run_accumulation,
    "updates": run_step_in_backward,
}


def checks(records: Sequence[Record]) -> list[Check]:
    """Judges the records."""
    by_part: dict[str, dict[str, Record]] = {part: {} for part in PARTS}
    for record in records:
        by_part[record["part"]][f"{record['model']}, {record['task']}"] = record

    def over(part: str, of: str) -> dict[str, float]:
        return {name: record["peak_bytes"] / record[of] for name, record in by_part[part].items()}

    stepped, added = over("optimizers", "budget_bytes"), over("accumulation", "budget_bytes")
    beside_eager = over("accumulation", "eager_bytes")
    within = {name: share for name, share in over("updates", "eager_bytes").items() if "in the" in name}
    return [
        check_of("peak with the optimizer's step over the budget", "at most 1", stepped, 1.0, "{:.4f}"),
        check_of(f"peak of {CALLS} calls over the budget", "at most 1", added, 1.0, "{:.4f}"),
        check_of("the same over eager's", f"at most {SHARE}", beside_eager, SHARE, "{:.3f}"),
        check_of("ResNet-50 updated in the backward pass, over eager", f"at most {MOST}", within, MOST, "{:.3f}"),
    ]


if __name__ == "__main__":
    main()
