"""How high memory reaches between two ops: encodings after a forward op, decodings and reruns before a backward op.

What happens there is the same relative to the height after it, wherever that is; so each slot's group is evaluated on
its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxhybrid.solvers.mps.live_ranges import remakes
from fxhybrid.solvers.mps.plan_arrays import PlanArrays
from fxhybrid.solvers.mps.problem_tables import NEVER, ProblemTables

NO_GROUP = -NEVER


def group_height(tables: ProblemTables, plan: PlanArrays, slot: int) -> int:
    """Returns the highest point of a slot's group, relative to the height after it; NO_GROUP if there is none."""
    members = plan.members[slot]
    if not members:
        return NO_GROUP
    level, highest = 0, NO_GROUP
    forward = slot <= tables.n_forward
    for top, change in _encodings(tables, plan, members) if forward else _instructions(tables, plan, slot, members):
        highest = max(highest, level + top)
        level += change
    return highest - level


def _encodings(tables: ProblemTables, plan: PlanArrays, members: set[int]) -> Iterator[tuple[int, int]]:
    for t in sorted(members):
        option = tables.option(t, plan.codes[t])
        freed = 0 if t in tables.mutated else tables.size_bytes[t]
        yield max(option.encode_alloc_peak_bytes, option.encoded_bytes), option.encoded_bytes - freed


def _instructions(tables: ProblemTables, plan: PlanArrays, slot: int, members: set[int]) -> Iterator[tuple[int, int]]:
    """Yields for each decoding and rerun of a slot how high it reaches, and what it leaves behind."""
    pending = {t for t in members if t >= 0}
    order = sorted([~o for o in members if o < 0])
    left = _left_behind(tables, plan, slot, order)
    for o in order:
        if pending:
            for t in tables.read[o]:
                if t in pending:
                    pending.discard(t)
                    yield _decoding(tables, plan, t)
        yield tables.op_top_bytes[o], left[o]
    for t in sorted(pending):
        yield _decoding(tables, plan, t)


def _left_behind(tables: ProblemTables, plan: PlanArrays, slot: int, order: list[int]) -> dict[int, int]:
    """Returns per rerun of a slot the bytes of its outputs that outlive it, less those of sources that die with it."""
    left = dict.fromkeys(order, 0)
    last_reader = {t: o for o in order for t in tables.read[o] if plan.ranges[t].group_death == slot}
    for t, o in last_reader.items():
        left[o] -= tables.size_bytes[t]
    for o in order:
        for t in tables.made[o]:
            outlives = plan.last_use[t] >= slot or t in tables.gradients
            if outlives and remakes(tables, t, kept=plan.is_kept(t), rerun=plan.rerun[o]):
                left[o] += tables.size_bytes[t]
    return left


def _decoding(tables: ProblemTables, plan: PlanArrays, t: int) -> tuple[int, int]:
    option = tables.option(t, plan.codes[t])
    return max(option.decode_alloc_peak_bytes, tables.size_bytes[t]), tables.size_bytes[t] - option.encoded_bytes
