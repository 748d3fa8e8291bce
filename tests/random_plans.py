"""Random valid plans, carried out for real: what the simulator is measured against."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fxhybrid.accuracy.step_result import StepResult, observe_step
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.codecs import get_codec
from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Compress
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.options import Options
from fxhybrid.passes.expected_backward import ALL_ARRIVE
from fxhybrid.passes.step_interface import StepInterface
from fxhybrid.pipeline import Prepared, build_graphs, prepare_traced, trace_plain
from fxhybrid.profiling.allocator import StepMeasurement, measure_step
from fxhybrid.runtime import StepFunction
from fxhybrid.suite import SuiteCase, load


def random_actions(problem: Problem, rng: random.Random, *, lossy: bool) -> dict[int, Action]:
    """Draws a valid action for each forward tensor; the shares recomputed and compressed are random too."""
    recompute_share, compress_share = rng.random(), rng.random()
    actions: dict[int, Action] = {}

    def exact(t: int) -> bool:
        action = actions[t]
        return not isinstance(action, Compress) or get_codec(action.codec).lossless

    for op in problem.forward:
        for t in op.outputs:
            actions[t] = SAVE
            if t in problem.outputs:
                continue
            codecs = [o.codec for o in problem.tensors[t].codecs if lossy or o.lossless]
            if op.recomputable and rng.random() < recompute_share and all(exact(s) for s in op.inputs):
                actions[t] = RECOMPUTE
            elif codecs and rng.random() < compress_share:
                actions[t] = Compress(rng.choice(codecs))
    return actions


@dataclass(frozen=True)
class Trial:
    """Holds one random plan: what was predicted, what was measured, and the step's results."""

    predicted_bytes: int
    measured: StepMeasurement
    result: StepResult

    @property
    def ratio(self) -> float:
        return self.measured.peak_bytes / self.predicted_bytes


class Subject:
    """Runs random plans of a suite model that is prepared once."""

    def __init__(self, name: str, size: str = "small") -> None:
        self.case: SuiteCase = load(name, size)  # type: ignore[arg-type]
        self.step = Step(self.case.model, self.case.loss_fn, False)
        self.call = StepCall(self.case.inputs, self.case.kwargs, self.case.loss_args)
        options = Options.checked(budget=1.0, loss_fn=self.case.loss_fn)
        # in eager's layouts: what is fastest here may round otherwise
        self.prepared: Prepared = prepare_traced(trace_plain(self.step, self.call, options), ALL_ARRIVE)
        self.start = {name: value.clone() for name, value in self.case.model.state_dict().items()}
        self.eager = observe_step(lambda: self.step(*self.call), self.case.model, has_loss=True)

    def run(self, actions: dict[int, Action], *, accumulating: bool) -> Trial:
        """Carries out ``actions`` and measures; ``accumulating`` keeps the gradients of the step before."""
        graphs = build_graphs(self.prepared, actions)
        captured = self.prepared.capture
        function = captured.bind(StepFunction(graphs, StepInterface.of(self.prepared.joint), captured.metadata))
        model = self.case.model
        model.load_state_dict(self.start)
        result = observe_step(lambda: function(self.step, *self.call), model, has_loss=True)

        def train() -> None:
            if not accumulating:
                model.zero_grad(set_to_none=True)
            function(self.step, *self.call).backward()

        measured = measure_step(train, modules=model, tensors=self.case.tensors, repeats=0)
        accumulated_bytes = sum(p.nbytes for p in model.parameters() if p.grad is not None) if accumulating else 0
        model.zero_grad(set_to_none=True)
        predicted = simulate_actions(self.prepared.problem, actions).peak_bytes + accumulated_bytes
        return Trial(predicted, measured, result)
