"""One operator of PyTorch's operator database as a module, and what becomes of it when it is compiled."""

from __future__ import annotations

import itertools
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxhybrid
from benchmarks.lib.results import Record
from fxhybrid import BudgetError, FxHybridError, HybridModule
from fxhybrid.accuracy.step_result import StepResult, observe_step
from fxhybrid.profiling import op_profiler

RIGHT, REFUSED, UNCLEAR, WRONG, CRASH = "right", "refused", "unclear", "wrong", "crash"
NOT_IN_EAGER = "no gradient in eager"
WORST_LAST = (NOT_IN_EAGER, RIGHT, REFUSED, UNCLEAR, WRONG, CRASH)
CANDIDATES = 12  # samples that are tried in eager
UNCLEAR_TEXTS = ("tracing the step fails", "the traced graph does not compute", "cannot measure", "no cost is known")


class OperatorModule(nn.Module):
    """Calls an operator on a sample whose differentiable tensors are parameters, and whose others are inputs."""

    def __init__(self, function: Callable[..., Any], finish: Callable[[Any], Any], arguments: Any) -> None:
        super().__init__()
        leaves, self.spec = pytree.tree_flatten(arguments)
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.function, self.finish = function, finish
        self.trained = [i for i in tensors if leaves[i].requires_grad]
        self.given = [i for i in tensors if not leaves[i].requires_grad]
        self.parts = nn.ParameterList(nn.Parameter(leaves[i].detach().clone()) for i in self.trained)
        self.constants = [None if i in tensors else leaf for i, leaf in enumerate(leaves)]

    def forward(self, *inputs: Tensor) -> Any:
        """Returns what the operator gives for values that depend on the parameters."""
        leaves = list(self.constants)
        for i, parameter in zip(self.trained, self.parts, strict=True):
            leaves[i] = parameter * 1
        for i, value in zip(self.given, inputs, strict=True):
            leaves[i] = value
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.finish(self.function(*args, **kwargs))


@dataclass(frozen=True, eq=False)
class Trial:
    """Holds one sample of an operator: the module, its inputs, and whether the loss is planned with it."""

    module: OperatorModule
    inputs: tuple[Tensor, ...]
    with_loss: bool

    def eager(self) -> StepResult:
        """Runs the plain step."""
        return self._observe(lambda: self.module(*self.inputs), False)

    def hybrid(self, hybrid: HybridModule) -> StepResult:
        """Runs the planned step."""
        return self._observe(lambda: hybrid(*self.inputs), self.with_loss)

    def compiled(self) -> HybridModule:
        """Compiles the module, lossless, at the save-all peak."""
        options: dict[str, Any] = {"loss_fn": loss, "return_outputs": True} if self.with_loss else {}
        module = self.module.train()
        return fxhybrid.compile(
            module, budget=1.0, compression="lossless", solver="mps", example_inputs=self.inputs, **options
        )

    def _observe(self, run: Callable[[], Any], has_loss: bool) -> StepResult:
        def step() -> Any:
            result = run()
            return result if has_loss else (loss(result), result)

        return observe_step(step, self.module, has_loss=True, changed=self.inputs)


def loss(output: Any) -> Tensor:
    """Returns the sum of squares of all outputs that have a gradient."""
    found = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([t.abs().square().sum().double() for t in found]).sum()


def operators() -> dict[str, Any]:
    """Returns the database's operators that have a gradient in float32 on the CPU, by name."""
    from torch.testing._internal import common_methods_invocations as database

    # Random operators stand in a wrapper that sets the generator within the call; here each step sets it before.
    vars(database)["wrapper_set_seed"] = lambda operator, *args, **kwargs: operator(*args, **kwargs)
    found = [op for op in database.op_db if op.supports_autograd and torch.float32 in op.supported_dtypes("cpu")]
    return {op.formatted_name: op for op in found}


def serve(pipe: Any, n_samples: int) -> None:
    """Answers each name that comes through a pipe with the operator's record."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    op_profiler.cache_bytes = lambda: 1 << 12  # times do not matter here, and filling caches takes longest
    known = operators()
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        pipe.send({"key": name} | try_operator(known[name], n_samples))
        torch.compiler.reset()


def try_operator(operator: Any, n_samples: int) -> Record:
    """Returns the worst result of an operator's samples, and what it says."""
    try:
        results = [try_sample(trial) for trial in trials(operator, n_samples)]
    except Exception as error:  # noqa: BLE001 (samples of some operators cannot be made on every machine)
        return {"result": NOT_IN_EAGER, "text": f"no samples: {error}"}
    found, text = max(results, key=lambda result: WORST_LAST.index(result[0]), default=(NOT_IN_EAGER, ""))
    return {"result": found, "text": text}


def trials(operator: Any, n_samples: int) -> Iterator[Trial]:
    """Yields trials for the first samples that eager can differentiate, and gives the same twice."""
    torch.manual_seed(0)
    n_found = 0
    for sample in itertools.islice(operator.sample_inputs("cpu", torch.float32, requires_grad=True), CANDIDATES):
        arguments = ((sample.input, *sample.args), sample.kwargs)
        module = OperatorModule(operator.op, sample.output_process_fn_grad, arguments)
        leaves = pytree.tree_leaves(arguments)
        inputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.requires_grad)
        trial = Trial(module, inputs, with_loss=n_found % 2 == 0)
        if _repeats_in_eager(trial):
            yield trial
            n_found += 1
        if n_found == n_samples:
            return


def _repeats_in_eager(trial: Trial) -> bool:
    try:
        first, second = trial.eager(), trial.eager()
    except Exception:  # noqa: BLE001 (eager raises anything where it has no gradient)
        return False
    return first.same_bits(second) and any(g is not None for g in first.gradients.values())


def try_sample(trial: Trial) -> tuple[str, str]:
    """Compiles one sample and compares its steps, with all memory and with the least, with eager's."""
    try:
        expected = trial.eager()
        hybrid = trial.compiled()
        for budget in ("save-all", "smallest"):
            found = trial.hybrid(hybrid) if budget == "save-all" else at_smallest_budget(trial, hybrid)
            if not found.same_bits(expected):
                return WRONG, f"{difference(found, expected)} at the {budget} peak"
    except FxHybridError as error:
        clear = not any(text in str(error) for text in UNCLEAR_TEXTS)
        return (REFUSED if clear else UNCLEAR), f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 (any foreign exception is a fault that is recorded)
        return CRASH, f"{type(error).__name__}: {error}"[:1000] + "".join(traceback.format_tb(error.__traceback__)[-3:])
    return RIGHT, ""


def at_smallest_budget(trial: Trial, hybrid: HybridModule) -> StepResult:
    """Runs a step at the smallest budget for which a plan is known, for outputs that the caller holds, if need be."""
    hybrid.set_budget(smallest_bytes(hybrid))
    try:
        return trial.hybrid(hybrid)
    except BudgetError as error:
        hybrid.set_budget(error.minimum_bytes)
        return trial.hybrid(hybrid)


def smallest_bytes(hybrid: HybridModule) -> int:
    """Returns the smallest budget for which a plan is known."""
    try:
        hybrid.set_budget(1)
    except BudgetError as error:
        return error.minimum_bytes
    return 1


def difference(found: StepResult, expected: StepResult) -> str:
    """Says what differs between two steps, and by how much."""
    if len(found.outputs) != len(expected.outputs):
        return f"{len(found.outputs)} outputs instead of {len(expected.outputs)}"
    pairs: list[tuple[str, Tensor | None, Tensor | None]] = [
        (f"output {i}", a, b) for i, (a, b) in enumerate(zip(found.outputs, expected.outputs, strict=True))
    ]
    pairs += [(f"gradient {name}", found.gradients[name], b) for name, b in expected.gradients.items()]
    pairs.append(("generator", found.rng_state, expected.rng_state))
    texts = []
    for name, a, b in pairs:
        if a is None or b is None:
            if a is not b:
                texts.append(f"{name} is None in one of both")
        elif a.shape != b.shape or a.dtype != b.dtype:
            texts.append(f"{name}: {a.dtype} {list(a.shape)} instead of {b.dtype} {list(b.shape)}")
        elif not torch.allclose(a, b, 0, 0, equal_nan=True):
            texts.append(f"{name} by {float((a - b).abs().nan_to_num().max()):.1e}")
    return "; ".join(texts) + " differ"
