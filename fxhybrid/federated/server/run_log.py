"""The log of a run: one JSON line for each finished round."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxhybrid.federated.protocol.messages import Reply
from fxhybrid.federated.tasks.tasks import Score


@dataclass(frozen=True)
class RoundRecord:
    """Records one finished round.

    Attributes:
        round: from 1.
        clock_s: after the round.
        elapsed_s: that it lasted.
        deadline_s: that its devices had.
        outcomes: by chosen device.
        replies: by device that answered or was found dead: everything but arrays.
        score: of the global model on held-out data.
    """

    round: int
    clock_s: float
    elapsed_s: float
    deadline_s: float
    outcomes: Mapping[str, str]
    replies: Mapping[str, Mapping[str, Any]]
    score: Score

    def __str__(self) -> str:
        """Returns one line for a log."""
        counts = ", ".join(f"{count} {outcome}" for outcome, count in Counter(self.outcomes.values()).items())
        score = f"accuracy {self.score.accuracy:.1%}, loss {self.score.loss:.3f}"
        return f"round {self.round}: {counts or 'nobody there'} in {self.elapsed_s:.0f} s, {score}"


class RunLog:
    """Appends to a run's log, and cuts it back to a checkpoint."""

    def __init__(self, path: Path) -> None:
        """Keeps the file's path; opens nothing yet."""
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a round's line; ``round`` is among its values."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def drop_after(self, last_round: int) -> None:
        """Drops the lines of rounds after ``last_round``, and a line that was cut off while being written."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = (line for line in lines if _round_of(line) <= last_round)
            self.path.write_text("".join(kept), encoding="utf-8")


def log_entry(reply: Reply) -> dict[str, Any]:
    """Makes the log's entry of a reply: everything but its arrays."""
    entry = {"outcome": reply.outcome.value, "elapsed_s": reply.elapsed_s, **reply.payload}
    return {**entry, "detail": reply.detail} if reply.detail else entry


def _round_of(line: str) -> float:
    try:
        return float(json.loads(line)["round"])
    except ValueError:
        return math.inf
