"""The backward pass for output gradients that were not expected, from what the forward pass stored all the same.

What is missing is recomputed. Where that takes a random number that is gone, contents that were overwritten, or more
memory than there is, there is no such backward pass, and the step must be run again.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

import fxhybrid.codecs.ops  # noqa: F401  (registers the operator that is looked for)
from fxhybrid.errors import PlanError
from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Actions, Compress
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Schedule, lower
from fxhybrid.ir.simulator import simulate
from fxhybrid.passes.expected_backward import ExpectedBackward
from fxhybrid.passes.rewrite import rewrite
from fxhybrid.passes.split import SplitGraphs, split
from fxhybrid.pipeline import Prepared, prepare_traced
from fxhybrid.runtime import LateBackward


def late_backward(
    prepared: Prepared,
    actions: Actions,
    graphs: SplitGraphs,
    present: frozenset[int],
    inputs: Sequence[Tensor | None],
    room_bytes: int,
    kept: Collection[str] | None = None,
) -> LateBackward | None:
    """Builds the backward pass for tangents that were not expected.

    Args:
        prepared: with the backward pass that was expected.
        actions: of the plan by which the forward pass ran.
        graphs: its halves.
        present: positions of the tangents that arrive.
        inputs: the graph's inputs as they were; None for those that are gone or were changed.
        room_bytes: what the backward pass may take.
        kept: names of the stored tensors that are still there; None for all.

    Returns:
        The backward pass, or None if what was stored does not allow one.
    """
    traced = prepared.traced
    everything = ExpectedBackward(traced.without(present), frozenset(range(traced.n_outputs)))
    other = prepare_traced(traced, everything)
    stored = stored_forms(prepared.problem, actions)
    if kept is not None:
        stored = {name: form for name, form in stored.items() if name in kept}
    schedule = _schedule(other.problem, stored)
    if schedule is None:
        return None
    peak_bytes = int(simulate(other.problem, schedule).during_bytes[schedule.n_forward :].max(initial=0))
    if peak_bytes > room_bytes:
        return None
    halves = split(rewrite(other.joint, other.layout, schedule))
    positions = {key: i for i, key in enumerate(_saved_keys(graphs))}
    saved = [positions.get(key) for key in _saved_keys(halves)]
    resident = [inputs[i] for i in halves.resident_inputs]
    if None in saved or any(value is None for value in resident):
        return None
    return LateBackward(halves.backward, tuple(i for i in saved if i is not None), tuple(resident), peak_bytes)


def stored_forms(problem: Problem, actions: Actions) -> Mapping[str, Action]:
    """Returns in which form the forward pass stored tensors, by name."""
    schedule = lower(problem, actions)
    values = (schedule.values[i] for i in schedule.stored)
    return {problem.tensors[v.tensor].name: actions[v.tensor] if v.encoded else SAVE for v in values}


def _schedule(problem: Problem, stored: Mapping[str, Action]) -> Schedule | None:
    """Lowers the plan that recomputes what is not stored, or is stored in a lossy form but read exactly."""
    exact = {name: action for name, action in stored.items() if action is SAVE}
    for given in (stored, exact):
        offered = {
            t: given.get(tensor.name, RECOMPUTE)
            for t, tensor in enumerate(problem.tensors)
            if t in problem.producer and _may(problem, t, given.get(tensor.name, RECOMPUTE))
        }
        try:
            return lower(problem, offered)
        except PlanError:
            continue
    return None


def _may(problem: Problem, t: int, action: Action) -> bool:
    """Says whether an action can be asked for; what cannot be recomputed is to be saved then, and is found missing."""
    if isinstance(action, Compress):
        return any(option.codec == action.codec for option in problem.tensors[t].codecs)
    return action is SAVE or problem.forward[problem.producer[t]].recomputable


def _saved_keys(graphs: SplitGraphs) -> Iterator[tuple[object, ...]]:
    """Yields what identifies each saved value: its fake tensor, which all graphs of a signature share, and its form."""
    by_name = {node.name: node for node in graphs.joint.module.graph.nodes}
    placeholders = [node for node in graphs.backward.graph.nodes if node.op == "placeholder"]
    for placeholder in placeholders[: graphs.n_saved]:
        yield _key(by_name[placeholder.name])


def _key(node: fx.Node) -> tuple[object, ...]:
    source = node.args[0] if node.target is operator.getitem else None
    if isinstance(source, fx.Node) and source.target is torch.ops.fxhybrid.compress.default:
        encoded = source.args[0]
        assert isinstance(encoded, fx.Node)
        return id(encoded.meta["val"]), source.args[1], node.args[1]
    return id(node.meta["val"]), None, None
