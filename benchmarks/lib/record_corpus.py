"""Records the planning problems of the suite's models in ``tests/corpus``.

Each model is captured and profiled on this device, and its problem is written to ``tests/corpus/<model>.json``: plain
numbers, on which every solver runs without the model and without torch. Record anew when the capture, the
passes, the codecs or the form of a problem change; seconds differ from device to device, so commit all
files of one device together.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.lib.common import Bench, names_of
from fxhybrid import suite
from fxhybrid.ir.problem import Problem

MINUTES = 5
NEEDS = "transformers"

CORPUS = Path(__file__).parents[2] / "tests" / "corpus"
MODELS = ("resnet50", "mobilenetv2", "bert", "gpt2", "vit", "t5", "unet")
MAX_ERROR = 0.05  # that plans of the recorded problems are made for


def names() -> list[str]:
    """The recorded models."""
    return sorted(path.stem for path in CORPUS.glob("*.json"))


def load(name: str) -> Problem:
    """The recorded problem of a model."""
    return Problem.from_json((CORPUS / f"{name}.json").read_text(encoding="utf-8"))


def record(name: str, size: suite.Size) -> Problem:
    """Captures and profiles a suite model; its plan does not matter, so the quick solver makes it."""
    return Bench(name, size).compile(1.0, solver="mps").planning_problem


def compact_json(problem: Problem) -> str:
    """The problem's JSON text without blanks."""
    return json.dumps(json.loads(problem.to_json()), separators=(",", ":")) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Records the chosen models."""
    parser = argparse.ArgumentParser("python -m benchmarks.lib.record_corpus", description=__doc__)
    parser.add_argument("--models", metavar="LIST", help=f"default: {','.join(MODELS)}")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--out", type=Path, default=CORPUS, metavar="DIR", help="default: tests/corpus")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in names_of(arguments.models or ",".join(MODELS), suite.names(), "model"):
        problem = record(name, arguments.size)
        (arguments.out / f"{name}.json").write_text(compact_json(problem), encoding="utf-8")
        print(f"{name}: {problem}", flush=True)
        torch.compiler.reset()
        gc.collect()


if __name__ == "__main__":
    main()
