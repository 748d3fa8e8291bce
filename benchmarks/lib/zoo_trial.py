"""Trains one architecture of the zoo in plain eager mode and through fxhybrid, and compares."""

from __future__ import annotations

import contextlib
import random
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import fxhybrid
from benchmarks.lib.results import Record
from benchmarks.lib.zoo_batches import Batch, make_batch
from benchmarks.lib.zoo_configs import build_model
from benchmarks.lib.zoo_list import ARCHITECTURES
from fxhybrid.accuracy.step_result import relative_difference
from fxhybrid.accuracy.verifier import told_that_it_is_compiled
from fxhybrid.capture.python_state import copied

WORKS, REFUSED, BREAK = "works", "refused", "graph break"
WRONG, OVER, CRASH = "WRONG", "OVER", "CRASH"
FAULTS = (WRONG, OVER, CRASH)
LEARNING_RATE = 1e-3
MAX_GRAD_ERROR = 0.1
MOST_RAISES = 8  # of a budget to what an error names
ROUNDING = (
    1e-5  # relative difference of gradients; of which two steps of eager differ, or those of another order of sums
)
BREAKS = (  # what Dynamo needs several graphs for
    "cannot be traced into one graph",
    "depends on values",
    "between the graphs of the step",
)

Gradients = dict[str, Tensor | None]


@dataclass(frozen=True)
class Training:
    """Holds what two steps of SGD leave behind.

    Attributes:
        gradients: of each step, by parameter name; None where none arrived.
        state: parameters and buffers at the end.
    """

    gradients: list[Gradients]
    state: Gradients

    def same_bits(self, other: Training) -> bool:
        """Says whether gradients and state are bit-equal, and gradients missing in the same places."""
        pairs = zip((*self.gradients, self.state), (*other.gradients, other.state), strict=True)
        return all(_same(a[name], b[name]) for a, b in pairs for name in b)

    def errors(self, expected: Training) -> list[float]:
        """Computes the relative error of the whole gradient in each step."""
        pairs = zip(self.gradients, expected.gradients, strict=True)
        return [relative_difference(found, reference) for found, reference in pairs]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


class Trainee:
    """Runs training steps of one form of a model, plain or compiled."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model = model
        self.batch = batch

    def loss(self) -> Tensor:
        """Computes the loss of the batch."""
        args, kwargs, loss_args = self.batch.args, self.batch.kwargs, self.batch.loss_args
        if self.batch.loss_fn is None:
            loss: Tensor = self.model(*args, **kwargs).loss
            return loss
        if isinstance(self.model, fxhybrid.HybridModule):
            return self.model(*args, loss_args=loss_args, **kwargs)
        return self.batch.loss_fn(self.model(*args, **kwargs), *loss_args)

    def step(self) -> None:
        """Runs forward and backward pass with fresh gradients."""
        self.model.zero_grad(set_to_none=True)
        self.loss().backward()

    def train(self) -> Training:
        """Runs two steps of SGD, each at a seed of its own."""
        gradients = []
        for seed in range(2):
            with seeded(seed):
                self.step()
            named = list(self.model.named_parameters())
            gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in named})
            with torch.no_grad():
                for _, p in named:
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=LEARNING_RATE)
        return Training(gradients, {name: t.detach().clone() for name, t in self.model.state_dict().items()})

    def peak_bytes(self) -> int:
        """Measures the largest number of bytes that live at a time in a step."""
        inputs = (self.batch.args, self.batch.kwargs, self.batch.loss_args)
        return fxhybrid.measure_step(self.step, modules=self.model, tensors=inputs, repeats=0).peak_bytes


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Starts all generators that models draw from at a seed; ``torch.seed()``, which draws one, gives that."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the generator that models draw from
    with mock.patch("torch.seed", return_value=seed):
        yield


def record_of(name: str) -> Record:
    """Tries one architecture: unmodified, lossless at budget 1.0, and at the smallest budget."""
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    architecture = ARCHITECTURES[name]
    model = build_model(architecture)
    batch = make_batch(architecture, model)
    Trainee(model, batch).loss()  # transformers sets hooks and its kind of problem at the first call of a model
    record: Record = {"model": name, "part": "train", "family": architecture.family, "kind": architecture.kind}
    record |= unmodified(model, batch)
    for part, trial in PARTS.items():
        record[part] = attempt(trial, model, batch)
        torch.compiler.reset()
        if record[part]["verdict"] != WORKS:
            break
    last = record["smallest" if "smallest" in record else "lossless"]
    return record | {"verdict": last["verdict"], "seconds": round(time.perf_counter() - start_s, 1)}


def unmodified(model: nn.Module, batch: Batch) -> Record:
    """Measures peak and seconds of the unmodified model."""
    plain = Trainee(copied(model), batch)
    peak_bytes = plain.peak_bytes()
    start_s = time.perf_counter()
    plain.step()
    n_parameters = sum(p.numel() for p in model.parameters())
    return {"eager_s": time.perf_counter() - start_s, "eager_peak_bytes": peak_bytes, "n_parameters": n_parameters}


def attempt(trial: Callable[[nn.Module, Batch], Record], model: nn.Module, batch: Batch) -> Record:
    """Runs one trial; what it raises becomes its verdict."""
    try:
        return trial(model, batch)
    except fxhybrid.CaptureError as error:
        broken = any(text in str(error) for text in BREAKS)
        return {"verdict": BREAK if broken else REFUSED, **_said(error)}
    except fxhybrid.BudgetError as error:
        return {"verdict": OVER, **_said(error)}  # no plan within the budget that an earlier error named
    except fxhybrid.FxHybridError as error:
        return {"verdict": REFUSED, **_said(error)}
    except Exception as error:  # noqa: BLE001  a foreign error of any class is what is looked for
        return {"verdict": CRASH, **_said(error), "trace": traceback.format_exc()[-3000:]}


def _said(error: Exception) -> Record:
    return {"error": type(error).__name__, "message": str(error)}


def lossless(model: nn.Module, batch: Batch) -> Record:
    """Trains with all the memory that the unmodified step takes: bit-equal gradients where eager repeats itself.

    Some models ask ``torch.compiler.is_compiling()`` and take another path then; a trace follows that one, which eager
    can be made to take as well. Where several graphs read one parameter, sums are taken in another order than eager's.
    """
    expected, again = (Trainee(copied(model), batch).train() for _ in range(2))
    trainee = compiled(model, batch, compression="lossless")
    found = trainee.train()
    equal, repeats, error = found.same_bits(expected), again.same_bits(expected), max(found.errors(expected))
    record = {"bit_equal": equal, "eager_repeats": repeats, "gradient_error": error}
    is_one_graph = n_graphs(trainee) == 1
    if repeats and not equal and error <= ROUNDING and is_one_graph:
        with told_that_it_is_compiled():
            other_path = Trainee(copied(model), batch).train()
        record["bit_equal_when_compiling"] = found.same_bits(other_path)
    close = error <= ROUNDING and not (repeats and is_one_graph and not record.get("bit_equal_when_compiling"))
    return record | _verdict(trainee, right=equal or close)


def smallest(model: nn.Module, batch: Batch) -> Record:
    """Trains at the smallest budget for which there is a plan, with lossy codecs.

    A step that takes another path through several graphs than the example may need more: then the budget is raised to
    what the error names, and training begins again.
    """
    expected = Trainee(copied(model), batch).train()
    trainee = compiled(model, batch, max_grad_error=MAX_GRAD_ERROR)
    hybrid: Any = trainee.model
    before = {name: t.clone() for name, t in hybrid.state_dict().items()}
    raised = -1  # from the first budget on
    training, budget = None, 1
    while training is None:
        hybrid.load_state_dict(before)
        try:
            hybrid.set_budget(budget)
            training = trainee.train()
        except fxhybrid.BudgetError as error:
            raised, budget = raised + 1, error.minimum_bytes
            if raised > MOST_RAISES:
                raise
    first, later = training.errors(expected)
    found = {"gradient_error": first, "later_error": later, "raised": raised}
    return found | _verdict(trainee, right=first <= MAX_GRAD_ERROR)


def compiled(model: nn.Module, batch: Batch, **options: Any) -> Trainee:
    """Compiles a copy of the model at the peak of its save-all step."""
    hybrid = fxhybrid.compile(
        copied(model),
        budget=1.0,
        example_inputs=batch.kwargs or batch.args,
        loss_fn=batch.loss_fn,
        loss_args=batch.loss_args,
        solver="mps",  # plans within the seconds that an architecture may take
        **options,
    )
    return Trainee(hybrid, batch)


def _verdict(trainee: Trainee, *, right: bool) -> Record:
    hybrid: Any = trainee.model
    budget_bytes, peak_bytes = hybrid.plan.budget_bytes, trainee.peak_bytes()
    verdict = WRONG if not right else OVER if peak_bytes > budget_bytes else WORKS
    return {"verdict": verdict, "peak_bytes": peak_bytes, "budget_bytes": budget_bytes, "graphs": n_graphs(trainee)}


def n_graphs(trainee: Trainee) -> int:
    """Returns how many graphs a compiled model's step takes."""
    hybrid: Any = trainee.model
    return len(hybrid.report().parts) or 1


PARTS: dict[str, Callable[[nn.Module, Batch], Record]] = {"lossless": lossless, "smallest": smallest}
