"""The unit that is captured: a model call and, if given, the loss on top of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any

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
        """Returns the outputs, the loss, or both."""
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
        values = (*self.args, *self.kwargs.values(), *self.loss_args)
        if all(isinstance(value, (Tensor, bool, int, float, str, NoneType)) for value in values):
            return [value for value in values if isinstance(value, Tensor)]
        return [leaf for leaf in pytree.tree_leaves(list(self)) if isinstance(leaf, Tensor)]

    def unmarked(self, tensors: Iterable[Tensor]) -> StepCall:
        """The same without ``torch._dynamo.mark_dynamic``'s marks, which mean another compiler; shares all memory.

        Args:
            tensors: those of the call.
        """
        if not any(map(_is_marked, tensors)):
            return self

        def alias(leaf: Any) -> Any:
            return leaf.view_as(leaf) if isinstance(leaf, Tensor) and _is_marked(leaf) else leaf

        return StepCall(*pytree.tree_map(alias, tuple(self)))

    def detached(self) -> StepCall:
        """The same arguments, cut off from what computed them: a trial run must leave that graph alone."""

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.is_leaf:
                return leaf
            return leaf.detach().requires_grad_()

        return StepCall(*pytree.tree_map(cut, tuple(self)))


def _is_marked(tensor: Tensor) -> bool:
    return hasattr(tensor, "_has_dynamo_dim_marking")  # all of Dynamo's marks of dimensions set it


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
        elif leaf is not None and not isinstance(leaf, (bool, int, float, str)):
            raise InvalidArgument(
                f"{where} is a {type(leaf).__name__}; only tensors, bool, int, float, str and None can be passed: "
                "make it a tensor or an attribute of the model"
            )
