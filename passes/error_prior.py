"""Estimates the gradient error of lossy choices where nothing is measured, per tensor and codec.

Lossy candidates are grouped by what reads them in the backward pass. The group's tensors share the error of the
whole group at 4 bits evenly (errors add up as squares), and other codecs follow from their noise. Where memory allows
a save-all step, ``accuracy/calibration.py`` measures instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from fxhybrid.capture.joint_graph import node_name
from fxhybrid.codecs import get_codec
from fxhybrid.passes.build_problem import CodecChoices
from fxhybrid.passes.storages import Layout

# Relative gradient error of a whole group at 4 bits, for when nothing can be measured: a cautious guess, about the
# worst group seen so far (the convolution inputs of a MobileNetV2 at random initialisation).
DEFAULT_GROUP_ERROR = 0.09
ErrorTable = dict[tuple[int, str], float]
Group = frozenset[str]


def lossy_groups(layout: Layout, choices: CodecChoices) -> dict[Group, list[int]]:
    """Groups the storages that may be lossy by the operators that read them in the backward pass."""
    readers: dict[int, set[str]] = {}
    for op in layout.backward:
        for storage in op.inputs:
            readers.setdefault(storage, set()).add(node_name(op.node))
    groups: dict[Group, list[int]] = {}
    for storage, codecs in choices.items():
        if any(not get_codec(c).lossless for c in codecs):
            groups.setdefault(frozenset(readers.get(storage, ())), []).append(storage)
    return groups


def error_table(
    groups: Mapping[Group, Iterable[int]], choices: CodecChoices, at_4_bits: Callable[[Group], float]
) -> ErrorTable:
    """Computes the error of each (storage, lossy codec) from each group's error at 4 bits."""
    errors: ErrorTable = {}
    for group, members in groups.items():
        storages = list(members)
        each = at_4_bits(group) / len(storages) ** 0.5
        for storage in storages:
            lossy = (codec for codec in map(get_codec, choices[storage]) if not codec.lossless)
            errors |= {(storage, codec.spec): each * codec.noise for codec in lossy}
    return errors
