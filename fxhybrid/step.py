"""The unit that is captured: a model call and, if given, the loss on top of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxhybrid.errors import InvalidArgument

Loss = Callable[..., Tensor]


class Step(nn.Module):
    """``model(*args, **kwargs)``, then ``loss_fn(output, *loss_args)`` if there is one."""

    def __init__(self, model: nn.Module, loss_fn: Loss | None, return_outputs: bool) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.return_outputs = return_outputs

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], loss_args: tuple[Any, ...]) -> Any:
        output = self.model(*args, **kwargs)
        if self.loss_fn is None:
            return output
        loss = self.loss_fn(output, *loss_args)
        return (loss, output) if self.return_outputs else loss

    def check_result(self, result: Any) -> Any:
        """``result`` if its loss is a scalar.

        Raises:
            InvalidArgument: it is not.
        """
        if self.loss_fn is not None:
            loss = result[0] if self.return_outputs else result
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise InvalidArgument(
                    f"loss_fn must return one scalar tensor, but gave a {found}; reduce it: loss.mean()"
                )
        return result


@dataclass(frozen=True)
class StepCall:
    """The arguments of one call of a step."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss_args: tuple[Any, ...]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.args, self.kwargs, self.loss_args))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the call."""
        return [leaf for leaf in pytree.tree_leaves(list(self)) if isinstance(leaf, Tensor)]

    def detached(self) -> StepCall:
        """The same arguments, cut off from what computed them: a trial run must leave that graph alone."""

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.is_leaf:
                return leaf
            return leaf.detach().requires_grad_()

        return StepCall(*pytree.tree_map(cut, tuple(self)))


def check_call(call: StepCall, model: nn.Module) -> None:
    """Refuses leaves that cannot be guarded and tensors that are not where the model is.

    Raises:
        InvalidArgument: names the argument and the way out.
    """
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise InvalidArgument("a lazy module of the model has no weights yet; run the plain model once before")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise InvalidArgument(f"the model's parameters are on several devices ({names}); move it to one")
    if any(device.type == "meta" for device in devices):
        raise InvalidArgument("the model is on the meta device, without data; give it some: model.to_empty(device=...)")
    named = {"argument ": call.args, "keyword ": call.kwargs, "loss_args ": call.loss_args}
    for (kind, *rest), leaf in pytree.tree_leaves_with_path(named):
        where = str(getattr(kind, "key", "")) + pytree.keystr(tuple(rest))
        if isinstance(leaf, Tensor):
            if devices and leaf.device not in devices and leaf.dim() > 0:
                device = next(iter(devices))
                raise InvalidArgument(
                    f"{where} is on {leaf.device}, the model on {device}; move it: x.to({str(device)!r})"
                )
        elif leaf is not None and not isinstance(leaf, (bool, int, str)):
            raise InvalidArgument(
                f"{where} is a {type(leaf).__name__}; only tensors, bool, int, str and None can be passed: "
                "make it a tensor or an attribute of the model"
            )


@dataclass(frozen=True)
class StepResult:
    """Everything that a step leaves behind.

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
        """Whether two steps left the very same bits behind: outputs, gradients, buffers and generator."""
        if len(self.outputs) != len(other.outputs) or self.buffers.keys() != other.buffers.keys():
            return False
        pairs: list[tuple[Tensor | None, Tensor | None]] = [*zip(self.outputs, other.outputs, strict=True)]
        pairs += [(buffer, other.buffers[name]) for name, buffer in self.buffers.items()]
        pairs += [(gradient, other.gradients[name]) for name, gradient in self.gradients.items()]
        pairs.append((self.rng_state, other.rng_state))
        return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def observe_step(
    run: Callable[[], Any], model: nn.Module, *, has_loss: bool, changed: Iterable[Tensor] = (), seed: int = 0
) -> StepResult:
    """Runs a step at a fixed seed; model, gradients, generator and ``changed`` tensors stay as they were.

    Without a loss, the outputs are weighted with fixed random numbers to get a scalar.
    """
    with _restored([*model.buffers(), *changed]), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        result = run()
        outputs = list(output_tensors(result))
        scalar = outputs[0] if has_loss else _weighted_sum(outputs)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        parameters = [p for _, p in named]
        gradients = torch.autograd.grad(scalar, parameters, allow_unused=True) if parameters else ()
        return StepResult(
            [t.detach().clone() for t in outputs],
            {name: g for (name, _), g in zip(named, gradients, strict=True)},
            {name: b.detach().clone() for name, b in model.named_buffers()},
            torch.get_rng_state(),
        )


def output_tensors(output: Any, _within: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """The tensors of a model's output in order: containers, dataclasses and plain objects are looked into."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and id(leaf) not in _within:
            yield from output_tensors(list(vars(leaf).values()), (*_within, id(leaf)))


def _weighted_sum(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for t in outputs:
        if t.requires_grad:
            weight = torch.randn(t.shape, generator=generator).to(t.device, t.dtype)
            total = total + (t * weight).sum().to(total.device, total.dtype)
    return total


@contextlib.contextmanager
def _restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    before = [(t, t.detach().clone()) for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def relative_difference(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    """||found - expected|| / ||expected|| over all tensors together; inf where only one of two is None."""
    return float(sum(squared_differences(found, expected).values()) ** 0.5)


def squared_differences(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> dict[str, float]:
    """Each tensor's part of the square of :func:`relative_difference`."""
    differences: dict[str, float] = {}
    norm = 0.0
    for name, reference in expected.items():
        value = found[name]
        if value is not None and reference is not None:
            differences[name] = float((value - reference).double().square().sum())
            norm += float(reference.double().square().sum())
        else:
            differences[name] = 0.0 if value is None and reference is None else math.inf
    return {name: difference / max(norm, 1e-30) for name, difference in differences.items()}
