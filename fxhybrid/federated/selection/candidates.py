"""Who trains in a round: what is known about each client, what was chosen, and what a selector is.

Selectors are in :mod:`fxhybrid.federated.selection.strategies`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fxhybrid.errors import InvalidArgument


@dataclass(frozen=True)
class Candidate:
    """Describes one client as the server knows it before a round.

    Attributes:
        client: its lasting name.
        n_examples: size of its local data set.
        mean_squared_loss: mean over samples of the squared training loss, as last reported; None before the first.
            A device that was chosen and never answered has none, and counts as explored.
        available_bytes: forecast for the round, overhead already subtracted.
        smallest_plan_bytes: peak of the smallest plan that exists for it.
        full_bytes: peak of the unmodified training step (M_G in the paper).
        predicted_step_s: seconds of one training step by the plan that fits ``available_bytes``; inf without one.
        predicted_round_s: seconds until its reply: all local steps and the transfers.
        last_seen_round: the last round that it was chosen for; None if never.
        times_selected: how often it was chosen.
    """

    client: str
    n_examples: int
    mean_squared_loss: float | None
    available_bytes: int
    smallest_plan_bytes: int
    full_bytes: int
    predicted_step_s: float
    predicted_round_s: float
    last_seen_round: int | None = None
    times_selected: int = 0

    def __post_init__(self) -> None:
        if self.n_examples < 0 or self.times_selected < 0:
            raise InvalidArgument(f"{self.client}: n_examples and times_selected are counts, not below 0")
        if self.full_bytes <= 0:
            raise InvalidArgument(f"{self.client}: full_bytes must be positive, got {self.full_bytes}")
        if not (self.predicted_step_s > 0 and self.predicted_round_s > 0):
            raise InvalidArgument(f"{self.client}: predicted seconds must be positive (inf where no plan fits)")
        loss = self.mean_squared_loss
        if loss is not None and not (math.isfinite(loss) and loss >= 0):
            raise InvalidArgument(f"{self.client}: mean_squared_loss must be finite and not negative, got {loss}")

    @property
    def is_new(self) -> bool:
        """Returns whether it was never chosen."""
        return self.mean_squared_loss is None and self.last_seen_round is None

    @property
    def fits(self) -> bool:
        """Returns whether the smallest plan fits the forecast: the hard gate."""
        return self.smallest_plan_bytes <= self.available_bytes


@dataclass(frozen=True)
class Selection:
    """Holds the clients chosen for a round and every factor that led there.

    Attributes:
        round_index: the round, from 1.
        chosen: clients in the order of their choice; fewer than asked where not enough can take part.
        factors: for every candidate its factors by name, with ``score`` and ``chosen`` (0 or 1) among them.
    """

    round_index: int
    chosen: tuple[str, ...]
    factors: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Makes one record of the log; floats that JSON does not have become None."""
        factors = {
            client: {name: value if math.isfinite(value) else None for name, value in own.items()}
            for client, own in self.factors.items()
        }
        return {"round": self.round_index, "chosen": list(self.chosen), "factors": factors}


class Selector(Protocol):
    """Chooses the clients of a round."""

    def __call__(self, candidates: Sequence[Candidate], count: int, *, round_index: int, seed: int = 0) -> Selection:
        """Chooses up to ``count`` of the candidates, without repetition; the same for the same seed and round."""
        ...
