"""Runs the same code on a plain and a compiled model and compares all that is left behind, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxhybrid
from fxhybrid import BudgetError, HybridModule

MARGIN = 1.02  # of the smallest reachable peak; the issue promises that this compiles


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of an output of any kind."""
    if is_dataclass(output) and not isinstance(output, (dict, type)):
        output = [getattr(output, f.name) for f in fields(output)]
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def total(output: Any) -> Tensor:
    """A scalar in which every output with a gradient takes part."""
    return torch.stack([t.float().square().mean() for t in tensors_of(output) if t.requires_grad]).sum()


def tighten(hybrid: HybridModule) -> int:
    """Sets the smallest budget that is promised to work, and returns it."""
    try:
        hybrid.set_budget(1)
    except BudgetError as error:
        budget = int(MARGIN * error.minimum_bytes)
    hybrid.set_budget(budget)
    return budget


@dataclass
class Twins:
    """A plain model and a compiled copy of it, in the same state."""

    plain: nn.Module
    hybrid: HybridModule

    def same(self, run: Callable[[nn.Module], Any], *, seed: int = 7) -> Any:
        """Runs ``run(model)`` on both, requires bit-equal traces, and returns the compiled one's result."""
        results = []
        states = []
        for model in (self.plain, self.hybrid):
            torch.manual_seed(seed)
            result = run(model)
            results.append(result)
            states.append(state_of(model, result))
        assert_same(*states)
        return results[1]


def same_at_both_budgets(pair: Twins, compare: Callable[[], None]) -> None:
    """Compares with all memory, where the capture is bit-equal too, and with the least."""
    compare()
    assert pair.hybrid.report().signatures[0].capture_check.startswith("bit-equal")
    tighten(pair.hybrid)
    compare()


def twins(model: nn.Module, **options: Any) -> Twins:
    """``model`` and a compiled copy; lossless at the budget given (by default, all memory)."""
    options = {"budget": 1.0, "solver": "mps", "compression": "lossless", **options}
    plain = copy.deepcopy(model)
    return Twins(plain, fxhybrid.compile(model, **options))


def tight_twins(model: nn.Module, args: Any, **options: Any) -> Twins:
    """Twins at the smallest budget for ``args`` (a tuple or a dict); asserts that the plan does something."""
    pair = twins(model, example_inputs=args, **options)
    tighten(pair.hybrid)
    assert pair.hybrid.plan.actions, "a tight budget that changes nothing tests nothing"
    return pair


def state_of(model: nn.Module, result: Any = None) -> dict[str, Any]:
    """Everything that a step may have changed, and its result."""
    outputs = {f"output {i}": t.detach().clone() for i, t in enumerate(tensors_of(result))}
    grads = {f"grad {name}": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    kept = {f"state {name}": t.detach().clone() for name, t in model.state_dict().items()}
    return {**outputs, **grads, **kept, "generator": torch.get_rng_state(), "training": model.training}


def assert_same(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Equal names, and equal bits behind them (NaN equals NaN)."""
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        other = found[name]
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            assert value.dtype == other.dtype, name
            equal = torch.equal(value, other) or torch.allclose(value, other, rtol=0, atol=0, equal_nan=True)
            assert equal, f"{name} differs"
        else:
            assert value == other, f"{name}: {value} in eager, {other} compiled"
