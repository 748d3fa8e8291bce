"""What the server knows of each device, from its reports and replies; plain values, so that it survives a restart."""

from __future__ import annotations

import dataclasses
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


class DeviceRegistry:
    """Keeps a record of every device that has reported."""

    def __init__(self, records: Mapping[str, DeviceRecord] | None = None) -> None:
        """Starts with ``records``, or empty."""
        self.records = dict(records or {})

    def record_report(self, reply: Reply, now_s: float) -> list[tuple[float, int]]:
        """Notes a report and returns its readings: times and available bytes.

        Raises:
            InvalidArgument: it is malformed; nothing is noted then.
        """
        try:
            payload = reply.payload
            readings = readings_of(payload)
            n_examples = int(payload["n_examples"])
            if reply.device not in self.records:
                bytes_per_s = float(payload["bytes_per_s"])
                record = DeviceRecord(str(payload["profile"]), bytes_per_s, n_examples)
                if not (math.isfinite(bytes_per_s) and bytes_per_s > 0) or not record.device_profile:
                    raise ValueError(f"bytes_per_s is {bytes_per_s}")
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidArgument(f"{reply.device} sent a malformed report: {error!r}") from error
        if n_examples < 1:
            raise InvalidArgument(f"{reply.device} reports {n_examples} examples")
        if reply.device not in self.records:
            self.records[reply.device] = record
        self.records[reply.device].n_examples = n_examples
        self.records[reply.device].last_report_s = now_s
        return readings

    def record_selection(self, device: str, round_index: int) -> None:
        """Notes that a device was chosen."""
        record = self.records[device]
        record.last_seen_round, record.times_selected = round_index, record.times_selected + 1

    def record_answer(self, reply: Reply, sent_bytes: int) -> None:
        """Learns from a valid answer: the loss, and the speeds of steps and link where the device measured them.

        Args:
            reply: of a training.
            sent_bytes: of the model, which travels both ways.
        """
        record = self.records[reply.device]
        record.failures = 0
        record.squared_loss = float(reply.payload["squared_loss"])
        slowdown = _positive(reply.payload.get("slowdown"))
        if slowdown:
            record.slowdown = slowdown if record.slowdown is None else _moved(record.slowdown, slowdown)
        transfer_s = reply.elapsed_s - (_positive(reply.payload.get("busy_s")) or math.inf)
        if transfer_s > 0:
            record.bytes_per_s = _moved(record.bytes_per_s, 2 * sent_bytes / transfer_s)

    def record_failure(self, reply: Reply, round_index: int) -> None:
        """Notes that a device did not answer as asked; after two such times in a row it rests, ever longer.

        Who is late is slower than was thought.
        """
        record = self.records[reply.device]
        if reply.outcome is Outcome.LATE:
            record.slowdown = LATE_FACTOR * record.correction * record.device_profile.slowdown
        record.failures += 1
        record.rests_until = round_index + min(2 ** (record.failures - 1) - 1, LONGEST_REST)

    def to_json(self) -> dict[str, Any]:
        """Returns all records as JSON values."""
        return {device: dataclasses.asdict(record) for device, record in self.records.items()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> DeviceRegistry:
        """Restores the registry that ``to_json`` wrote."""
        return cls({device: DeviceRecord(**record) for device, record in raw.items()})
