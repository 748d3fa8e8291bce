"""Draws the picture of the README: memory over one step of a suite model, unmodified and planned.

python -m benchmarks.memory_picture
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.common import Bench

MINUTES = 1
NEEDS = ""
PICTURE = Path(__file__).parents[1] / "docs" / "memory.png"


def main(argv: Sequence[str] | None = None) -> None:
    """Plans the model, and draws what the simulator says of both steps."""
    parser = argparse.ArgumentParser("python -m benchmarks.memory_picture", description=__doc__)
    parser.add_argument("--model", default="bert", help="a name of the suite")
    parser.add_argument("--share", type=float, default=0.5, help="budget, as a share of the unmodified peak")
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args(argv)
    Bench(arguments.model, "full").compile(arguments.share).plot_memory(arguments.out)


if __name__ == "__main__":
    main()
