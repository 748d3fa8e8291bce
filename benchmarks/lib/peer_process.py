"""A way to train in a process of its own, which runs one step whenever it is asked to."""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.common import Bench, Step
from benchmarks.lib.peer_methods import METHODS, Loss, switch_dropout_off
from benchmarks.lib.results import Record
from fxhybrid import suite
from fxhybrid.accuracy.step_result import relative_difference


@dataclass(frozen=True)
class Case:
    """Names a way to train a model: ``method`` of ``METHODS`` at a setting."""

    model: str
    size: suite.Size
    method: str
    setting: str = ""

    @property
    def key(self) -> str:
        """The way to train, in words."""
        return f"{self.method} {self.setting}".strip()


class Peer:
    """Holds the process of one case, which is idle between steps."""

    def __init__(self, case: Case, cache: str) -> None:
        """Starts the process and waits until it has measured peak, gradient error and seconds of the first step.

        Args:
            case: the way to train.
            cache: a folder for what compilers keep; where it is empty, the first step compiles all.
        """
        context = mp.get_context("spawn")
        self.case = case
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(case, torch.get_num_threads(), cache, there), daemon=True)
        self._process.start()
        there.close()
        self.found: Record = self._received()

    def step(self) -> tuple[float, float]:
        """Runs one step; returns its seconds, by the clock and of the processor."""
        self._connection.send(True)
        seconds, cpu_s = self._received()["seconds"]
        return seconds, cpu_s

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()

    def _received(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            return {"error": f"its process ended with code {self._process.exitcode}"}


def _serve(case: Case, threads: int, cache: str, connection: Connection) -> None:
    """Measures a case once, then runs a step for each message."""
    torch.set_num_threads(threads)
    os.environ |= {"XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, case.key.replace(" ", "-"))}
    try:
        bench, method = Bench(case.model, case.size), METHODS[case.method]
        if method.without_dropout:
            switch_dropout_off(bench.case.model)
        found, step = _measured(bench, method.prepare, case.setting)
        connection.send(found)
    except Exception as error:  # noqa: BLE001  a way that does not work on a model is a result, too
        connection.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        return
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        connection.send({"seconds": (time.perf_counter() - start, time.process_time() - cpu_start)})


def _measured(bench: Bench, prepare: Callable[[Bench, str], Loss], setting: str) -> tuple[Record, Step]:
    """Measures peak, gradient error against eager and seconds until the first step is done."""
    expected = gradients(bench, bench.eager_step)
    start = time.perf_counter()
    loss = prepare(bench, setting)

    def step() -> None:
        bench.step_with(loss)

    found = gradients(bench, step)
    compile_s = time.perf_counter() - start
    error = relative_difference(found, expected)
    del found, expected
    return {"peak_bytes": bench.measure(step).peak_bytes, "gradient_error": error, "compile_s": compile_s}, step


def gradients(bench: Bench, step: Step) -> dict[str, Tensor | None]:
    """Returns all parameter gradients of one step at a fixed seed; buffers are put back."""
    buffers = [(b, b.clone()) for b in bench.case.model.buffers()]
    torch.manual_seed(0)
    step()
    found = {name: p.grad for name, p in bench.case.model.named_parameters()}
    bench.zero_grad()
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return found
