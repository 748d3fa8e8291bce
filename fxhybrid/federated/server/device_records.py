"""What the server knows of each device, from its reports and replies; plain values, so that it survives a restart."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.protocol.messages import Outcome, Reply

NEWS = 0.5  # weight of a measurement against all before it
LONGEST_REST = 64  # rounds
LATE_FACTOR = 2.0


@dataclass
class DeviceRecord:
    """Describes one device.

    Attributes:
        profile: its speeds and memory, as JSON.
        bytes_per_s: of its link; first as told, then as measured.
        n_examples: it holds.
        squared_loss: of its last training; None before the first.
        last_report_s: when it last reported.
        last_seen_round: the last round that it was chosen for.
        times_selected: how often it was chosen.
        slowdown: of its steps over those of its profile's kind, as measured; None before its first answer.
        failures: trainings in a row that it did not answer as asked.
        rests_until: the last round in which it is not asked to train.
    """

    profile: str
    bytes_per_s: float
    n_examples: int
    squared_loss: float | None = None
    last_report_s: float = 0.0
    last_seen_round: int | None = None
    times_selected: int = 0
    slowdown: float | None = None
    failures: int = 0
    rests_until: int = 0

    @property
    def device_profile(self) -> DeviceProfile:
        """Parses the profile, as the device told it."""
        return _parsed(self.profile)

    @property
    def correction(self) -> float:
        """Returns by how much its steps take longer than the profile says."""
        return 1.0 if self.slowdown is None else self.slowdown / self.device_profile.slowdown

    @classmethod
    def of(cls, reply: Reply) -> DeviceRecord:
        """Makes the record of a device from its first report.

        Raises:
            ValueError: it is malformed; also KeyError and TypeError.
        """
        bytes_per_s = float(reply.payload["bytes_per_s"])
        record = cls(str(reply.payload["profile"]), bytes_per_s, 0)
        if not (math.isfinite(bytes_per_s) and bytes_per_s > 0) or not record.device_profile:
            raise ValueError(f"bytes_per_s is {bytes_per_s}")
        return record

    def note_selection(self, round_index: int) -> None:
        """Notes that the device was chosen."""
        self.last_seen_round, self.times_selected = round_index, self.times_selected + 1

    def note_answer(self, reply: Reply, sent_bytes: int) -> None:
        """Learns from a valid answer: the loss, and the speeds of steps and link where the device measured them.

        Args:
            reply: of a training.
            sent_bytes: of the model, which travels both ways.
        """
        self.failures = 0
        self.squared_loss = float(reply.payload["squared_loss"])
        slowdown = _positive(reply.payload.get("slowdown"))
        if slowdown:
            self.slowdown = slowdown if self.slowdown is None else _moved(self.slowdown, slowdown)
        transfer_s = reply.elapsed_s - (_positive(reply.payload.get("busy_s")) or math.inf)
        if transfer_s > 0:
            self.bytes_per_s = _moved(self.bytes_per_s, 2 * sent_bytes / transfer_s)

    def note_failure(self, reply: Reply, round_index: int) -> None:
        """Notes that the device did not answer as asked; after two such times in a row it rests, ever longer.

        Who is late is slower than was thought.
        """
        if reply.outcome is Outcome.LATE:
            self.slowdown = LATE_FACTOR * self.correction * self.device_profile.slowdown
        self.failures += 1
        self.rests_until = round_index + min(2 ** (self.failures - 1) - 1, LONGEST_REST)


Records = dict[str, DeviceRecord]  # by device, of all that have reported


def take_report(records: Records, reply: Reply, now_s: float) -> list[tuple[float, int]]:
    """Notes a report and returns its readings: times and available bytes.

    Raises:
        InvalidArgument: it is malformed; nothing is noted then.
    """
    try:
        readings = readings_of(reply.payload)
        n_examples = int(reply.payload["n_examples"])
        record = records.get(reply.device) or DeviceRecord.of(reply)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{reply.device} sent a malformed report: {error!r}") from error
    if n_examples < 1:
        raise InvalidArgument(f"{reply.device} reports {n_examples} examples")
    record.n_examples, record.last_report_s = n_examples, now_s
    records[reply.device] = record
    return readings


@functools.lru_cache(maxsize=65536)
def _parsed(text: str) -> DeviceProfile:
    return DeviceProfile.from_json(text)


def readings_of(payload: Mapping[str, Any]) -> list[tuple[float, int]]:
    """Reads times and available bytes from what a device sent.

    Raises:
        ValueError: they are no readings; also TypeError.
    """
    readings = [(float(t), int(b)) for t, b in payload.get("readings", ())]
    if any(not math.isfinite(t) or b < 0 for t, b in readings):
        raise ValueError(f"readings {readings[:3]}")
    return readings


def _positive(value: Any) -> float | None:
    """Returns a usable measurement; a device may send anything."""
    usable = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    return float(value) if usable else None


def _moved(known: float, measured: float) -> float:
    """Returns the geometric mean of what was known and what was measured."""
    return math.exp((1 - NEWS) * math.log(known) + NEWS * math.log(measured))
