"""Measures what many sequence lengths and batch sizes cost: captures, seconds, bits, budget and resident memory.

Each model takes one training step at each size, the largest first and the others in random order, within a share of the
first call's save-all peak. Seconds are of the processor, on one thread, beside those of ``torch.compile`` with its
default handling of dynamic shapes: both several times in turn, each time in a fresh process, and medians are compared.
Once, each size is compared with eager afterwards, and its peak is measured. Judges the checks at the end.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

import fxhybrid
from benchmarks.lib.checks import Check, check_of, checks_table
from benchmarks.lib.common import names_of, wide_console
from benchmarks.lib.results import Record, append_record, read_records
from fxhybrid import suite
from fxhybrid.capture.step import StepCall
from fxhybrid.module import HybridModule
from fxhybrid.profiling.allocator import measure_step
from fxhybrid.suite.case import class_loss
from fxhybrid.suite.small_models import DigitsNet, seeded

MINUTES = 12
NEEDS = "transformers"

MODELS = ("bert", "gpt2", "digits")
BUDGET = 0.8  # of the save-all peak of the largest size
LENGTHS, BATCHES = range(9, 49), range(17, 57)  # oneDNN takes other convolutions for fewer than 16 samples
MANY = 200  # sizes over which resident memory is watched
SETTLED = 80  # sizes after which it is to stay where it is
ROUNDS = 5  # of ours and torch's in turn
MOST_CAPTURES, MOST_SECONDS, MOST_GROWTH_MIB = 3, 1.1, 32
PARTS = {  # functions in which the seconds of a new size are counted
    "sizes evaluated": ("size_template.py", "figures"),
    "codecs offered": ("size_template.py", "offered"),
    "planning problem": ("size_template.py", "problem"),
    "of that workspaces measured": ("op_profiler.py", "measure_alloc_peaks"),
    "plans simulated": ("extend_plans.py", "ensure"),
    "graphs taken or rewritten": ("pipeline.py", "build_graphs"),
    "graphs of one size alone": ("concretize.py", "at"),
}

Tensors = tuple[Tensor, ...]
Batch = tuple[Tensors, Tensors]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs each part of each model in a process of its own, and judges the records."""
    parser = argparse.ArgumentParser("python -m benchmarks.lengths", description=__doc__)
    parser.add_argument("--models", metavar="LIST", help=f"default: {','.join(MODELS)}")
    parser.add_argument("--part", choices=tuple(RUNS), help="run one part in this process")
    parser.add_argument("--round", type=int, default=0, help="number of a part that is run several times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="judge the records of a file; runs nothing")
    arguments = parser.parse_args(argv)
    models = names_of(arguments.models, MODELS, "model")
    if arguments.part:
        torch.set_num_threads(1)
        for model in models:
            record = {"model": model, "part": arguments.part, "key": arguments.round} | RUNS[arguments.part](model)
            append_record(arguments.json, record)
            print(record, flush=True)
        return
    path = arguments.summary or arguments.json
    if arguments.summary is None:
        for model in models:
            timed = ("ours", "torch", *("ours, timed alone", "torch") * (ROUNDS - 1))
            for i, part in enumerate((*timed, "memory")):
                chosen = ["--models", model, "--part", part, "--round", str(i // 2)]
                where = ["--json", str(path)] if path else []
                subprocess.run([sys.executable, "-m", "benchmarks.lengths", *chosen, *where], check=True)
    if path:
        wide_console().print(checks_table(checks(read_records(path))))


def load(name: str) -> suite.SuiteCase:
    """Builds a small transformer of the suite, or a convolutional net over images of 8 x 8."""
    if name != "digits":
        return suite.load(name, "small")
    images, labels = torch.randn(max(BATCHES), 1, 8, 8), torch.arange(max(BATCHES)) % 10
    return suite.SuiteCase(name, seeded(DigitsNet, 0).train(), (images,), class_loss, (labels,))


def batch(case: suite.SuiteCase, size: int, samples: int | None = None) -> Batch:
    """Makes a batch of a length, or for images of as many samples; the same for the same size."""
    generator = torch.Generator().manual_seed(size)
    (x,), (y,) = case.inputs, case.loss_args
    if x.is_floating_point():
        labels = torch.randint(0, int(y.max()) + 1, (size,), generator=generator)
        return (torch.randn(size, *x.shape[1:], generator=generator),), (labels,)
    n = samples or len(x)
    ids = torch.randint(0, int(x.max()) + 1, (n, size), generator=generator)
    return (ids,), (ids.clone() if y.dim() > 1 else y[:1].expand(n).clone(),)


def sizes_of(case: suite.SuiteCase) -> list[int]:
    """Lists the sizes: the largest first, the others in random order."""
    rest = list(BATCHES if case.inputs[0].is_floating_point() else LENGTHS)
    random.Random(0).shuffle(rest)
    return [max(rest), *(size for size in rest if size != max(rest))]


def compiled(case: suite.SuiteCase) -> HybridModule:
    """Compiles the model within the budget; gradients have eager's bits."""
    return fxhybrid.compile(case.model, budget=BUDGET, loss_fn=case.loss_fn, compression="lossless")


def cpu_seconds(run: Callable[[], object]) -> float:
    """Returns the processor's seconds of one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def run_ours(name: str) -> Record:
    """Steps through all sizes, timed; then compares each with eager and measures its peak."""
    case = load(name)
    hybrid, sizes = compiled(case), sizes_of(case)
    seconds = _timed(case, partial(_loss, hybrid))
    cache = hybrid._fxhybrid_session.cache
    captures = len(cache.captured) + len(cache.families)
    found = [_check_size(case, hybrid, size) for size in sizes]
    return {
        "sizes": len(sizes),
        "captures": captures,
        "seconds": sum(seconds),
        "first_s": seconds[0],
        "second_s": seconds[1],
        "each_further_s": sum(seconds[2:]) / len(seconds[2:]),
        "worst_peak_share": max(peak for peak, _ in found),
        "not_bit_equal": sum(not equal for _, equal in found),
        "parts_ms": _parts(case, hybrid),
    }


def run_ours_timed(name: str) -> Record:
    """Steps through all sizes, timed."""
    case = load(name)
    return {"seconds": sum(_timed(case, partial(_loss, compiled(case))))}


def _loss(hybrid: HybridModule, inputs: Tensors, loss_args: Tensors) -> Tensor:
    loss: Tensor = hybrid(*inputs, loss_args=loss_args)
    return loss


def _timed(case: suite.SuiteCase, loss_of: Callable[[Tensors, Tensors], Tensor]) -> list[float]:
    """Returns the seconds of a training step at each size in turn."""

    def step(size: int) -> None:
        loss_of(*batch(case, size)).backward()
        case.model.zero_grad(set_to_none=True)

    return [cpu_seconds(partial(step, size)) for size in sizes_of(case)]


def _check_size(case: suite.SuiteCase, hybrid: HybridModule, size: int) -> tuple[float, bool]:
    """Returns the measured peak over the budget, and whether loss and gradients have eager's bits."""
    inputs, loss_args = batch(case, size)
    state = {name: value.clone() for name, value in case.model.state_dict().items()}

    def run(loss: Callable[[], Tensor]) -> list[Tensor | None]:
        case.model.zero_grad(set_to_none=True)
        case.model.load_state_dict(state)
        torch.manual_seed(size)
        value = loss()
        value.backward()
        return [value.detach(), *(p.grad for p in case.model.parameters())]

    mine = run(lambda: hybrid(*inputs, loss_args=loss_args))
    theirs = run(lambda: case.loss_fn(case.model(*inputs), *loss_args))
    pairs = zip(mine, theirs, strict=True)
    equal = all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def step() -> None:
        case.model.zero_grad(set_to_none=True)
        hybrid(*inputs, loss_args=loss_args).backward()

    del mine, theirs, pairs
    peak = measure_step(step, modules=case.model, tensors=(inputs, loss_args), repeats=0).peak_bytes
    case.model.zero_grad(set_to_none=True)
    return peak / hybrid.plan.budget_bytes, equal


def _parts(case: suite.SuiteCase, hybrid: HybridModule) -> Record:
    """Returns the milliseconds of a new size by part, under a profiler, which makes all of them slower."""
    largest, n = max(sizes_of(case)), 5
    profiler = cProfile.Profile(time.process_time)
    for size in range(largest + 1, largest + 1 + n) if case.inputs[0].is_floating_point() else range(3, 3 + n):
        inputs, loss_args = batch(case, size)
        profiler.runcall(hybrid._fxhybrid_session.find, StepCall(inputs, {}, loss_args))
    rows = pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    total = {(Path(file).name, name): row[3] for (file, _, name), row in rows}
    parts = {part: total.get(place, 0.0) for part, place in PARTS.items()}
    return {part: round(s / n * 1e3, 1) for part, s in {"all": total["session.py", "find"], **parts}.items()}


def run_torch(name: str) -> Record:
    """Steps through all sizes with ``torch.compile``, and with the model as it is."""
    case = load(name)
    model = torch.compile(case.model, backend="aot_eager")

    def loss(model: Callable[..., object], inputs: Tensors, loss_args: Tensors) -> Tensor:
        return case.loss_fn(model(*inputs), *loss_args)

    return {
        "seconds": sum(_timed(case, partial(loss, model))),
        "eager_s": sum(_timed(case, partial(loss, case.model))),
    }


def run_memory(name: str) -> Record:
    """Steps through many sizes of small batches, and reads resident memory on the way."""
    case = load(name)
    hybrid, process = compiled(case), psutil.Process()
    image = case.inputs[0].is_floating_point()
    sizes = [(17 + i, None) for i in range(MANY, 0, -1)] if image else list(_pairs())
    resident: list[int] = []
    for size, samples in sizes:
        inputs, loss_args = batch(case, size, samples)
        hybrid(*inputs, loss_args=loss_args).backward()
        case.model.zero_grad(set_to_none=True)
        gc.collect()
        resident.append(process.memory_info().rss)
    return {
        "sizes": len(sizes),
        "resident_mib": {str(i): resident[i - 1] >> 20 for i in (1, 2, 20, 40, SETTLED, 120, 160, MANY)},
        "growth_mib": (max(resident[SETTLED:]) - resident[SETTLED - 1]) / 2**20,
        "held_mib": hybrid.report().held_bytes / 2**20,
    }


def _pairs() -> Iterator[tuple[int, int]]:
    """Yields as many pairs of length and samples, the largest first."""
    return ((length, samples) for length in range(48, 8, -1) for samples in (8, 7, 6, 5, 4))


RUNS: dict[str, Callable[[str], Record]] = {
    "ours": run_ours,
    "ours, timed alone": run_ours_timed,
    "torch": run_torch,
    "memory": run_memory,
}


def checks(records: Sequence[Record]) -> list[Check]:
    """Judges the records."""
    parts: dict[str, dict[str, Record]] = {part: {} for part in RUNS}
    for record in records:
        parts[record["part"]][record["model"]] = record
    ours, memory = parts["ours"], parts["memory"]

    def seconds(model: str, whose: str) -> float:
        return statistics.median(r["seconds"] for r in records if r["model"] == model and r["part"].startswith(whose))

    ratios = {model: seconds(model, "ours") / seconds(model, "torch") for model in ours if model in parts["torch"]}
    captures, shares, unequal = (
        {model: float(record[field]) for model, record in ours.items()}
        for field in ("captures", "worst_peak_share", "not_bit_equal")
    )
    growth = {model: record["growth_mib"] for model, record in memory.items()}
    rest = f"growth after {SETTLED} of {MANY} sizes"
    return [
        check_of("captures", f"at most {MOST_CAPTURES} for 40 sizes", captures, MOST_CAPTURES, "{:.0f}"),
        check_of("measured peak over budget", "at most 1", shares, 1.0, "{:.4f}"),
        check_of("sizes without eager's bits", "none", unequal, 0, "{:.0f}"),
        check_of("resident memory", f"{rest}: at most {MOST_GROWTH_MIB} MiB", growth, MOST_GROWTH_MIB, "{:.1f} MiB"),
        check_of("seconds over torch.compile's", f"at most {MOST_SECONDS}", ratios, MOST_SECONDS, "{:.2f}"),
    ]


if __name__ == "__main__":
    main()
