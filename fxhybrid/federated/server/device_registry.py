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
from fxhybrid.federated.protocol.messages import Reply


@dataclass
class DeviceRecord:
    """Describes one device.

    Attributes:
        profile: its speeds and memory, as JSON.
        bytes_per_s: of its link.
        n_examples: it holds.
        squared_loss: of its last training; None before the first.
        last_report_s: when it last reported.
        last_seen_round: the last round that it was chosen for.
        times_selected: how often it was chosen.
    """

    profile: str
    bytes_per_s: float
    n_examples: int
    squared_loss: float | None = None
    last_report_s: float = 0.0
    last_seen_round: int | None = None
    times_selected: int = 0

    @property
    def device_profile(self) -> DeviceProfile:
        """Parses the profile."""
        return _parsed(self.profile)


@functools.lru_cache(maxsize=65536)
def _parsed(text: str) -> DeviceProfile:
    return DeviceProfile.from_json(text)


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
            readings = [(float(t), int(b)) for t, b in payload["readings"]]
            n_examples = int(payload["n_examples"])
            if reply.device not in self.records:
                bytes_per_s = float(payload["bytes_per_s"])
                record = DeviceRecord(str(payload["profile"]), bytes_per_s, n_examples)
                if not (math.isfinite(bytes_per_s) and bytes_per_s > 0) or not record.device_profile:
                    raise ValueError(f"bytes_per_s is {bytes_per_s}")
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidArgument(f"{reply.device} sent a malformed report: {error!r}") from error
        if n_examples < 1 or any(not math.isfinite(t) or b < 0 for t, b in readings):
            raise InvalidArgument(f"{reply.device} reports {n_examples} examples, readings {readings[:3]}")
        if reply.device not in self.records:
            self.records[reply.device] = record
        self.records[reply.device].n_examples = n_examples
        self.records[reply.device].last_report_s = now_s
        return readings

    def record_selection(self, device: str, round_index: int) -> None:
        """Notes that a device was chosen."""
        record = self.records[device]
        record.last_seen_round, record.times_selected = round_index, record.times_selected + 1

    def to_json(self) -> dict[str, Any]:
        """Returns all records as JSON values."""
        return {device: dataclasses.asdict(record) for device, record in self.records.items()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> DeviceRegistry:
        """Restores the registry that ``to_json`` wrote."""
        return cls({device: DeviceRecord(**record) for device, record in raw.items()})
