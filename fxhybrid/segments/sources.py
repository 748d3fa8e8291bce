"""Finds the graphs whose forward half can be recomputed in the backward pass for what a later graph did not keep.

What one graph hands to the next must be kept otherwise, however long the row of graphs is: nothing can be recomputed
across a break by operators. Every second one is offered, so that what the graph in front took is there to begin with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import fx

from fxhybrid.capture.joint_graph import OutputKind
from fxhybrid.ir.part import Part, Source
from fxhybrid.ir.schedule import lower
from fxhybrid.ir.sequence import Shared
from fxhybrid.ir.simulator import simulate
from fxhybrid.passes.split import forward_only
from fxhybrid.pipeline import Prepared
from fxhybrid.segments.segment import boundary_tensors


def with_sources(
    parts: Sequence[Part], prepared: Sequence[Prepared], shared: Sequence[Shared], backward: Collection[int]
) -> tuple[Part, ...]:
    """Returns the parts of a step, each with what can recompute what it takes.

    Args:
        parts: in the order of their forward halves.
        prepared: each one up to the planning problem.
        shared: storages that go from part to part.
        backward: positions of the parts that have a backward half.
    """
    takers = Counter(key for part in parts for key in {*part.arriving.values(), *part.taken})
    found: list[Part] = []
    for k, part in enumerate(parts):
        sources: dict[int, Source] = {}
        for t, key in part.arriving.items():
            maker = shared[key].maker
            is_alone = takers[key] == 1 and not shared[key].held and not shared[key].changed
            if maker < k and is_alone and {maker, k} <= set(backward) and not found[maker].sources:
                source = _source(maker, parts[maker], prepared[maker], key)
                if source is not None:
                    sources[t] = source
        found.append(replace(part, sources=sources))
    return tuple(found)


def _source(position: int, part: Part, prepared: Prepared, key: int) -> Source | None:
    """Returns a part as the source of a shared storage; None where it cannot recompute that."""
    problem, boundaries = prepared.problem, set(boundary_tensors(prepared).values())
    ops = [op for op in problem.forward if boundaries.isdisjoint(op.outputs)]
    is_pure = (
        all(op.recomputable and not op.pinned for op in ops)
        and not prepared.capture.metadata.mutated_inp_runtime_indices
    )
    if not is_pure or key not in part.leaving.values() or boundaries != set(part.arriving):
        return None
    alone = replace(problem, backward=(), gradients=())
    timeline = simulate(alone, lower(alone, {}))
    reads = {read: problem.tensors[t].size_bytes for t, read in part.arriving.items()}
    rise_bytes = timeline.peak_bytes - problem.resident_bytes - sum(reads.values())
    seconds = math.fsum(problem.forward[i].seconds for i in alone.required_forward_ops())
    return Source(position, tuple(reads.items()), rise_bytes, seconds)


def forward_alone(prepared: Prepared) -> fx.GraphModule:
    """Returns the forward half by itself, which stores nothing; called boxed, it returns what the graph returns."""
    module = forward_only(prepared.joint).forward
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def result_positions(prepared: Prepared, outputs: dict[int, int], keys: Collection[int]) -> dict[int, int]:
    """Maps shared storages to the positions of what ``forward_alone`` returns.

    Args:
        prepared: the graph.
        outputs: shared storage of each of its outputs.
        keys: the storages that are asked for.
    """
    returned = [role for role in prepared.joint.outputs if role.kind is not OutputKind.GRADIENT]
    places = ((i, role) for i, role in enumerate(returned) if role.kind is OutputKind.USER_OUTPUT)
    return {outputs[role.of]: i for i, role in places if outputs.get(role.of) in keys}
