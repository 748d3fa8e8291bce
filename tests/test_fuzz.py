"""Random modules against eager: equal bits, within the budget, or refused by a clear error."""

from __future__ import annotations

import copy
import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn

import fxhybrid
from fxhybrid import BudgetError, FxHybridError, HybridModule, measure_step
from fxhybrid.accuracy.step_result import relative_difference
from fxhybrid.profiling import op_profiler
from tests.compare import assert_same, state_of, tensors_of
from tests.fuzz_models import Case, RandomModule, cases, inputs

KEPT = 10  # cases
CI_EXAMPLES = 27  # in about 25 seconds
MAX_ERROR = 0.1
ROUNDED = ("recurrent",)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.05}  # theirs, relative to the largest value
SEED = 0  # of every step: the gradient error is promised for the random numbers that it was measured with
RIGHT, ACCUMULATED = "right", "right; older gradients leave no room in the budget"
HELD = "without a gradient, are still"  # the smallest plans expect that such outputs are dropped
FRESH = ("mean", "normed", "in a dict")  # forms of outputs that share no memory with others
UNCLEAR = ("tracing the step fails", "the traced graph does not compute", "cannot measure", "no cost is known")


class Loss(nn.Module):
    """A scalar in which the chosen outputs take part."""

    def __init__(self, chosen: tuple[int, ...]) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(self, outputs: list[Any]) -> Tensor:
        found = [t for i in self.chosen for t in tensors_of(outputs[i])]
        return torch.stack([(t * t.sigmoid()).float().sum() for t in found]).sum()


def chosen_outputs(case: Case, outputs: list[Any]) -> list[Tensor]:
    return [t for i in case.chosen for t in tensors_of(outputs[i]) if t.requires_grad]


def tangents(outputs: list[Tensor]) -> list[Tensor]:
    """Random gradients in the outputs' layout: sums over gradients in another layout are rounded in another way."""
    generator = torch.Generator().manual_seed(2)
    return [torch.empty_like(t).copy_(torch.randn(t.shape, dtype=t.dtype, generator=generator)) for t in outputs]


def backward(case: Case, results: list[Any]) -> None:
    """One backward pass through the results of all calls."""
    if case.loss:
        outputs: list[Tensor] = results
        given: list[Tensor | None] = [None] * len(results)
    else:
        outputs = [t for result in results for t in chosen_outputs(case, result)]
        given = [*tangents(outputs)]
    torch.autograd.backward(outputs, given)


def train(model: nn.Module, case: Case) -> dict[str, Any]:
    """Runs one step, plain or compiled; returns everything that it leaves behind."""
    torch.manual_seed(SEED)
    args = inputs(case)
    results = [model(*args) for _ in range(case.calls)]
    if case.loss and not isinstance(model, HybridModule):
        results = [Loss(case.chosen)(result) for result in results]
    backward(case, results)
    flags = [t.requires_grad for t in tensors_of(results)]
    return {**state_of(model, results), "input's gradient": args[0].grad, "requires_grad": flags}


def check(case: Case) -> str:
    """Compares a case with eager; says that it is right, or why it is refused."""
    torch.manual_seed(SEED)
    plain = RandomModule(case).train()
    try:
        train(without_crashes(copy.deepcopy(plain)), case)
    except RuntimeError:
        assume(False)  # eager refuses it
    options: dict[str, Any] = {"loss_fn": Loss(case.chosen)} if case.loss else {}
    options |= {"compression": case.compression, "max_grad_error": MAX_ERROR, "solver": "mps"}
    try:
        hybrid = fxhybrid.compile(copy.deepcopy(plain), budget=1.0, example_inputs=inputs(case), **options)
    except FxHybridError as error:
        return reason(error)
    budget, start = choose_budget(hybrid, case.budget), copy.deepcopy(plain)
    try:
        compare(plain, hybrid, case)
    except BudgetError as error:
        if HELD not in str(error):
            raise
        budget = error.minimum_bytes
    if budget != hybrid.plan.budget_bytes:  # the way out that the error names, from the start
        plain = start
        hybrid = fxhybrid.compile(copy.deepcopy(plain), budget=budget, example_inputs=inputs(case), **options)
        compare(plain, hybrid, case)
    if case.accumulate:
        try:
            compare(plain, hybrid, case)
        except BudgetError:
            return ACCUMULATED
    if case.compression != "auto":  # the gradient error is promised for the planned batch
        for n_rows in case.later:
            compare_at(plain, hybrid, replace(case, size=(n_rows, *case.size[1:])))
    check_peak(hybrid, case, budget)
    return RIGHT


def without_crashes(plain: nn.Module) -> nn.Module:
    """Leaves out what torch's own kernel dies in: group norm's backward pass in channels_last for weights alone."""

    def look(module: nn.Module, args: tuple[Tensor]) -> None:
        is_image = args[0].dim() == 4 and args[0].is_contiguous(memory_format=torch.channels_last)
        assume(args[0].requires_grad or not is_image or not any(p.requires_grad for p in module.parameters()))

    for module in plain.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(look)
    return plain


def reason(error: FxHybridError) -> str:
    """The first line of a refusal, which names what the module does."""
    assert not any(text in str(error) for text in UNCLEAR), f"unclear: {error}"
    return f"refused: {type(error).__name__}: {str(error).splitlines()[0]}"


def choose_budget(hybrid: HybridModule, place: float) -> int:
    """Moves to a budget between the smallest peak and that of save-all."""
    largest = hybrid.plan.budget_bytes
    with pytest.raises(BudgetError) as error:
        hybrid.set_budget(1)
    smallest = error.value.minimum_bytes
    budget = smallest + int(place * (largest - smallest))
    hybrid.set_budget(budget)
    return budget


def compare(plain: nn.Module, hybrid: HybridModule, case: Case) -> None:
    """Runs a step of both: the same bits, or gradients within the promised error and all else the same bits."""
    is_rounded = any(layer.name in ROUNDED for layer in case.layers) or shares_memory(plain, case)
    if case.breaks:  # of what several graphs read each has a gradient, and those are added
        is_rounded |= case.tied or bool(case.outputs) or any(layer.back > 1 for layer in case.layers)
    expected, found = train(plain, case), train(hybrid, case)
    if case.compression == "auto":
        is_rounded |= bool(hybrid.plan.channels_last)
        states = [{k: v for k, v in state.items() if k.startswith("grad ")} for state in (found, expected)]
        error = relative_difference(*states)
        assert error <= MAX_ERROR, f"the gradient's error is {error}"
        lossy = {*states[0], "input's gradient"}
        expected, found = ({k: v for k, v in state.items() if k not in lossy} for state in (expected, found))
    if is_rounded:
        assert_close(expected, found)
    else:
        assert_same(expected, found)


def compare_at(plain: nn.Module, hybrid: HybridModule, case: Case) -> None:
    """Does so at another size, where eager takes it and plans do not rely on outputs that are held here."""
    plain.zero_grad()
    hybrid.zero_grad()
    try:
        train(copy.deepcopy(plain), case)
    except (RuntimeError, ValueError):
        return
    try:
        compare(plain, hybrid, case)
    except BudgetError as error:
        if HELD not in str(error):
            raise


def shares_memory(plain: nn.Module, case: Case) -> bool:
    """Says whether outputs are views of one another or of the input: gradients are summed outside of the graph then."""
    x, *rest = inputs(case)
    with torch.no_grad():
        tensors = [x, *tensors_of(copy.deepcopy(plain)(x, *rest))]
    return len({t.untyped_storage().data_ptr() for t in tensors}) < len(tensors)


def assert_close(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """As ``assert_same``, but for rounding; what is made of rounded values by comparing them may differ."""
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if not isinstance(value, Tensor) or name == "generator":
            assert_same({name: value}, {name: found[name]})
        elif value.is_floating_point():
            scale = max(float(value.abs().max()), 1.0)
            limit = TOLERANCE[value.dtype] * scale
            torch.testing.assert_close(
                found[name], value, rtol=0, atol=limit, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )


def check_peak(hybrid: HybridModule, case: Case, budget: int) -> None:
    """A further step stays within the budget; what autograd adds for outputs that share memory is outside of that."""
    hybrid.zero_grad()
    args = inputs(case)
    outside = 0
    if not case.loss and any(i and case.outputs[i - 1][1] not in FRESH for i in case.chosen):
        outside = 3 * sum(t.untyped_storage().nbytes() for t in chosen_outputs(case, hybrid(*args)))

    def step() -> None:
        backward(case, [hybrid(*args) for _ in range(case.calls)])
        hybrid.zero_grad()  # gradients belong to the rise, not to the base
        args[0].grad = None

    measured = measure_step(step, modules=hybrid, tensors=args, repeats=0)
    assert measured.peak_bytes <= budget + outside, f"{measured.peak_bytes} > {budget} + {outside}"


@contextmanager
def quick_profile() -> Iterator[None]:
    """Measures operators on warm caches: times do not matter here, and filling the caches takes longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op_profiler, "cache_bytes", lambda: 1 << 12)
        yield


def forget() -> None:
    """Empties what grows from case to case: Dynamo's caches, the heap that is collected, operators' times."""
    for file in (Path(os.environ["XDG_CACHE_HOME"]) / "fxhybrid").glob("profile-*.json"):
        file.unlink()
    torch.compiler.reset()
    gc.collect()
    gc.freeze()


def fuzz(n_examples: int, capsys: pytest.CaptureFixture[str], **options: Any) -> None:
    """Checks random cases; prints how many were right, and how many were refused for which reason."""
    results: Counter[str] = Counter()

    @settings(max_examples=n_examples, database=None, deadline=None, suppress_health_check=list(HealthCheck), **options)
    @given(cases())
    def run(case: Case) -> None:
        if results.total() % KEPT == 0:
            forget()
        results[check(case)] += 1

    with quick_profile():
        run()
    with capsys.disabled():
        print(f"\n{results.total()} random modules:", *(f"{n:6} {text}" for text, n in results.most_common()), sep="\n")
    assert results[RIGHT] > results.total() / 2, "a grammar of refused modules tests nothing"


def test_random_modules(capsys: pytest.CaptureFixture[str]) -> None:
    fuzz(CI_EXAMPLES, capsys, derandomize=True, phases=[Phase.generate])


@pytest.mark.fuzz
def test_many_random_modules(capsys: pytest.CaptureFixture[str]) -> None:
    fuzz(int(os.environ.get("FUZZ_EXAMPLES", "500")), capsys, print_blob=True)
