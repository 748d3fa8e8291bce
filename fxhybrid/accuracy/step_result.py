"""What a training step leaves behind, and how far two of them differ."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxhybrid.capture.output_structure import output_tensors
from fxhybrid.capture.python_state import undo_of_step

REENTRANT = "CheckpointFunctionBackward"


@dataclass(frozen=True)
class StepResult:
    """Holds everything that a step leaves behind.

    Attributes:
        outputs: tensors that it returned.
        gradients: by parameter name; None where none arrived.
        buffers: by name, after the step.
        rng_state: of the CPU generator, after the step.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    rng_state: Tensor

    def same_bits(self, other: StepResult) -> bool:
        """Says whether two steps left the very same bits behind: outputs, gradients, buffers and generator."""
        if len(self.outputs) != len(other.outputs) or self.buffers.keys() != other.buffers.keys():
            return False
        pairs: list[tuple[Tensor | None, Tensor | None]] = [*zip(self.outputs, other.outputs, strict=True)]
        pairs += [(buffer, other.buffers[name]) for name, buffer in self.buffers.items()]
        pairs += [(gradient, other.gradients[name]) for name, gradient in self.gradients.items()]
        pairs.append((self.rng_state, other.rng_state))
        return all(a is b if a is None or b is None else _same(a, b) for a, b in pairs)

    @property
    def finite(self) -> bool:
        """Whether all outputs and gradients are finite."""
        tensors = [*self.outputs, *(g for g in self.gradients.values() if g is not None)]
        return all(bool(t.isfinite().all()) for t in tensors)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN with NaN."""
    equal = torch.equal(a, b)
    return equal or (a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 0, 0, equal_nan=True))


def observe_step(
    run: Callable[[], Any],
    model: nn.Module,
    *,
    has_loss: bool,
    weighed: Collection[int] | None = None,
    changed: Iterable[Tensor] = (),
    inputs: Iterable[Tensor] = (),
    inputs_count: bool = False,
    seed: int | None = 0,
) -> StepResult:
    """Runs a step at a fixed seed; model, gradients, generator and ``changed`` tensors stay as they were.

    Without a loss, the outputs are weighted with fixed random numbers to get a scalar.

    Args:
        run: does the forward pass.
        model: the user's.
        has_loss: whether the first output is the loss.
        weighed: positions of the outputs that are weighted; None for all.
        changed: tensors that the step writes to.
        inputs: tensors whose gradients are computed too where they need one, as the user's backward pass does: some of
            torch's kernels take another way without, and one of them crashes (group norm in bfloat16, channels_last).
        inputs_count: whether those gradients count like parameters'.
        seed: of the generator; None to go on from where it is.
    """
    with trial_run(model, changed, seed=seed):
        result = run()
        outputs = list(output_tensors(result))
        chosen = outputs if weighed is None else [t for i, t in enumerate(outputs) if i in weighed]
        scalar = outputs[0] if has_loss else _weighted_sum(chosen)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        others = [(f"input {i}", t) for i, t in enumerate(inputs) if t.requires_grad]
        gradients = _gradients(scalar, [t for _, t in [*named, *others]])
        counted = [name for name, _ in [*named, *(others if inputs_count else [])]]
        return StepResult(
            [t.detach().clone() for t in outputs],
            dict(zip(counted, gradients, strict=False)),
            {name: b.detach().clone() for name, b in model.named_buffers()},
            torch.get_rng_state(),
        )


@contextlib.contextmanager
def trial_run(model: nn.Module, changed: Iterable[Tensor] = (), *, seed: int | None = 0) -> Iterator[None]:
    """Lets a step run at a fixed seed, if any; model, generators and ``changed`` tensors are put back afterwards."""
    undo = undo_of_step(model, changed)
    try:
        if seed is not None:
            torch.manual_seed(seed)
        yield
    finally:
        undo()


def _gradients(scalar: Tensor, parameters: list[Any]) -> Sequence[Tensor | None]:
    """Differentiates a step; ``.grad`` and what hangs on it stay as they were."""
    if not parameters:
        return ()
    nodes = autograd_nodes([scalar])
    if not any(node.name() == REENTRANT for node in nodes):
        return torch.autograd.grad(scalar, parameters, allow_unused=True)
    # A reentrant checkpoint gives gradients to ``.grad`` only.
    leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    with _without_gradients(dict.fromkeys([*parameters, *leaves])):
        scalar.backward()  # type: ignore[no-untyped-call]
        return [p.grad for p in parameters]


def autograd_nodes(tensors: Iterable[Tensor]) -> list[Any]:
    """Lists the nodes of autograd's graph behind tensors."""
    found: dict[Any, None] = {}
    pending: list[Any] = [t.grad_fn for t in tensors]
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found[node] = None
            pending += [following for following, _ in node.next_functions]
    return list(found)


@contextlib.contextmanager
def _without_gradients(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Puts gradients away, and the hooks that would use new ones (an optimizer's step)."""
    before = [(leaf, leaf.grad, dict(leaf._post_accumulate_grad_hooks or {})) for leaf in leaves]
    for leaf, _, hooks in before:
        leaf.grad = None
        if hooks:
            leaf._post_accumulate_grad_hooks.clear()
    try:
        yield
    finally:
        for leaf, gradient, hooks in before:
            leaf.grad = gradient
            if hooks:
                leaf._post_accumulate_grad_hooks.update(hooks)


def _weighted_sum(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for t in outputs:
        if t.requires_grad:
            weight = torch.randn(t.shape, generator=generator).to(t.device, t.dtype)
            total = total + (t * weight).sum().to(total.device, total.dtype)
    return total


def relative_difference(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    """Computes ||found - expected|| / ||expected|| over all tensors together; inf where only one of two is None."""
    return float(sum(squared_differences(found, expected).values()) ** 0.5)


def squared_differences(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> dict[str, float]:
    """Computes each tensor's part of the square of :func:`relative_difference`."""
    differences: dict[str, float] = {}
    norm = 0.0
    for name, reference in expected.items():
        value = found[name]
        if value is not None and reference is not None:
            differences[name] = _squared(value - reference)
            norm += _squared(reference)
        else:
            differences[name] = 0.0 if value is None and reference is None else math.inf
    return {name: difference / max(norm, 1e-30) for name, difference in differences.items()}


def _squared(value: Tensor) -> float:
    parts = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return float(parts.double().square().sum())
