"""Which codec options of a tensor are worth offering: those that no other one dominates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fxhybrid.ir.problem import CodecOption


def dominates(a: CodecOption, b: CodecOption) -> bool:
    """Whether ``a`` is at least as good as ``b`` in every figure: bytes, seconds, exactness, error and allocator peaks.

    Encoding and decoding both happen once for each use of an option, so that only their sum counts.
    """
    return all(x <= y for x, y in zip(_figures(a), _figures(b), strict=True))


def undominated(options: Sequence[CodecOption], places: Iterable[int]) -> list[int]:
    """Returns those of ``places`` whose options no other one of them dominates; of equals, the first one stays."""
    places = list(places)

    def beaten(j: int) -> bool:
        better = (k for k in places if k != j and dominates(options[k], options[j]))
        return any(k < j or not dominates(options[j], options[k]) for k in better)

    return [j for j in places if not beaten(j)]


def _figures(option: CodecOption) -> tuple[float, ...]:
    return (
        option.encoded_bytes,
        option.encode_s + option.decode_s,
        option.error,
        not option.lossless,
        option.encode_alloc_peak_bytes,
        option.decode_alloc_peak_bytes,
    )
