"""What server and devices say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Payload = Mapping[str, Any]  # what JSON can hold


class Kind(Enum):
    """Says what is asked of a device: a report of its memory, or training."""

    REPORT = "report"
    TRAIN = "train"


class Outcome(Enum):
    """Says how a request ended.

    OK: answered. OOM: the device ran out of memory. KILLED: its process was killed, as the system does where memory
    runs out. REFUSED: the device will not do it (its graph differs from the plan's). FAILED: the device raised another
    error. LATE: no answer before the deadline. LOST: the device went away. INVALID: an answer that the server refuses.
    UNUSED: the round was over before the answer came.
    """

    OK = "ok"
    OOM = "oom"
    KILLED = "killed"
    REFUSED = "refused"
    FAILED = "failed"
    LATE = "late"
    LOST = "lost"
    INVALID = "invalid"
    UNUSED = "unused"


DEATHS = (Outcome.OOM, Outcome.KILLED)  # what the memory forecast learns from


@dataclass(frozen=True)
class Request:
    """Asks one thing of one device.

    Attributes:
        device: who is asked.
        kind: what for.
        round: the round it belongs to.
        now_s: the server's clock.
        deadline_s: seconds until an answer is too late.
        payload: parameters, as JSON values.
        arrays: the global model, for training.
    """

    device: str
    kind: Kind
    round: int
    now_s: float
    deadline_s: float
    payload: Payload = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """Says what became of one request.

    Attributes:
        device: who was asked.
        round: the round it belongs to.
        outcome: how it ended.
        elapsed_s: seconds from request to answer, on the server's clock.
        payload: what the device reports in addition to arrays, as JSON values.
        arrays: the trained model.
        detail: an error in words.
    """

    device: str
    round: int
    outcome: Outcome
    elapsed_s: float
    payload: Payload = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)
    detail: str = ""


def failed(request: Request, outcome: Outcome, elapsed_s: float, detail: str, payload: Payload | None = None) -> Reply:
    """Makes a reply that holds no result."""
    return Reply(request.device, request.round, outcome, elapsed_s, payload or {}, detail=detail)


def n_bytes(arrays: Arrays) -> int:
    """Computes the bytes that arrays take in a message."""
    return sum(int(np.asarray(array).nbytes) for array in arrays.values())
