"""Measures what a second start costs: the same step compiled in two fresh processes, with one folder of what is kept.

Seconds are of the processor, all threads, in ``fxhybrid.compile`` alone, with everything imported; what the first
process keeps on disk is all that the second one has of it. Both must have the same plan.

    python -m benchmarks.second_start --models bert,mobilenetv2,convnext --json FILE
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import fxhybrid
from benchmarks.lib.checks import Check, check_of, checks_table
from benchmarks.lib.common import names_of, wide_console
from benchmarks.lib.results import Record, append_record, read_records
from fxhybrid import suite
from fxhybrid.optional_imports import require
from fxhybrid.suite.case import SuiteCase, logits_loss

MINUTES = 8
NEEDS = "transformers"

MODELS = ("bert", "mobilenetv2", "convnext")
BUDGET = 0.7  # of the save-all peak
MOST_SHARE = 0.25  # of the first start's seconds
COLUMNS = ("model", "first start, s", "second start, s", "share", "same plan")
STAGE = re.compile(r"(.+): ([\d.]+) s")


def main(argv: Sequence[str] | None = None) -> None:
    """Starts each model twice."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.second_start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", metavar="LIST", help=f"default: {','.join(MODELS)}")
    parser.add_argument("--start", choices=MODELS, help="compile one model in this process, and print a record")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="judge the records of a file; runs nothing")
    arguments = parser.parse_args(argv)
    if arguments.start:
        print(json.dumps(start(load(arguments.start))))
        return
    if arguments.summary is None:
        for model in names_of(arguments.models, MODELS, "model"):
            record = {"model": model, "part": "second start", **both_starts(model)}
            append_record(arguments.json, record)
            print(record, flush=True)
    path = arguments.summary or arguments.json
    if path:
        wide_console().print(checks_table(checks(read_records(path))))


def load(name: str) -> SuiteCase:
    """Builds a model of the suite, or a ConvNeXt of 28 million parameters."""
    if name != "convnext":
        return suite.load(name)
    transformers = require("transformers", "the ConvNeXt")
    torch.manual_seed(0)
    model = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(num_labels=100)).train()
    return SuiteCase(name, model, (torch.randn(8, 3, 96, 96),), logits_loss, (torch.arange(8),))


def start(case: SuiteCase) -> Record:
    """Compiles a model; returns seconds in all and by stage, and the plan."""
    stages = _Stages()
    logger = logging.getLogger("fxhybrid")
    logger.setLevel(logging.INFO)
    logger.addHandler(stages)
    before = time.process_time()
    hybrid = fxhybrid.compile(
        case.model, budget=BUDGET, example_inputs=case.inputs, loss_fn=case.loss_fn, loss_args=case.loss_args
    )
    seconds = time.process_time() - before
    actions = {name: str(action) for name, action in sorted(hybrid.plan.actions.items())}
    return {"seconds": seconds, "stages_s": stages.seconds, "actions": actions, "peak_bytes": hybrid.plan.peak_bytes}


class _Stages(logging.Handler):
    """Collects the wall clock's seconds of each stage of planning."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a stage's line."""
        found = STAGE.fullmatch(record.getMessage())
        if found:
            self.seconds[found[1]] = self.seconds.get(found[1], 0.0) + float(found[2])


def both_starts(model: str) -> Record:
    """Compiles a model in two processes, the second of which finds what the first one kept."""
    command = [sys.executable, "-m", "benchmarks.second_start", "--start", model]
    found = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            variables = os.environ | {"XDG_CACHE_HOME": cache}
            run = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
            if run.returncode:
                sys.exit(run.stderr)
            found.append(json.loads(run.stdout.splitlines()[-1]))
    first, second = found
    return {
        "first_s": first["seconds"],
        "second_s": second["seconds"],
        "first_stages_s": first["stages_s"],
        "second_stages_s": second["stages_s"],
        "same_plan": (first["actions"], first["peak_bytes"]) == (second["actions"], second["peak_bytes"]),
    }


def checks(records: Sequence[Record]) -> list[Check]:
    """Judges the records."""
    shares = {record["model"]: record["second_s"] / record["first_s"] for record in records}
    other = {record["model"]: float(not record["same_plan"]) for record in records}
    asked = f"at most {MOST_SHARE} of the first start's seconds"
    return [
        check_of("second start", asked, shares, MOST_SHARE, "{:.3f}"),
        check_of("other plans at the second start", "none", other, 0, "{:.0f}"),
    ]


def rows(records: Sequence[Record]) -> Iterable[tuple[str, ...]]:
    """Yields a row of the documents' table for each model."""
    for record in records:
        first, second = record["first_s"], record["second_s"]
        same = "yes" if record["same_plan"] else "no"
        yield record["model"], f"{first:.1f}", f"{second:.1f}", f"{second / first:.2f}", same


if __name__ == "__main__":
    main()
