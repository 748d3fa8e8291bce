"""Trains one small model for thousands of steps while its budget is switched every 50 steps.

The same training runs three times in lossless mode: unmodified, at one budget, and with budgets switched in turn, from
the smallest reachable peak up to save-all. Judged are the losses of all steps, the resident memory of the process over
the switched run after its first fifth, and the measured peak against the predicted one at each budget at the end.
Before memory is read, garbage is collected and what the heap keeps free handed back: both come and go in megabytes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from benchmarks.lib.checks import Check, checks_table
from benchmarks.lib.common import MARGIN, wide_console
from benchmarks.lib.results import Record, append_record
from fxhybrid.profiling.allocator import measure_step

MINUTES = 2
NEEDS = ""

EVERY, N_BUDGETS = 50, 5
BATCH, WIDTH, CLASSES = 64, 32, 10
READINGS, WARM_UP = 40, 0.2  # of the resident memory; share of the steps left out
GROWTH_BYTES = 2 * 2**20  # what the fitted line may rise over the judged steps: half a percent of such a process

Step = Callable[[Tensor, Tensor], Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs and judges."""
    parser = argparse.ArgumentParser("python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=EVERY, help="steps between two switches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the record to this JSON-lines file")
    arguments = parser.parse_args(argv)
    record = soak(arguments.steps, arguments.every)
    append_record(arguments.json, record)
    wide_console().print(checks_table(checks_of(record)))


def soak(n_steps: int, every: int) -> Record:
    """Trains three times and returns what was found."""
    eager = _Training()
    losses = eager.run(eager.plain_step, n_steps)
    fixed = _Training()
    at_one_budget = fixed.run(fixed.compile(), n_steps)
    switched = _Training()
    step = switched.compile()
    readings: list[tuple[int, int]] = []
    found = switched.run(step, n_steps, lambda i: _observe(i, n_steps, every, switched, readings))
    judged = np.array([reading for reading in readings if reading[0] >= WARM_UP * n_steps], dtype=float)
    slope = float(np.polyfit(judged[:, 0], judged[:, 1], 1)[0])
    return {
        "model": "convnet",
        "part": "soak",
        "key": every,
        "steps": n_steps,
        "switches": (n_steps - 1) // every,
        "same_as_eager": found == losses,
        "same_as_one_budget": found == at_one_budget,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "resident_bytes_after_warm_up": int(judged[0, 1]),
        "resident_bytes_at_end": int(judged[-1, 1]),
        "growth_bytes": slope * float(judged[-1, 0] - judged[0, 0]),
        "peaks": list(switched.peaks()),
    }


def checks_of(record: Record) -> Iterator[Check]:
    """Judges a record."""
    same = {"unmodified": record["same_as_eager"], "one budget": record["same_as_one_budget"]}
    differ = ", ".join(name for name, equal in same.items() if not equal)
    n_steps, growth = record["steps"], record["growth_bytes"]
    yield Check(f"losses of {n_steps} steps", "equal", f"differ from: {differ}" if differ else "equal", not differ)
    asked = f"at most {GROWTH_BYTES / 2**20:g} MiB"
    yield Check("growth of resident memory", asked, f"{growth / 2**20:.2f} MiB", growth <= GROWTH_BYTES)
    wrong = [f"{p['measured_bytes']} of {p['predicted_bytes']}" for p in record["peaks"] if not _is_exact(p)]
    found = ", ".join(wrong) or f"equal at {len(record['peaks'])} budgets"
    yield Check("measured peak at the end", "as predicted", found, not wrong)


def _is_exact(peak: dict[str, int]) -> bool:
    return bool(peak["measured_bytes"] == peak["predicted_bytes"] <= peak["budget_bytes"])


def _observe(i: int, n_steps: int, every: int, training: _Training, readings: list[tuple[int, int]]) -> None:
    """Switches the budget, or reads the resident memory, before a step."""
    if i % every == 0 and i:
        training.switch(i // every)
    if i % max(n_steps // READINGS, 1) == 0:
        readings.append((i, _resident_bytes()))


def _resident_bytes() -> int:
    """Returns the resident memory of this process, without garbage and what the heap of glibc keeps free."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return psutil.Process().memory_info().rss


class _Training:
    """A model with its optimizer, and batches that follow from the number of the step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.GELU(), nn.Dropout(0.1)]
        self.model = nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * WIDTH, CLASSES)).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.hybrid: fxhybrid.HybridModule | None = None
        self.budgets: list[int] = []

    def plain_step(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the unmodified loss."""
        return F.cross_entropy(self.model(x), y)

    def compile(self) -> Step:
        """Compiles at the save-all peak, notes the budgets to switch between, and returns the planned loss."""
        x, y = _batch(0)
        hybrid = fxhybrid.compile(
            self.model,
            budget=1.0,
            example_inputs=(x,),
            loss_fn=F.cross_entropy,
            loss_args=(y,),
            optimizer=self.optimizer,
            compression="lossless",
            solver="mps",
        )
        largest = hybrid.plan.budget_bytes
        try:
            hybrid.set_budget(1)
        except fxhybrid.BudgetError as error:
            smallest = int(error.minimum_bytes * MARGIN)
        self.budgets = [largest - (largest - smallest) * k // (N_BUDGETS - 1) for k in range(N_BUDGETS)]
        self.hybrid = hybrid
        return lambda x, y: hybrid(x, loss_args=(y,))

    def switch(self, k: int) -> None:
        """Moves to the ``k``-th budget, in turn."""
        assert self.hybrid is not None
        self.hybrid.set_budget(self.budgets[k % N_BUDGETS])

    def run(self, step: Step, n_steps: int, before: Callable[[int], None] = lambda _: None) -> list[float]:
        """Trains, and returns all losses."""
        losses = []
        torch.manual_seed(1)
        for i in range(n_steps):
            before(i)
            losses.append(self._train(step, *_batch(i)))
        gc.collect()
        return losses

    def _train(self, step: Step, x: Tensor, y: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = step(x, y)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def peaks(self) -> Iterator[dict[str, int]]:
        """Yields budget, predicted and measured peak of a step at each budget."""
        assert self.hybrid is not None
        hybrid, (x, y) = self.hybrid, _batch(0)
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        for budget_bytes in self.budgets:
            hybrid.set_budget(budget_bytes)

            def step() -> None:
                self.optimizer.zero_grad()
                hybrid(x, loss_args=(y,)).backward()

            measured = measure_step(step, modules=hybrid, tensors=[x, y, *state], repeats=0).peak_bytes
            yield {
                "budget_bytes": budget_bytes,
                "predicted_bytes": hybrid.plan.peak_bytes,
                "measured_bytes": measured,
            }


def _batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(BATCH, 3, 8, 8, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


if __name__ == "__main__":
    main()
