"""What a server knows of a device that it does not own: speeds and memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fxhybrid.errors import InvalidArgument
from fxhybrid.ir.json_text import from_json, to_json
from fxhybrid.ir.problem import CodecOption, Op, Problem

if TYPE_CHECKING:  # a device says its speeds without torch's compiler, which measuring work takes
    from fxhybrid.devices.op_work import OpWork, StepWork

REFERENCE_FLOPS_PER_S = 2e9
REFERENCE_MOVED_BYTES_PER_S = 2e9
REFERENCE_CODEC_BYTES_PER_S = 1e9


@dataclass(frozen=True)
class DeviceProfile:
    """Describes a kind of device.

    Seconds of an operator are those of its time table, where it has the call, else the roofline's: the larger of
    compute and memory traffic, plus the launch. ``slowdown`` scales them all: devices that differ only by it get the
    same plans.

    Attributes:
        name: of the kind.
        memory_bytes: of the whole device.
        flops_per_s: rate of matrix products and convolutions.
        moved_bytes_per_s: rate of memory traffic.
        codec_bytes_per_s: uncompressed bytes that encoding and decoding take in a second, by the codec's name.
        launch_s: seconds of an operator that does nothing.
        slowdown: all seconds are multiplied by this.
        op_seconds: measured seconds by call, as ``Profile`` names calls.
    """

    name: str = "reference"
    memory_bytes: int = 1 << 32
    flops_per_s: float = REFERENCE_FLOPS_PER_S
    moved_bytes_per_s: float = REFERENCE_MOVED_BYTES_PER_S
    codec_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    launch_s: float = 2e-6
    slowdown: float = 1.0
    op_seconds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            InvalidArgument: one is not positive and finite.
        """
        rates = {"flops_per_s": self.flops_per_s, "moved_bytes_per_s": self.moved_bytes_per_s}
        rates |= {"slowdown": self.slowdown, "memory_bytes": self.memory_bytes}
        rates |= {f"codec_bytes_per_s of {name}": rate for name, rate in self.codec_bytes_per_s.items()}
        for name, value in rates.items():
            if not (math.isfinite(value) and value > 0):
                raise InvalidArgument(f"{name} of device {self.name!r} is {value!r}; it must be positive and finite")

    @property
    def kind(self) -> DeviceProfile:
        """The device less what does not change plans: equal kinds share one frontier."""
        return dataclasses.replace(self, name="", memory_bytes=1, slowdown=1.0)

    def op_s(self, work: OpWork) -> float:
        """Estimates the seconds of one operator call, without the slowdown."""
        known = self.op_seconds.get(work.key)
        if known is not None:
            return known
        return self.launch_s + max(work.flops / self.flops_per_s, work.moved_bytes / self.moved_bytes_per_s)

    def codec_s(self, codec: str, size_bytes: int) -> float:
        """Estimates the seconds to encode, or to decode, ``size_bytes`` of data, without the slowdown."""
        name = codec.split(":", 1)[0]
        rate = self.codec_bytes_per_s.get(name, self.codec_bytes_per_s.get("", REFERENCE_CODEC_BYTES_PER_S))
        return self.launch_s + size_bytes / rate

    def to_json(self) -> str:
        """Writes this profile as JSON text."""
        return to_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DeviceProfile:
        """Reads the profile that ``to_json`` wrote.

        Raises:
            InvalidArgument: the text is no device profile.
        """
        return from_json(text, lambda raw: cls(**raw), InvalidArgument, "this is no device profile")


def problem_on(problem: Problem, work: StepWork, profile: DeviceProfile) -> Problem:
    """Returns the same step with the seconds that it takes on another device (slowdown left out); bytes stay.

    Args:
        problem: as captured and measured here.
        work: of the same step.
        profile: the other device.
    """
    tensors = tuple(
        dataclasses.replace(t, codecs=tuple(_codec_on(option, t.size_bytes, profile) for option in t.codecs))
        for t in problem.tensors
    )
    forward = tuple(_op_on(op, w, profile) for op, w in zip(problem.forward, work.forward, strict=True))
    backward = tuple(_op_on(op, w, profile) for op, w in zip(problem.backward, work.backward, strict=False))
    backward += problem.backward[len(work.backward) :]  # the optimizer's step is no op of the graph
    return dataclasses.replace(problem, tensors=tensors, forward=forward, backward=backward)


def _op_on(op: Op, work: OpWork, profile: DeviceProfile) -> Op:
    return dataclasses.replace(op, seconds=profile.op_s(work))


def _codec_on(option: CodecOption, size_bytes: int, profile: DeviceProfile) -> CodecOption:
    seconds = profile.codec_s(option.codec, size_bytes)
    return dataclasses.replace(option, encode_s=seconds, decode_s=seconds)
