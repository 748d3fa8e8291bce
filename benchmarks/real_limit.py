"""Trains under an operating system limit that kills the unmodified run.

The same training runs three times in a child process: without a limit, to see how much data memory it takes;
then unmodified under ``RLIMIT_DATA`` of a share of that, which kills it; then compiled under the same limit,
compile phase included. Children start with ``MALLOC_MMAP_THRESHOLD_`` set, so that freed blocks go back to
the system and the process takes what its tensors take.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

MINUTES = 5
NEEDS = "Linux"

Result = dict[str, Any]
POLL_S = 0.002


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the three children and prints what became of them."""
    arguments = _parser().parse_args(argv)
    if arguments.child:
        _child(arguments)
        return
    free = _run_child(arguments, "eager", None, 0)
    if free["status"] != "finished":
        raise SystemExit(f"the run without a limit failed: {free['status']}")
    limit_bytes = int(arguments.share * free["data_peak_bytes"])
    budget_bytes = int(arguments.budget * free["step_peak_bytes"])
    results = [
        ("unmodified, no limit", None, free),
        ("unmodified", limit_bytes, _run_child(arguments, "eager", limit_bytes, 0)),
        ("fxhybrid", limit_bytes, _run_child(arguments, "compiled", limit_bytes, budget_bytes)),
    ]
    _print(arguments, results, budget_bytes)
    if results[1][2]["status"] == "finished" or results[2][2]["status"] != "finished":
        raise SystemExit("NOT shown: the unmodified run must fail and the compiled one must finish")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.real_limit", description=__doc__)
    parser.add_argument("--model", default="mobilenetv2", help="a suite model (default: %(default)s)")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--repeat", type=int, default=4, help="the suite's batch this many times over (default: 4)")
    parser.add_argument("--steps", type=int, default=5, help="training steps (default: 5)")
    parser.add_argument("--share", type=float, default=0.75, help="limit, of the data peak (default: 0.75)")
    parser.add_argument("--budget", type=float, default=0.45, help="budget, of the step's peak (default: 0.45)")
    parser.add_argument("--child", choices=("eager", "compiled"), help=argparse.SUPPRESS)
    parser.add_argument("--limit-bytes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--budget-bytes", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _run_child(arguments: argparse.Namespace, kind: str, limit_bytes: int | None, budget_bytes: int) -> Result:
    """Runs one child to its end; adds the peak of its data memory and its seconds."""
    from fxhybrid.profiling.system_memory import data_bytes  # a child sets its limit before it imports torch

    command = [sys.executable, "-m", "benchmarks.real_limit", "--child", kind]
    for name in ("model", "size", "repeat", "steps"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--budget-bytes", str(budget_bytes)]
    if limit_bytes is not None:
        command += ["--limit-bytes", str(limit_bytes)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    start, peak_bytes = time.perf_counter(), 0
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak_bytes = max(peak_bytes, data_bytes(process.pid))
        time.sleep(POLL_S)
    output, errors = process.communicate()
    lines = [line for line in output.splitlines() if line.startswith("{")]
    last = (errors.strip().splitlines() or [""])[-1]
    died: Result = {"status": f"died (exit code {process.returncode}): {last}"}
    result: Result = json.loads(lines[-1]) if lines else died
    return result | {"data_peak_bytes": peak_bytes, "seconds": time.perf_counter() - start}


def _child(arguments: argparse.Namespace) -> None:
    """Trains under the limit and prints one JSON line: how it ended."""
    if arguments.limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit_bytes, arguments.limit_bytes))
    try:
        result = _train(arguments)
    except (MemoryError, RuntimeError) as error:
        text = next((line for line in str(error).splitlines() if line.strip()), "")
        result = {"status": f"{type(error).__name__}: {text[:110]}"}
    print(json.dumps(result), flush=True)


def _train(arguments: argparse.Namespace) -> Result:
    import torch

    import fxhybrid
    from fxhybrid import suite

    case = suite.load(arguments.model, arguments.size)
    inputs = tuple(torch.cat([x] * arguments.repeat) for x in case.inputs)
    loss_args = tuple(torch.cat([x] * arguments.repeat) for x in case.loss_args)
    model = case.model
    if arguments.child == "compiled":
        model = fxhybrid.compile(
            model,
            budget=arguments.budget_bytes,
            example_inputs=inputs,
            loss_fn=case.loss_fn,
            loss_args=loss_args,
        )
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01)

    def step() -> float:
        optimizer.zero_grad()
        if arguments.child == "compiled":
            loss = model(*inputs, loss_args=loss_args)
        else:
            loss = case.loss_fn(model(*inputs), *loss_args)
        loss.backward()
        return float(loss.detach())

    losses = []
    for _ in range(arguments.steps):
        losses.append(step())
        optimizer.step()
    result: Result = {"status": "finished", "losses": losses}
    if not arguments.limit_bytes:
        held = (*inputs, *loss_args)
        result["step_peak_bytes"] = fxhybrid.measure_step(step, modules=case.model, tensors=held, repeats=0).peak_bytes
    return result


def _print(arguments: argparse.Namespace, results: Sequence[tuple[str, int | None, Result]], budget: int) -> None:
    from rich.table import Table

    from benchmarks.lib.common import wide_console
    from fxhybrid.units import format_bytes

    table = Table(
        title=f"{arguments.model}, {arguments.size} batch x {arguments.repeat}, {arguments.steps} steps",
        caption=f"budget given to fxhybrid.compile: {format_bytes(budget)}",
    )
    for name in ("run", "limit (RLIMIT_DATA)", "data peak", "seconds", "last loss", "end"):
        table.add_column(name)
    for name, limit_bytes, result in results:
        table.add_row(
            name,
            "none" if limit_bytes is None else format_bytes(limit_bytes),
            format_bytes(result["data_peak_bytes"]),
            f"{result['seconds']:.1f}",
            f"{result['losses'][-1]:.4f}" if "losses" in result else "",
            result["status"],
        )
    wide_console().print(table)


if __name__ == "__main__":
    main()
