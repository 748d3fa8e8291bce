"""Calibration: what lossy choices do to the gradient, by running them on the example batch."""

from __future__ import annotations

from collections.abc import Iterable

from fxhybrid.gradient_error import ErrorTable, Group, error_table, four_bit_codec, lossy_groups
from fxhybrid.plan import SAVE, Action, Actions, Compress
from fxhybrid.prepare import Prepared, build_graphs
from fxhybrid.verify import Verifier

MEASURED_ZERO = 1e-6  # a lossy codec never counts as exact, even if one batch does not show it


def measured_error(prepared: Prepared, verifier: Verifier, actions: Actions) -> float:
    """Relative gradient error of ``actions`` on the verifier's batch; it must have a reference."""
    return verifier.gradient_error(build_graphs(prepared, actions)[1])


def calibrated_errors(prepared: Prepared, verifier: Verifier) -> ErrorTable:
    """Errors per tensor and codec, from one measured step for each group of lossy candidates."""
    groups = lossy_groups(prepared.layout, prepared.choices)

    def at_4_bits(group: Group) -> float:
        found = measured_error(prepared, verifier, _all_at_4_bits(prepared, groups[group]))
        return max(found, MEASURED_ZERO)

    return error_table(groups, prepared.choices, at_4_bits)


def _all_at_4_bits(prepared: Prepared, storages: Iterable[int]) -> dict[int, Action]:
    """4 bits for these storages; masks are kept, so that what they derive from may be lossy."""
    problem = prepared.problem
    actions: dict[int, Action] = {t: SAVE for i in problem.deferrable for t in problem.forward[i].outputs}
    for storage in storages:
        codec = four_bit_codec(prepared.choices[storage])
        if codec is not None:
            actions[storage] = Compress(codec)
    return actions
