"""Chooses the groups of operators that run in channels_last: those that the profile says are faster so."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from weakref import WeakKeyDictionary

import torch
from torch import fx

from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.console import stage
from fxhybrid.passes.canonicalize import canonicalize
from fxhybrid.passes.channels_last import CONVOLUTIONS, Group, channels_last_groups, in_channels_last
from fxhybrid.profiling.op_profiler import Call, call_of, profile_calls

aten = torch.ops.aten
# Elementwise operators take as long in either layout; these do not.
TIMED = CONVOLUTIONS | {
    aten.clone.default,
    aten.cat.default,
    aten._native_batch_norm_legit_functional.default,
    aten.native_batch_norm_backward.default,
    torch.ops.fxhybrid.batch_norm_backward.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.avg_pool2d.default,
    aten.avg_pool2d_backward.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d_backward.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d_backward.default,
}
LEAST_GAIN = 0.02  # of the seconds of all timed operators of a group; less may be noise
# Timed alone, operators find their inputs in the cache, where oneDNN's conversions from and to the usual layout are
# cheap. Within a step of ResNet-50 they take 1.18 times as long as alone in that layout, 1.10 times in channels_last.
WITHIN_A_STEP = 1.18 / 1.10
_BUILT: WeakKeyDictionary[JointGraph, tuple[tuple[int, ...], JointGraph]] = WeakKeyDictionary()  # of the last choice
MOST_KINDS = 8  # of groups that are decided on one by one; the rest is one more


def groups_that_pay(joint: JointGraph, canonical: JointGraph) -> tuple[int, ...]:
    """Returns the numbers of the groups that take less time in channels_last, conversions included.

    Groups of the same operators and shapes are alike. Their operators are timed in both layouts, as they are once the
    graph is canonical; costs are cached with those of all other operators.

    Args:
        joint: as captured.
        canonical: its canonical form.
    """
    kinds = _kinds(channels_last_groups(joint))
    if not kinds:
        return ()
    plain = _timed_calls(canonical)
    graphs = [in_channels_last(joint, kind) for kind in kinds]
    laid_out = [_timed_calls(canonicalize(graph, reordered=True)) for graph in graphs]
    with stage("profile"):
        costs = profile_calls([*plain, *(call for calls in laid_out for call in calls)])

    def seconds(calls: Iterable[Call]) -> float:
        return math.fsum(costs.cost(call).seconds for call in calls)

    plain_s = seconds(plain)
    most_s = plain_s * WITHIN_A_STEP * (1 - LEAST_GAIN)
    pays = [seconds(calls) < most_s for calls in laid_out]
    taken = [i for i, is_taken in enumerate(pays) if is_taken]
    numbers = tuple(sorted(group.number for i in taken for group in kinds[i]))
    if len(taken) == 1:
        _BUILT[joint] = numbers, graphs[taken[0]]
    return numbers


def with_groups(
    joint: JointGraph, numbers: Collection[int], coming: Collection[fx.Node], going: Collection[int]
) -> JointGraph:
    """Builds the captured graph with the groups of these numbers in channels_last.

    Args:
        joint: as captured.
        numbers: of the groups.
        coming: inputs and tangents that are in channels_last as they come.
        going: positions of outputs that are left in channels_last.
    """
    built_for, built = _BUILT.get(joint, ((), joint))
    if built_for == tuple(numbers) and not coming and not going:
        return built
    groups = [group for group in channels_last_groups(joint) if group.number in numbers]
    return in_channels_last(joint, groups, coming, going)


def _kinds(groups: Iterable[Group]) -> list[list[Group]]:
    """Sorts groups by what they compute."""
    by_calls: dict[str, list[Group]] = {}
    for group in groups:
        by_calls.setdefault("\n".join(call_of(n.target, n.args, n.kwargs).key for n in group.nodes), []).append(group)
    kinds = list(by_calls.values())
    rest = [group for kind in kinds[MOST_KINDS:] for group in kind]
    return [*kinds[:MOST_KINDS], *([rest] if rest else [])]


def _timed_calls(joint: JointGraph) -> list[Call]:
    nodes = (node for node in joint.module.graph.nodes if node.target in TIMED)
    return [call_of(node.target, node.args, node.kwargs) for node in nodes]
