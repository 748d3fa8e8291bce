"""What a device answers after training: the model, and what it measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxhybrid.federated.protocol.compact_updates import BITS, pack_update
from fxhybrid.federated.protocol.messages import Arrays, Outcome, Reply, Request
from fxhybrid.ir.plan import Plan


@dataclass(frozen=True)
class LocalResult:
    """Holds the result of local training.

    Attributes:
        arrays: the trained model.
        losses: of the local steps.
        plans: what each step ran by; fewer than asked for where memory or time ran short.
    """

    arrays: Arrays
    losses: Sequence[float]
    plans: Sequence[Plan]

    def measured(
        self, n_examples: int, *, steps_s: float, busy_s: float, readings: Sequence[Sequence[float]]
    ) -> dict[str, Any]:
        """Makes what a device reports about its training in addition to the model.

        ``squared_loss`` is Oort's data utility, with losses of batches in place of examples.

        Args:
            n_examples: that the device holds.
            steps_s: that the steps took.
            busy_s: from the request's arrival to the reply's sending.
            readings: of memory since the request, as times on the server's clock and bytes.
        """
        planned_s = sum(plan.step_s + plan.added_s for plan in self.plans)
        return {
            "n_examples": n_examples,
            "loss": sum(self.losses) / len(self.losses),
            "squared_loss": sum(loss * loss for loss in self.losses) / len(self.losses),
            "peak_bytes": max(plan.peak_bytes for plan in self.plans),
            "n_moves": sum(before is not after for before, after in itertools.pairwise(self.plans)),
            "n_steps": len(self.plans),
            "slowdown": steps_s / planned_s,
            "busy_s": busy_s,
            "readings": [list(reading) for reading in readings],
        }

    def reply(self, request: Request, elapsed_s: float, measured: dict[str, Any]) -> Reply:
        """Makes the reply, with the model in as many bits as the request asks for."""
        is_packed = request.payload.get("update_bits") == BITS
        arrays = pack_update(self.arrays, request.arrays) if is_packed else self.arrays
        return Reply(request.device, request.round, Outcome.OK, elapsed_s, measured, arrays)
