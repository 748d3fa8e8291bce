"""The pieces that a planning problem consists of: tensors with their codec options, and ops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fxhybrid.errors import ProblemError


@dataclass(frozen=True)
class CodecOption:
    """Holds one encoded form that a tensor may be kept in.

    Attributes:
        codec: the codec's text, understood by the runtime.
        encoded_bytes: what the encoded form occupies.
        encode_s: seconds to encode.
        decode_s: seconds to decode.
        encode_alloc_peak_bytes: the allocator's peak rise during encode, the encoded form included.
        decode_alloc_peak_bytes: the same for decode, the decoded tensor included.
        lossless: whether decode gives back the very same bits.
        error: relative error of the whole parameter gradient that this choice adds on its own.
    """

    codec: str
    encoded_bytes: int
    encode_s: float
    decode_s: float
    encode_alloc_peak_bytes: int
    decode_alloc_peak_bytes: int
    lossless: bool
    error: float = 0.0


@dataclass(frozen=True)
class Tensor:
    """Holds a storage made during the step.

    Attributes:
        name: unique and derived from the graph's structure.
        size_bytes: what the allocator counts for it.
        codecs: encoded forms offered; lossy ones only where every backward reader tolerates them.
    """

    name: str
    size_bytes: int
    codecs: tuple[CodecOption, ...] = ()


@dataclass(frozen=True)
class Fusion:
    """Holds a backward op's other form: one operator that reads the sources of a mask instead of the mask.

    It is taken where the mask is not kept. ``Op.seconds`` of the mask's own op is then what keeping the mask
    costs beyond this form.

    Attributes:
        op: forward op that makes the mask.
        alloc_peak_bytes: the allocator's peak rise while the fused operator runs.
    """

    op: int
    alloc_peak_bytes: int


@dataclass(frozen=True)
class Op:
    """Holds one operator call; views are folded into their readers.

    Attributes:
        name: unique name.
        inputs: indices of the tensors read (resident ones left out).
        outputs: indices of the tensors made.
        seconds: time of one run.
        alloc_peak_bytes: the allocator's peak rise while it runs, its outputs included.
        recomputable: False for random ops and ops that read what the step overwrites.
        pinned: runs in the forward pass even if nothing reads it (random ops, so that the generator's
            state after the step is that of plain eager).
        fusion: for a backward op that applies a mask which nothing else reads.
        place: where in the user's model it comes from, in words; "" where that is not known.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: float
    alloc_peak_bytes: int
    recomputable: bool = True
    pinned: bool = False
    fusion: Fusion | None = None
    place: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.place})" if self.place else self.name


def tensor_from_json(raw: dict[str, Any]) -> Tensor:
    """Builds a tensor from the dictionary that ``dataclasses.asdict`` made of it."""
    return Tensor(raw["name"], raw["size_bytes"], tuple(CodecOption(**c) for c in raw["codecs"]))


def op_from_json(raw: dict[str, Any]) -> Op:
    """Builds an op from the dictionary that ``dataclasses.asdict`` made of it."""
    fusion = Fusion(**raw["fusion"]) if raw.get("fusion") else None
    return Op(**{**raw, "inputs": tuple(raw["inputs"]), "outputs": tuple(raw["outputs"]), "fusion": fusion})


def check_tensor(tensor: Tensor) -> None:
    """Refuses numbers that mean nothing.

    Raises:
        ProblemError: a number is negative, not finite or not a number.
    """
    check_number(f"tensor {tensor.name!r}", "size_bytes", tensor.size_bytes, whole=True)
    for option in tensor.codecs:
        owner = f"codec {option.codec!r} of tensor {tensor.name!r}"
        for field in ("encoded_bytes", "encode_alloc_peak_bytes", "decode_alloc_peak_bytes"):
            check_number(owner, field, getattr(option, field), whole=True)
        for field in ("encode_s", "decode_s", "error"):
            check_number(owner, field, getattr(option, field))


def check_op(op: Op) -> None:
    """Refuses numbers that mean nothing.

    Raises:
        ProblemError: a number is negative, not finite or not a number.
    """
    if op.fusion:
        check_number(f"op {op.name!r}", "fusion's alloc_peak_bytes", op.fusion.alloc_peak_bytes, whole=True)
    check_number(f"op {op.name!r}", "seconds", op.seconds)
    check_number(f"op {op.name!r}", "alloc_peak_bytes", op.alloc_peak_bytes, whole=True)


def check_number(owner: str, field: str, value: object, *, whole: bool = False) -> None:
    """Refuses what is no finite number of at least 0, or no whole one.

    Raises:
        ProblemError: it is not; ``owner`` and ``field`` say whose it is.
    """
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or value < 0:
        raise ProblemError(f"{owner}: {field} is {value!r}; it must be a finite number of at least 0")
