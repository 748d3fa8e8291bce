"""When the server learns that a device died: one model for all deaths, by memory, by a kill or by going away.

The literature differs, and time to an accuracy with it, ten-fold. So there are three, and results name theirs:

* ``at-once``: a failed device costs its own time only (Oort, OSDI 2021, and FedScale, ICML 2022, which ask 1.3 times as
  many devices as they need and take those that answer).
* ``heartbeat``: after ``NOTICE_S``: Flower calls a node gone after two heartbeats of 30 s.
* ``deadline``: at the round's end, which FedBalancer (MobiSys 2022) sets to 2 T, T the mean time of a device's round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fxhybrid.federated.protocol.messages import Outcome
from fxhybrid.federated.server.run_log import RoundRecord

NOTICE_S = 60.0

FAILURES: Mapping[str, Callable[[float, float], float]] = {
    "at-once": lambda died_s, _: died_s,
    "heartbeat": lambda died_s, deadline_s: min(died_s + NOTICE_S, deadline_s),
    "deadline": lambda _, deadline_s: deadline_s,
}


def retimed_s(record: RoundRecord, wanted: int, failures: str) -> float:
    """Computes how long a synchronous round would have lasted under another model of failure.

    Where enough devices answered, the last of those ended the round, and no model changes that.

    Args:
        record: of the round, as it was.
        wanted: answers that end a round.
        failures: name in ``FAILURES``.
    """
    answered = [reply for reply in record.replies.values() if reply["outcome"] == Outcome.OK.value]
    if len(answered) >= wanted or not record.replies:
        return record.elapsed_s
    noticed = FAILURES[failures]
    return max(
        noticed(reply["died_s"], record.deadline_s) if "died_s" in reply else reply["elapsed_s"]
        for reply in record.replies.values()
    )
