"""Autograd's nodes that add gradients to leaves, and what an autograd function may do in their place.

A gradient may be added to ``.grad`` before autograd would, if nothing sees the difference: no hook, no graph of the
gradient itself, and no other summand from elsewhere in the same backward pass, which autograd would add first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxhybrid.torch_internals import node_will_run

ACCUMULATE = "torch::autograd::AccumulateGrad"


def leaf_nodes(function: Any, tensor_inputs: Sequence[int]) -> Mapping[int, Any]:
    """Finds the nodes that add to a leaf behind an autograd function.

    Args:
        function: the node of the function, which is its context.
        tensor_inputs: positions of its tensors among all its inputs.

    Returns:
        The nodes by position of the input.
    """
    following = function.next_functions
    if len(following) != len(tensor_inputs):
        return {}
    pairs = zip(tensor_inputs, following, strict=True)
    return {i: node for i, (node, _) in pairs if node is not None and node.name() == ACCUMULATE}


def will_add(node: Any) -> bool:
    """Tells whether the backward pass that runs adds to the leaf: ``torch.autograd.grad`` does not."""
    try:
        return bool(node_will_run(node))
    except RuntimeError:  # so it answers for the leaves of torch.autograd.grad
        return False


def may_add(leaf: Tensor, like: Tensor) -> bool:
    """Tells whether a gradient can be added to what a leaf has already, with nobody to see that.

    Args:
        leaf: a parameter.
        like: has shape, type and device of the gradient.
    """
    present = leaf.grad
    return (
        present is not None
        and present.layout is torch.strided
        and not present.requires_grad
        and (present.shape, present.dtype, present.device) == (like.shape, like.dtype, like.device)
        and not has_hooks(leaf)
    )


def has_hooks(leaf: Tensor) -> bool:
    """Tells whether somebody is to see a leaf's gradient."""
    return bool(leaf._backward_hooks or leaf._post_accumulate_grad_hooks)


def when_added(node: Any, returned: Tensor | None, tell: Callable[[bool], None]) -> None:
    """Tells, before a leaf's node runs, whether what an autograd function returned is all that arrives there.

    Args:
        node: of the leaf.
        returned: the gradient that the function returned; None for none.
        tell: is called once, with the answer.
    """
    expected = _contents(returned)

    def hook(gradients: tuple[Tensor | None]) -> None:
        handle.remove()
        (found,) = gradients
        tell(_contents(found) == expected)

    handle = node.register_prehook(hook)


def _contents(gradient: Tensor | None) -> tuple[int, int] | None:
    """Tells a gradient's contents from others: summands may be added in place."""
    return None if gradient is None else (gradient.data_ptr(), gradient._version)  # noqa: SLF001 (no public name)
