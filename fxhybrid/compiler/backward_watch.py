"""What a call of a hybrid module is told when its backward pass begins, and compares with what was planned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxhybrid.capture.joint_graph import InputKind
from fxhybrid.compiler.late_backward import late_backward
from fxhybrid.compiler.observed_backward import ObservedBackward
from fxhybrid.compiler.pending_calls import PendingCall, PlannedCall
from fxhybrid.compiler.planning_lock import PLANNING
from fxhybrid.compiler.shrunk_call import Shrunk, shrink
from fxhybrid.compiler.storage_uses import PYTHON_USES, storage_uses
from fxhybrid.errors import BackwardError, BudgetError
from fxhybrid.ir.plan import Actions
from fxhybrid.ir.schedule import lower
from fxhybrid.ir.simulator import simulate
from fxhybrid.passes.split import SplitGraphs
from fxhybrid.pipeline import Prepared
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
        prepared = self.prepared
        schedule = lower(prepared.problem, self.actions)
        gradients = (prepared.gradient_nodes.keys() - self.added) | untaken
        as_held = prepared.expecting_drops(prepared.expected.dropped - held).keeping(gradients)
        during = simulate(as_held.problem, schedule).during_bytes[schedule.n_forward :]
        return int(during.max(initial=0)) + self.extra_bytes

    def opened(self, saved: Sequence[Tensor], outputs: Sequence[Any], inputs: Sequence[Any]) -> OpenedCall:
        """Enters a call whose forward pass is over."""
        roles = self.prepared.traced.joint.inputs
        given = (t for t, role in zip(inputs, roles, strict=False) if role.kind is InputKind.USER_INPUT)
        watched = {i: _Watched.of(t, saved) for i, t in enumerate(outputs) if isinstance(t, Tensor)}
        seen = tuple(_Input.of(t) for t in inputs)
        pending = self.planned.opened(saved, outputs, given)
        opened = OpenedCall(self, pending, watched, seen)
        pending.opened = ref(opened)
        return opened


@dataclass(eq=False)
class OpenedCall:
    """Stands for a call whose backward pass has not begun; holds no tensor until it shrinks.

    Attributes:
        watch: what is expected.
        pending: its entry among the pending calls.
        watched: the outputs, by position.
        inputs: the graph's inputs.
        shrunk: what is left of a call that let go of what it stored; None otherwise.
    """

    watch: BackwardWatch
    pending: PendingCall
    watched: Mapping[int, _Watched]
    inputs: Sequence[_Input]
    shrunk: Shrunk | None = None

    def shrink(self, target: Actions, room_bytes: int) -> PlanBytes | None:
        """Lets go of what a plan would not store, if the backward pass can do without; returns what it needs then."""
        watch = self.watch
        if self.shrunk is not None:
            return None
        inputs = [seen.tensor() for seen in self.inputs]
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
        prepared = self.watch.prepared
        held = {i: output for i, output in self.watched.items() if output.is_held}
        droppable = prepared.traced.droppable(prepared.expected.absent)
        if self.shrunk is not None or present & prepared.expected.absent:
            self.watch.observed.note(present, droppable.intersection(held))
            return self._late(present, held.values())
        self._check_room({i: output for i, output in held.items() if i in prepared.expected.dropped}, untaken)
        self.watch.observed.note(present, droppable.intersection(held))  # what was refused shows nothing
        return None

    def _late(self, present: frozenset[int], held: Iterable[_Watched]) -> LateBackward:
        watch = self.watch
        room, kept = watch.planned.budget_bytes, None if self.shrunk is None else self.shrunk.kept
        if kept is None:
            room -= watch.extra_bytes + _total_bytes(held)
        inputs = [seen.tensor() for seen in self.inputs]
        with PLANNING:
            found = late_backward(watch.prepared, watch.actions, watch.graphs, present, inputs, room, kept)
        if found is None and not present & watch.prepared.expected.absent:
            raise BackwardError(CHANGED)
        if found is None:
            raise _unexpected_tangents(watch.prepared, present & watch.prepared.expected.absent)
        return found

    def _check_room(self, held: Mapping[int, _Watched], untaken: frozenset[int]) -> None:
        if not held and not untaken:
            return
        planned = self.watch.planned
        needed = self.watch.backward_bytes(frozenset(held), untaken)
        if needed <= planned.budget_bytes:
            return
        raise BudgetError(
            f"the budget of {planned.budget_bytes} bytes ({format_bytes(planned.budget_bytes)}) cannot be met for this "
            f"backward pass: {_outputs_held(held) if held else KEPT}. With them the step takes {needed} bytes "
            f"({format_bytes(needed)}). {DROP_OUTPUTS if held else ADD_GRADIENTS}; or raise the budget. No gradient "
            "has been computed yet",
            budget_bytes=planned.budget_bytes,
            minimum_bytes=needed,
            minimum_lower_bound_bytes=min(planned.plans.lower_bound_bytes, needed),
            holder="outputs without a gradient" if held else "gradients beside older ones",
        )


def _outputs_held(held: Mapping[int, _Watched]) -> str:
    more, names = _total_bytes(held.values()), ", ".join(map(str, sorted(held)))
    return f"outputs {names} of the call ({more} bytes, {format_bytes(more)}), without a gradient, are still held"


def _unexpected_tangents(prepared: Prepared, tangents: Iterable[int]) -> BackwardError:
    outputs = sorted(i for i, tangent in prepared.traced.tangents.items() if tangent in tangents)
    names = ", ".join(map(str, outputs))
    return BackwardError(
        f"gradients arrive for outputs {names} of the call, which got none before: the forward pass did not store what "
        "they need. From now on they are planned for: zero the gradients and run the step again; "
        "or pass loss_fn to compile, so that it is known from the start"
    )


def _total_bytes(outputs: Iterable[_Watched]) -> int:
    return sum({output.reference.cdata: output.n_bytes for output in outputs}.values())


@dataclass(frozen=True, eq=False)
class _Input:
    """Refers to an input of the graph, without holding it; ``version`` is that of its contents."""

    reference: Callable[[], Any]
    version: int

    @classmethod
    def of(cls, value: Any) -> _Input:
        return cls(ref(value), _version(value)) if isinstance(value, Tensor) else cls(lambda: value, 0)

    def tensor(self) -> Tensor | None:
        """Returns the input; None if it is gone, or was changed since."""
        value = self.reference()
        return value if isinstance(value, Tensor) and _version(value) == self.version else None


def _version(tensor: Tensor) -> int:
    """Counts the changes of a tensor in place, as autograd does."""
    return tensor._version  # noqa: SLF001 (no public name)


@dataclass(frozen=True)
class _Watched:
    """Refers to the storage of an output, without holding it.

    Attributes:
        reference: to the storage.
        n_bytes: its size.
        n_saved: how many of the tensors that are saved for the backward pass lie in it.
    """

    reference: StorageWeakRef
    n_bytes: int
    n_saved: int

    @classmethod
    def of(cls, output: Tensor, saved: Iterable[Tensor]) -> _Watched:
        storage = output.untyped_storage()
        n_saved = sum(t.untyped_storage()._cdata == storage._cdata for t in saved)
        return cls(StorageWeakRef(storage), storage.nbytes(), n_saved)  # type: ignore[no-untyped-call]

    @property
    def is_held(self) -> bool:
        """Whether anybody but the step itself holds it."""
        if self.reference.expired():  # type: ignore[no-untyped-call]
            return False
        return storage_uses(self.reference) > self.n_saved + PYTHON_USES
