"""Forecasts of a device's memory: the interface, and the plain ones that the predictor is compared with."""

from __future__ import annotations

from typing import Any, Protocol

UNLIMITED_BYTES = 1 << 62


class Forecaster(Protocol):
    """Forecasts the least memory that a device will have over the coming seconds."""

    def observe(self, device: str, t_s: float, available_bytes: int) -> None:
        """Takes in a reading."""
        ...

    def predict(self, device: str, *, now_s: float, horizon_s: float) -> int:
        """Forecasts the bytes that are safe to use from now on for ``horizon_s``."""
        ...

    def report_miss(self, device: str, t_s: float) -> None:
        """Takes in that memory ran out."""
        ...

    def to_state(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        ...

    @staticmethod
    def from_state(state: dict[str, Any]) -> Forecaster:
        """Restores the forecaster that gave ``state``."""
        ...


class LastReading:
    """Takes the last reading for the forecast."""

    def __init__(self) -> None:
        """Starts without readings."""
        self.last_bytes: dict[str, int] = {}

    def observe(self, device: str, t_s: float, available_bytes: int) -> None:
        """Takes in a reading; they come in order of time."""
        self.last_bytes[device] = available_bytes

    def predict(self, device: str, *, now_s: float, horizon_s: float) -> int:
        """Returns the last reading; 0 before the first."""
        return self.last_bytes.get(device, 0)

    def report_miss(self, device: str, t_s: float) -> None:
        """Changes nothing: the next reading counts."""

    def to_state(self) -> dict[str, Any]:
        """Returns the readings."""
        return dict(self.last_bytes)

    @staticmethod
    def from_state(state: dict[str, Any]) -> LastReading:
        """Restores the forecaster that gave ``state``."""
        forecaster = LastReading()
        forecaster.last_bytes = dict(state)
        return forecaster
