"""Run: the two graphs as one differentiable call that lets go of every tensor at its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fxhybrid.capture.output_structure import output_handlers, tangent_outputs
from fxhybrid.errors import BackwardError
from fxhybrid.ops.leaf_nodes import leaf_nodes
from fxhybrid.ops.leaf_takers import LeafNotes, LeafTakers, Updates
from fxhybrid.ops.take_gradient import Taker, taking
from fxhybrid.passes.gradient_takes import taking_gradients
from fxhybrid.passes.split import PartialBackward, SplitGraphs, backward_without
from fxhybrid.passes.step_interface import StepInterface
from fxhybrid.torch_internals import DisableAutocast, TensorAlias, graph_is_kept

TWICE_DIFFERENTIATED = (
    "create_graph=True asks for gradients that can be differentiated again; a planned step computes them once. "
    "Call torch.autograd.grad(..., create_graph=True) inside the model's forward or inside loss_fn: there the inner "
    "gradient is planned as part of the step. Or use the plain model for this call"
)
UPDATED = (
    "step_in_backward=True has updated parameters since this call, in the backward pass of another one; call the "
    "module again, or put both calls into one module"
)
UNEXPECTED = "gradients arrive for outputs {outputs} of the call, for which its forward pass stored nothing"


@dataclass(frozen=True, eq=False)
class LateBackward:
    """Holds a backward half for tangents that were not expected.

    Attributes:
        module: takes saved values, inputs, then tangents; returns the gradients.
        saved: which of the call's saved values it takes, by position.
        inputs: the inputs that it takes.
        peak_bytes: its peak, where the caller holds no outputs.
    """

    module: nn.Module
    saved: tuple[int, ...]
    inputs: tuple[Tensor | None, ...]
    peak_bytes: int


class LeftOut(Protocol):
    """Is what a call did not store, though its backward half takes it."""

    def restore(self, saved: list[Tensor | None]) -> None:
        """Recomputes it, in place of the empty tensors among the saved values.

        Raises:
            BackwardError: what it is made from was changed since.
        """


class Opened(Protocol):
    """Is a call whose backward pass has not begun."""

    @property
    def left_out(self) -> LeftOut | None:
        """What is recomputed when the backward half begins."""

    @property
    def leaf_notes(self) -> LeafNotes:
        """What is known of the call's inputs."""

    def begins(self, present: frozenset[int], untaken: frozenset[int]) -> LateBackward | None:
        """Is told that the backward pass begins; returns what runs in place of the plan's.

        Args:
            present: positions of the tangents that arrive.
            untaken: positions of the inputs whose gradients are kept to the end, though they were to be added at once.

        Raises:
            FxHybridError: it cannot run; nothing has been done yet.
        """


Enter = Callable[[list[Tensor], Sequence[Any], Sequence[Any]], Opened]


class StepFunction:
    """A split step as a function over the graph's flat inputs.

    Attributes:
        graphs: the halves that run now; may be replaced between steps.
    """

    def __init__(
        self,
        graphs: SplitGraphs,
        interface: StepInterface,
        metadata: Any,
        *,
        absent: frozenset[int] = frozenset(),
        adding: frozenset[int] = frozenset(),
        updates: Updates | None = None,
        enter: Enter | None = None,
    ) -> None:
        """Prepares a step from its halves, its joint graph's interface and AOTAutograd's metadata of the capture.

        Args:
            graphs: the halves.
            interface: of the graph with the branches of all tangents.
            metadata: of the capture.
            absent: positions of the tangents whose branches the halves leave out.
            adding: positions of the inputs whose gradients are added to those that exist as soon as they are made.
            updates: what updates parameters by gradients that the graphs hand over; None where they are returned.
            enter: takes saved values, outputs and inputs after a forward pass; what it returns lives until the backward
                pass begins, or with the graph if that is retained. It may put others in place of saved values.
        """
        self.graphs = graphs
        self.absent = absent
        self.leaves = LeafTakers(adding, interface.gradient_values, updates)
        self.enter = enter
        self._parts: WeakKeyDictionary[SplitGraphs, dict[frozenset[int], PartialBackward]] = WeakKeyDictionary()
        self.mutated: tuple[int, ...] = tuple(metadata.mutated_inp_runtime_indices)
        self.gradient_tangents = interface.gradient_tangents
        self.with_gradient = tuple(i for i, sources in enumerate(self.gradient_tangents) if sources)
        self.cut_off = tuple(
            i for i in interface.tensor_inputs if not self.gradient_tangents[i] and i not in self.mutated
        )
        self.tangent_values = interface.tangent_values
        self.tensor_inputs = interface.tensor_inputs
        self.aliased = frozenset(metadata.aliased_out_indices)
        self.fresh_views = frozenset(metadata.unsafe_view_out_indices)
        infos = metadata.output_info
        self.n_outputs = len(infos)
        self.constant = tuple(i for i, info in enumerate(infos) if not info.requires_grad)
        self.handlers = output_handlers(metadata)
        self.tangent_outputs = tangent_outputs(metadata)

    def part(self, graphs: SplitGraphs, absent: frozenset[int]) -> PartialBackward:
        """Returns the backward half of ``graphs`` where some tangents do not arrive; built when first needed."""
        parts, adding = self._parts.setdefault(graphs, {}), self.leaves.adding
        if absent not in parts:
            n_arguments = graphs.n_saved + len(graphs.resident_inputs) + len(self.tangent_values)
            whole = PartialBackward(graphs.backward, tuple(range(n_arguments)))
            part = backward_without(graphs, absent) if absent else whole
            parts[absent] = replace(part, module=taking_gradients(part.module, adding)) if adding else part
        return parts[absent]

    def looks_at_leaves(self, notes: LeafNotes | None) -> bool:
        """Tells whether a backward pass has anything to do with what adds gradients to leaves."""
        return self.leaves.are_taken or (notes is not None and not all(map(notes.is_known, self.with_gradient)))

    def __call__(self, *flat_inputs: Any) -> list[Any]:
        """Runs the forward graph, writes mutations back and gives the user outputs."""
        results = list(_Step.apply(self, *self._without_history(flat_inputs)))  # type: ignore[no-untyped-call]
        if not self.aliased:
            return results[: self.n_outputs]
        with torch.enable_grad():
            inputs = list(flat_inputs)
            return [handle(inputs, results, out) for handle, out in zip(self.handlers, results, strict=False)]

    def _without_history(self, flat_inputs: tuple[Any, ...]) -> list[Any]:
        """Cuts off what computed inputs that get no gradient: autograd would go there, to an older step's graph."""
        inputs = list(flat_inputs)
        for i in self.cut_off:
            if inputs[i].grad_fn is not None:
                inputs[i] = inputs[i].detach()
        return inputs


class _Step(torch.autograd.Function):
    """One training step; flat inputs in, user outputs (aliases wrapped) out.

    Gradients of the outputs arrive in a list of their own, so that each one dies at its last use.
    """

    boxed_grads_call = True

    @staticmethod
    def forward(ctx: Any, step: StepFunction, *flat_inputs: Any) -> tuple[Any, ...]:
        graphs = step.graphs
        with DisableAutocast():
            results = list(graphs.run_forward(list(flat_inputs)))
        saved = results[graphs.n_forward_outputs :]
        del results[graphs.n_forward_outputs :]
        n_mutated = len(step.mutated)
        if n_mutated:  # one call for all: each batch norm has three running statistics
            torch.ops.aten._foreach_copy_.default([flat_inputs[i] for i in step.mutated], results[:n_mutated])
        outputs = results[n_mutated:]
        del results
        for i in step.fresh_views:
            outputs[i] = torch.ops.aten._unsafe_view(outputs[i], outputs[i].shape)
        if step.enter is not None:
            ctx.entered = step.enter(saved, outputs, flat_inputs)
        for i in step.aliased:
            outputs[i] = TensorAlias(outputs[i])
        ctx.save_for_backward(*saved, *(flat_inputs[i] for i in graphs.resident_inputs))
        ctx.step, ctx.graphs = step, graphs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(outputs[i] for i in step.constant if isinstance(outputs[i], Tensor)))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, output_gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackwardError(TWICE_DIFFERENTIATED)
        step: StepFunction = ctx.step
        arrived = [output_gradients[i] for i in step.tangent_outputs]
        output_gradients.clear()
        present = frozenset(i for i, tangent in enumerate(arrived) if tangent is not None)
        entered = ctx.entered if step.enter is not None and present else None
        notes = None if entered is None else entered.leaf_notes
        nodes = leaf_nodes(ctx, step.tensor_inputs) if step.looks_at_leaves(notes) else {}
        takers = step.leaves.takers(nodes)
        late = None if entered is None else entered.begins(present, step.leaves.untaken(nodes, takers))
        left_out = None if entered is None else entered.left_out
        del entered
        if present & step.absent and late is None:
            raise BackwardError(UNEXPECTED.format(outputs=[step.tangent_outputs[k] for k in present & step.absent]))
        if not graph_is_kept():
            ctx.entered = None
        if not present:
            return (None, *(None for _ in step.gradient_tangents))
        arguments = _take_saved(ctx, step, left_out)
        del left_out
        if late is not None:
            arguments = [*(arguments[i] for i in late.saved), *late.inputs]
        arguments += [_tangent(t, like) for t, like in zip(arrived, step.tangent_values, strict=True)]
        absent = frozenset(range(len(arrived))) - present - step.absent
        del arrived
        run = ctx.graphs.run_backward if late is None else late.module.forward
        if late is None and (absent or step.leaves.adding):
            part = step.part(ctx.graphs, absent)
            arguments, run = [arguments[i] for i in part.reads], part.module.forward
        if late is None and not takers and not ctx.graphs.hands_gradients_over and not step.leaves.are_taken:
            with DisableAutocast():
                made = run(arguments)
        else:
            made = _made_and_taken(run, arguments, {} if late else takers)
        if len(present) < len(step.tangent_values):
            made = [g if sources & present else None for g, sources in zip(made, step.gradient_tangents, strict=True)]
        if notes is not None and nodes:
            step.leaves.watch(notes, nodes, made, {} if late else takers)
        return (None, *made)


def _made_and_taken(
    run: Callable[..., Sequence[Any]], arguments: list[Tensor | None], takers: Mapping[int, Taker]
) -> list[Tensor | None]:
    """Returns the gradients that a backward half makes, but for those that were taken."""
    with DisableAutocast(), taking(takers) as kept:
        made = run(arguments)
    return [kept.get(i) if gradient is None else gradient for i, gradient in enumerate(made)]


def step_of(node: Any) -> StepFunction | None:
    """Returns the step that a node of autograd's graph belongs to; None for nodes of other functions."""
    return node.step if getattr(type(node), "_forward_cls", None) is _Step else None


def _take_saved(ctx: Any, step: StepFunction, left_out: LeftOut | None) -> list[Tensor | None]:
    """The saved tensors, no longer held by autograd unless the graph is retained, with what was left out."""
    try:
        saved: list[Tensor | None] = list(ctx.saved_tensors)
    except RuntimeError as error:  # they were changed in place
        if step.leaves.updates is None:
            raise
        raise BackwardError(UPDATED) from error
    ctx.maybe_clear_saved_tensors()
    if left_out is not None:
        left_out.restore(saved)
    return saved


def _tangent(tangent: Tensor | None, like: Tensor) -> Tensor | None:
    """The tangent in the strides that the graph was traced with."""
    if tangent is None or tangent.stride() == like.stride():
        return tangent
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(tangent)
