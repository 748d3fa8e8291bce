"""What a call of a hybrid module is told when its backward pass begins, and compares with what was planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import ref

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxhybrid.capture.joint_graph import InputKind
from fxhybrid.capture.planning_lock import PLANNING
from fxhybrid.compiler.late_backward import late_backward
from fxhybrid.compiler.observed_backward import ObservedBackward
from fxhybrid.compiler.pending_calls import PendingCall, PlannedCall, references
from fxhybrid.compiler.shrunk_call import Shrunk, shrink
from fxhybrid.compiler.storage_uses import PYTHON_USES, storage_uses
from fxhybrid.errors import BackwardError, BudgetError
from fxhybrid.ir.plan import Actions
from fxhybrid.ir.schedule import Schedule
from fxhybrid.ir.simulator import simulate
from fxhybrid.passes.split import SplitGraphs
from fxhybrid.pipeline import Prepared, schedule_of
from fxhybrid.runtime import LateBackward
from fxhybrid.solvers.portfolio.limited_plans import PlanBytes
from fxhybrid.units import format_bytes

CHANGED = (
    "an argument or parameter of a call was changed in place before the call's backward pass, which recomputes from it "
    "what was let go to make room for later calls. Change it after the backward pass, or raise the budget"
)

DROP_OUTPUTS = (
    "Keep what the loss needs, as in loss = model(...).loss, and let go of the other outputs before loss.backward()"
)
KEPT = (
    "gradients are kept to its end that were to be added to older ones, or to update parameters, at once; a hook of a "
    "parameter, torch.autograd.grad or retain_graph=True asks for that"
)
ADD_GRADIENTS = "Call zero_grad() before the forward pass, and set hooks before it"


@dataclass(frozen=True, eq=False)
class BackwardWatch:
    """Holds what calls by one plan expect of their backward pass.

    Attributes:
        prepared: the signature, with the expected backward pass.
        actions: of the plan.
        graphs: what carries it out.
        planned: what is known of all calls by it.
        observed: what backward passes of the signature showed.
        added: positions of the inputs whose gradients are added to older ones as soon as they are made.
        extra_bytes: what is alive beside the plan's own step.
    """

    prepared: Prepared
    actions: Actions
    graphs: SplitGraphs
    planned: PlannedCall
    observed: ObservedBackward
    added: frozenset[int]
    extra_bytes: int

    def backward_bytes(self, held: frozenset[int], untaken: frozenset[int]) -> int:
        """Computes the peak of the backward half where outputs or gradients are held that were to be let go."""
        prepared, schedule = self.prepared, self.schedule
        gradients = (prepared.gradient_nodes.keys() - self.added) | untaken
        as_held = prepared.expecting_drops(prepared.expected.dropped - held).keeping(gradients)
        during = simulate(as_held.problem, schedule).during_bytes[schedule.n_forward :]
        return int(during.max(initial=0)) + self.extra_bytes

    def opened(self, saved: Sequence[Tensor], outputs: Sequence[Any], inputs: Sequence[Any]) -> OpenedCall:
        """Enters a call whose forward pass is over."""
        returned = {i: t for i, t in enumerate(outputs) if isinstance(t, Tensor)}
        ids = set(map(id, returned.values()))
        if ids.isdisjoint(map(id, saved)):
            held, unread = references(returned.values()), [ref(t) for t in saved]
        else:  # autograd saves an output as another tensor of its storage, so that reference would not last
            held, unread = references([*saved, *returned.values()]), []
        pending = self.planned.opened((inputs[i] for i in self.given), held, unread)
        watched = dict(zip(returned, held[len(held) - len(returned) :], strict=True))
        opened = OpenedCall(self, pending, watched, _Inputs.of(inputs))
        pending.opened = ref(opened)
        return opened

    @cached_property
    def schedule(self) -> Schedule:
        """What the graphs carry out; the backward pass of each call may ask for it."""
        return schedule_of(self.prepared, self.actions)

    @cached_property
    def given(self) -> tuple[int, ...]:
        """Positions of the call's own tensors among the graph's inputs."""
        roles = enumerate(self.prepared.traced.joint.inputs)
        return tuple(i for i, role in roles if role.kind is InputKind.USER_INPUT)

    @cached_property
    def droppable(self) -> frozenset[int]:
        """Positions of the outputs without a gradient that a caller may drop before the backward pass."""
        return self.prepared.traced.droppable(self.prepared.expected.absent)


@dataclass(eq=False)
class OpenedCall:
    """Stands for a call whose backward pass has not begun; holds no tensor until it shrinks.

    Attributes:
        watch: what is expected.
        pending: its entry among the pending calls.
        watched: the storage of each output and its bytes, by the output's position.
        inputs: the graph's inputs.
        shrunk: what is left of a call that let go of what it stored; None otherwise.
    """

    watch: BackwardWatch
    pending: PendingCall
    watched: Mapping[int, tuple[StorageWeakRef, int]]
    inputs: _Inputs
    shrunk: Shrunk | None = None
    left_out = None  # what a call leaves out that shrinks, its late backward half makes

    def shrink(self, target: Actions, room_bytes: int) -> PlanBytes | None:
        """Lets go of what a plan would not store, if the backward pass can do without; returns what it needs then."""
        watch = self.watch
        if self.shrunk is not None:
            return None
        inputs = self.inputs.tensors()
        held = self.pending.held
        found = shrink(watch.prepared, watch.actions, watch.graphs, target, inputs, held, room_bytes)
        if found is None:
            return None
        self.shrunk, needs = found
        self.pending.held = tuple((ref, n_bytes) for ref, n_bytes in held if ref.cdata not in self.shrunk.freed)
        return replace(needs, peak_bytes=watch.planned.chosen.peak_bytes)

    @property
    def leaf_notes(self) -> ObservedBackward:
        """What is known of the call's inputs."""
        return self.watch.observed

    def begins(self, present: frozenset[int], untaken: frozenset[int]) -> LateBackward | None:
        """Compares the backward pass that begins with the plan, and returns another one where that is needed.

        Args:
            present: positions of the tangents that arrive.
            untaken: positions of the inputs whose gradients are kept to the end, though they were to be added at once.

        Raises:
            BackwardError: tangents arrive that were not expected, and nothing gives what they need.
            BudgetError: outputs are held that were to be dropped, or gradients to be kept that were to be added, and
                the budget has no room for them.
        """
        watch, expected = self.watch, self.watch.prepared.expected
        if self.shrunk is not None or present & expected.absent:
            held = self._held(self.watched)
            watch.observed.note(present, watch.droppable & held)
            return self._late(present, held)
        held = self._held((watch.droppable | expected.dropped) & self.watched.keys())
        self._check_room(expected.dropped & held, untaken)
        watch.observed.note(present, watch.droppable & held)  # what was refused shows nothing
        return None

    def _held(self, positions: Iterable[int]) -> frozenset[int]:
        """Returns which of these outputs anybody but the step itself holds."""
        return frozenset(i for i in positions if self._is_held(*self.watched[i]))

    def _is_held(self, output: StorageWeakRef, _: int) -> bool:
        if output.expired():  # type: ignore[no-untyped-call]
            return False
        held, own = Counter(r.cdata for r, _ in self.pending.held), Counter(r.cdata for r, _ in self.watched.values())
        n_saved: int = held[output.cdata] - own[output.cdata]
        return storage_uses(output) > n_saved + PYTHON_USES

    def _bytes(self, outputs: Iterable[int]) -> int:
        return sum({self.watched[i][0].cdata: self.watched[i][1] for i in outputs}.values())

    def _late(self, present: frozenset[int], held: Iterable[int]) -> LateBackward:
        watch = self.watch
        room, kept = watch.planned.budget_bytes, None if self.shrunk is None else self.shrunk.kept
        if kept is None:
            room -= watch.extra_bytes + self._bytes(held)
        inputs = self.inputs.tensors()
        with PLANNING:
            found = late_backward(watch.prepared, watch.actions, watch.graphs, present, inputs, room, kept)
        if found is None and not present & watch.prepared.expected.absent:
            raise BackwardError(CHANGED)
        if found is None:
            raise _unexpected_tangents(watch.prepared, present & watch.prepared.expected.absent)
        return found

    def _check_room(self, held: frozenset[int], untaken: frozenset[int]) -> None:
        if not held and not untaken:
            return
        planned = self.watch.planned
        needed = self.watch.backward_bytes(held, untaken)
        if needed <= planned.budget_bytes:
            return
        raise BudgetError(
            f"the budget of {planned.budget_bytes} bytes ({format_bytes(planned.budget_bytes)}) cannot be met for this "
            f"backward pass: {self._outputs_held(held) if held else KEPT}. With them the step takes {needed} bytes "
            f"({format_bytes(needed)}). {DROP_OUTPUTS if held else ADD_GRADIENTS}; or raise the budget. No gradient "
            "has been computed yet",
            budget_bytes=planned.budget_bytes,
            minimum_bytes=needed,
            minimum_lower_bound_bytes=min(planned.plans.lower_bound_bytes, needed),
            holder="outputs without a gradient" if held else "gradients beside older ones",
        )

    def _outputs_held(self, held: Iterable[int]) -> str:
        more, names = self._bytes(held), ", ".join(map(str, sorted(held)))
        return f"outputs {names} of the call ({more} bytes, {format_bytes(more)}), without a gradient, are still held"


def _unexpected_tangents(prepared: Prepared, tangents: Iterable[int]) -> BackwardError:
    outputs = sorted(i for i, tangent in prepared.traced.tangents.items() if tangent in tangents)
    names = ", ".join(map(str, outputs))
    return BackwardError(
        f"gradients arrive for outputs {names} of the call, which got none before: the forward pass did not store what "
        "they need. From now on they are planned for: zero the gradients and run the step again; "
        "or pass loss_fn to compile, so that it is known from the start"
    )


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Refers to the inputs of the graph, without holding them; None where one is no tensor.

    Attributes:
        references: to the tensors.
        versions: of their contents.
    """

    references: Sequence[ref[Tensor] | None]
    versions: Sequence[int]

    @classmethod
    def of(cls, values: Sequence[Any]) -> _Inputs:
        tensors = [value if isinstance(value, Tensor) else None for value in values]
        references = [None if tensor is None else ref(tensor) for tensor in tensors]
        return cls(references, [0 if tensor is None else _version(tensor) for tensor in tensors])

    def tensors(self) -> list[Tensor | None]:
        """Returns the inputs; None for those that are gone, or were changed since."""
        tensors = [None if reference is None else reference() for reference in self.references]
        pairs = zip(tensors, self.versions, strict=True)
        return [tensor if tensor is not None and _version(tensor) == version else None for tensor, version in pairs]


def _version(tensor: Tensor) -> int:
    """Counts the changes of a tensor in place, as autograd does."""
    return tensor._version  # noqa: SLF001 (no public name)
