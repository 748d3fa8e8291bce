"""Turns recorded calls into the sequence of parts that is planned: their problems, and what goes from part to part."""

from __future__ import annotations

from collections.abc import Sequence

from fxhybrid.capture.joint_graph import InputKind, OutputKind, storages
from fxhybrid.capture.output_structure import tangent_outputs
from fxhybrid.ir.part import DyingTangent, Part
from fxhybrid.ir.sequence import PartSequence, Shared
from fxhybrid.pipeline import Prepared
from fxhybrid.segments.segment import boundary_tensors
from fxhybrid.segments.sources import with_sources
from fxhybrid.segments.step_recording import RecordedCall


def sequence_of(
    calls: Sequence[RecordedCall],
    prepared: Sequence[Prepared],
    backward: Sequence[int],
    shared: tuple[Shared, ...],
    resident_bytes: int,
    update_bytes: int | None,
) -> PartSequence:
    """Builds the sequence of recorded calls.

    Args:
        calls: in the order of their forward halves.
        prepared: each one up to the planning problem, for the form in which it is called.
        backward: their positions, in the order of their backward halves.
        shared: storages that were made within the step.
        resident_bytes: alive through the whole step.
        update_bytes: how far memory rises while the optimizer steps; None without one.
    """
    parts = tuple(_part(k, call, p, shared) for k, (call, p) in enumerate(zip(calls, prepared, strict=True)))
    parts = with_sources(parts, prepared, shared, backward)
    return PartSequence(parts, tuple(backward), shared, resident_bytes, update_bytes)


def _part(k: int, call: RecordedCall, prepared: Prepared, shared: Sequence[Shared]) -> Part:
    boundaries = boundary_tensors(prepared)
    arriving = {t: call.inputs[i] for i, t in boundaries.items() if i in call.inputs}
    leaving: dict[int, int] = {}
    gradients: dict[int, set[int]] = {}
    passing: set[int] = set()
    joint, layout = prepared.joint, prepared.layout
    for node, role in zip(joint.output_nodes, joint.outputs, strict=True):
        behind = layout.storages_of.get(node, ()) if node is not None else ()
        if role.kind is OutputKind.USER_OUTPUT and role.of in call.outputs:
            key = call.outputs[role.of]
            if shared[key].maker == k:
                leaving |= dict.fromkeys(behind, key)
        elif role.kind is OutputKind.GRADIENT and role.of in call.inputs and node is not None:
            for t in behind:
                gradients.setdefault(t, set()).add(call.inputs[role.of])
            if not behind:
                passing.add(call.inputs[role.of])  # the very gradient of an output
    taken = {
        key
        for i, key in call.inputs.items()
        if i not in boundaries and joint.inputs[i].kind is InputKind.USER_INPUT and key not in arriving.values()
    }
    for t in arriving:
        leaving.pop(t, None)
    return Part(
        prepared.problem,
        arriving,
        frozenset(taken),
        leaving,
        {t: frozenset(keys) for t, keys in gradients.items()},
        frozenset(passing),
        call.beside_bytes,
        call.rise_bytes,
        call.backward_rise_bytes,
        call.passing_bytes,
        call.loose_bytes,
        _dying(call, prepared, shared),
    )


def _dying(call: RecordedCall, prepared: Prepared, shared: Sequence[Shared]) -> tuple[DyingTangent, ...]:
    """Returns the gradients of outputs that die in the backward half.

    Not so where the backward pass begins with them, or where they are the gradient of an input.
    """
    joint, layout = prepared.joint, prepared.layout
    roots = {i for i, key in call.outputs.items() if shared[key].is_root}
    results = zip(joint.output_nodes, joint.outputs, strict=True)
    gradients = [node for node, role in results if role.kind is OutputKind.GRADIENT and node is not None]
    kept = {s for node in gradients for s in storages(node.meta["val"])}
    reads = ((i, n) for i, op in enumerate(layout.backward) for n in op.node.all_input_nodes)
    last = {s: i for i, node in reads for s in storages(node.meta.get("val"))}
    found = []
    outputs = tangent_outputs(prepared.capture.metadata)
    for position, (node, output) in enumerate(zip(joint.tangents, outputs, strict=True)):
        (storage,) = storages(node.meta["val"])
        if position not in prepared.expected.absent and output not in roots and storage not in kept:
            size_bytes = node.meta["val"].untyped_storage().nbytes()
            found.append(DyingTangent(position, size_bytes, last.get(storage, -1)))
    return tuple(found)


def own_part(prepared: Prepared) -> Part:
    """Returns a part by itself; gradients of what it takes are counted as tangents of what made it."""
    boundaries, joint, layout = boundary_tensors(prepared), prepared.joint, prepared.layout
    results = zip(joint.output_nodes, joint.outputs, strict=True)
    gradients = (n for n, role in results if role.kind is OutputKind.GRADIENT and role.of in boundaries)
    behind = (t for node in gradients if node is not None for t in layout.storages_of.get(node, ()))
    return Part(prepared.problem, input_gradients=dict.fromkeys(behind, frozenset({0})))
