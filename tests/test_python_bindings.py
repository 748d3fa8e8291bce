"""torch's functions that halves of a step call in the place of operators call these very operators."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxhybrid.passes.python_bindings import FUNCTIONS

aten = torch.ops.aten
X, Y, ROW = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)
IMAGES, KERNEL = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
CALLS: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    aten.add.Tensor: ((X, Y), {"alpha": 2}),
    aten.add_.Tensor: ((X, Y), {"alpha": 2}),
    aten.addmm.default: ((torch.randn(4), X, Y.t()), {"beta": 0.5}),
    aten.bmm.default: ((X[None], Y.t()[None]), {}),
    aten.clone.default: ((X,), {"memory_format": torch.contiguous_format}),
    aten.convolution.default: ((IMAGES, KERNEL, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), {}),
    aten.div.Tensor: ((X, Y), {}),
    aten.embedding.default: ((X, torch.tensor([1, 3]), 0), {}),
    aten.expand.default: ((ROW, [4, 6]), {}),
    aten.gelu.default: ((X,), {"approximate": "tanh"}),
    aten.mean.dim: ((X, [0], True), {}),
    aten.mm.default: ((X, Y.t()), {}),
    aten.mul.Tensor: ((X, torch.tensor(2.0)), {}),
    aten.mul_.Tensor: ((X, torch.tensor(2.0)), {}),
    aten.native_layer_norm.default: ((X, [6], ROW, None, 1e-5), {}),
    aten.permute.default: ((X, [1, 0]), {}),
    aten.select.int: ((X, 0, 1), {}),
    aten.squeeze.dim: ((X[None], 0), {}),
    aten.sub.Tensor: ((X, Y), {}),
    aten.sum.dim_IntList: ((X, [0], True), {"dtype": torch.float64}),
    aten.transpose.int: ((X, 0, 1), {}),
    aten.unsqueeze.default: ((X, 0), {}),
    aten.view.default: ((X, [3, 8]), {}),
}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operator", FUNCTIONS, ids=str)
def test_calls_the_operator(operator: Any) -> None:
    args, kwargs = CALLS.get(operator, ((X,), {}))
    again, once = (copy.deepcopy(args) for _ in range(2))  # some write into an argument
    with Recorder() as recorder:
        found = FUNCTIONS[operator](*once, **kwargs)
    assert recorder.operators == [operator]
    expected = operator(*again, **kwargs)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs)
