"""The parts of the suite benchmark: each runs on one model and gives records (JSON lines)."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import fxhybrid
from benchmarks.lib.common import MARGIN, Bench, Step, median_ratio, pair_ratios, seconds
from benchmarks.lib.results import Record
from fxhybrid import BudgetError, HybridModule, Plan
from fxhybrid.compiler.plan_transfer import named_actions
from fxhybrid.compiler.planner import ERROR_MARGIN
from fxhybrid.ir.problem import without_codecs, without_recomputation
from fxhybrid.solvers.base import FrontierPoint
from fxhybrid.solvers.mps.frontier_search import build_frontier

SHARES = (0.8, 0.65, 0.5, 0.4)
CHEAP_SHARE = {"resnet50": 0.65}  # parameters and gradients alone are 0.38 of its peak
DEFAULT_CHEAP_SHARE = 0.5
SWEEP = 12
TRAINING_STEPS = 10
WORTH_MEASURING = 0.05  # of a step: planned differences below that drown in noise


@dataclass
class Session:
    """One model under test; compiled once, at the first part that needs it.

    Attributes:
        bench: the model and its step.
        pairs: interleaved pairs per timing.
        fresh: compile anew for every share instead of ``set_budget``.
        max_grad_error: limit given to ``compile``.
    """

    bench: Bench
    pairs: int = 31
    fresh: bool = False
    max_grad_error: float = 0.1
    compile_s: float = math.nan
    compiled: HybridModule | None = field(default=None, repr=False)

    @property
    def cheap_share(self) -> float:
        """The share at which step time is measured."""
        return CHEAP_SHARE.get(self.bench.name, DEFAULT_CHEAP_SHARE)

    @property
    def hybrid(self) -> HybridModule:
        """The compiled model; the first use takes the time of the first compile."""
        if self.compiled is None:
            budget_bytes = int(self.cheap_share * self.bench.eager.peak_bytes)

            def first() -> None:
                try:
                    self.compiled = self.bench.compile(budget_bytes, max_grad_error=self.max_grad_error)
                except BudgetError as error:
                    least = int(error.minimum_bytes * MARGIN)
                    self.compiled = self.bench.compile(least, max_grad_error=self.max_grad_error)

            self.compile_s = seconds(first)
        assert self.compiled is not None
        return self.compiled

    def at(self, budget_bytes: int) -> HybridModule:
        """The model at a budget.

        Raises:
            BudgetError: no known plan fits.
        """
        if self.fresh:
            return self.bench.compile(budget_bytes, max_grad_error=self.max_grad_error)
        self.hybrid.set_budget(budget_bytes)
        return self.hybrid

    @property
    def minimum_bytes(self) -> int:
        """The smallest peak for which a plan is known."""
        return self.hybrid.report().signatures[0].minimum_bytes

    def bytes_of(self, share: float) -> int:
        """A share of the unmodified step's measured peak."""
        return int(share * self.bench.eager.peak_bytes)


def reach(session: Session) -> Iterator[Record]:
    """Smallest reachable peak, planned and measured, and the seconds of the first compile."""
    smallest = session.minimum_bytes
    budget_bytes = int(smallest * MARGIN)
    measured = session.bench.measure(session.bench.step_of(session.at(budget_bytes))).peak_bytes
    eager = session.bench.eager
    yield {
        "eager_peak_bytes": eager.peak_bytes,
        "eager_s": eager.seconds,
        "minimum_bytes": smallest,
        "minimum_share": smallest / eager.peak_bytes,
        "measured_bytes": measured,
        "budget_bytes": budget_bytes,
        "compile_s": session.compile_s,
    }


def budget(session: Session) -> Iterator[Record]:
    """At each share: predicted and measured peak over ten steps, gradient error, planned added time."""
    for share in SHARES:
        budget_bytes = session.bytes_of(share)
        record: Record = {"key": share, "share": share, "budget_bytes": budget_bytes}
        try:
            hybrid = session.at(budget_bytes)
        except BudgetError as error:
            record["refused"] = {"minimum_bytes": error.minimum_bytes, "holder": error.holder}
            budget_bytes = int(error.minimum_bytes * MARGIN)
            hybrid = session.at(budget_bytes)  # must work
            record["budget_bytes"] = budget_bytes
        plan = hybrid.plan
        yield record | {
            "predicted_bytes": plan.peak_bytes,
            "measured_bytes": session.bench.peak_over(session.bench.step_of(hybrid), TRAINING_STEPS),
            "gradient_error": session.bench.gradient_error(hybrid),
            "max_grad_error": session.max_grad_error,
            "added_s": plan.added_s,
            "step_s": plan.step_s,
            "solver": plan.solver,
            "status": plan.status,
            "actions": plan.counts(),
        }


def cheap(session: Session) -> Iterator[Record]:
    """Step time against the unmodified model at the share where it is measured, or the smallest in reach."""
    budget_bytes = session.bytes_of(session.cheap_share)
    refused = False
    try:
        hybrid = session.at(budget_bytes)
    except BudgetError as error:
        refused = True
        hybrid = session.at(int(error.minimum_bytes * MARGIN))
    plan = hybrid.plan
    ratio = median_ratio(session.bench.eager_step, session.bench.step_of(hybrid), session.pairs)
    yield {
        "share": plan.budget_bytes / session.bench.eager.peak_bytes,
        "refused": refused,
        "ratio": ratio,
        "pairs": session.pairs,
        "planned_ratio": 1 + plan.added_s / plan.step_s,
        "compile_s": session.compile_s,
    }


def monotone(session: Session) -> Iterator[Record]:
    """Twelve budgets from the unmodified peak down to the smallest reachable one."""
    top, bottom = session.bench.eager.peak_bytes, session.minimum_bytes
    hybrid, points = session.hybrid, []
    for i in range(SWEEP):
        budget_bytes = top - (top - bottom) * i // (SWEEP - 1)

        def move(budget_bytes: int = budget_bytes) -> None:
            hybrid.set_budget(budget_bytes)
            _ = hybrid.plan  # the rewrite belongs to the time

        set_budget_s = seconds(move)
        measured = session.bench.measure(session.bench.step_of(hybrid)).peak_bytes
        plan = hybrid.plan
        points.append(
            {
                "budget_bytes": budget_bytes,
                "predicted_bytes": plan.peak_bytes,
                "measured_bytes": measured,
                "added_s": plan.added_s,
                "set_budget_s": set_budget_s,
            }
        )
    yield {"points": points}


def techniques(session: Session) -> Iterator[Record]:
    """Added time of the hybrid, of recomputing only and of compressing only; planned, and in what order."""
    # the same aim as the hybrid's own plans
    problem, limit = session.hybrid.planning_problem, ERROR_MARGIN * session.max_grad_error
    frontiers = {
        "recompute": build_frontier(without_codecs(problem), max_error=limit),
        "compress": build_frontier(without_recomputation(problem), max_error=limit),
    }
    for share in SHARES:
        budget_bytes = session.bytes_of(share)
        try:
            hybrid = session.at(budget_bytes)
        except BudgetError:
            continue
        record: Record = {
            "key": share,
            "share": share,
            "hybrid_s": hybrid.plan.added_s,
            "step_s": problem.step_s,
        }
        for name, frontier in frontiers.items():
            point = frontier.point_for(budget_bytes)
            record[f"{name}_s"] = point.overhead_s if point else None
            if point and abs(point.overhead_s - hybrid.plan.added_s) >= WORTH_MEASURING * problem.step_s:
                record[f"{name}_order"] = _measured_order(session, hybrid, _technique_plan(hybrid, point))
        yield record


def exact(session: Session) -> Iterator[Record]:
    """Bits of a step at a tight budget against eager's, with lossless compression and with none."""
    bench = session.bench
    for compression in ("lossless", "off"):
        hybrid = bench.compile(bench.eager.peak_bytes * 2, compression=compression, solver="mps")
        budget_bytes = int(hybrid.report().signatures[0].minimum_bytes * MARGIN)
        hybrid.set_budget(budget_bytes)
        # before the peak is measured, because those steps move running statistics
        eager, again = bench.observe(bench.case.loss), bench.observe(bench.case.loss)
        found = bench.observe(partial(bench.loss_of, hybrid))
        yield {
            "key": compression,
            "compression": compression,
            "share": budget_bytes / bench.eager.peak_bytes,
            "budget_bytes": budget_bytes,
            "measured_bytes": bench.measure(bench.step_of(hybrid)).peak_bytes,
            "same_bits": found.same_bits(eager),
            "eager_repeats": again.same_bits(eager),
            "actions": hybrid.plan.counts(),
        }


def _technique_plan(hybrid: HybridModule, point: FrontierPoint) -> Plan:
    actions = named_actions(hybrid.planning_problem, point.actions)
    return dataclasses.replace(hybrid.plan, actions=actions, peak_bytes=point.peak_bytes, added_s=point.overhead_s)


def _measured_order(session: Session, hybrid: HybridModule, plan: Plan) -> Record:
    """Sign test of the other technique's plan against the hybrid's."""
    try:
        other = session.bench.compile(plan.budget_bytes, plan=plan, max_grad_error=1e6)
    except fxhybrid.FxHybridError as error:
        return {"error": str(error)}
    steps: list[Step] = [session.bench.step_of(model) for model in (hybrid, other)]
    ratios = pair_ratios(steps[0], steps[1], session.pairs)
    expected_slower = plan.added_s > hybrid.plan.added_s
    agreeing = sum((ratio > 1) == expected_slower for ratio in ratios)
    return {
        "median_ratio": statistics.median(ratios),
        "agreeing": agreeing,
        "pairs": len(ratios),
        "p_value": sign_test(agreeing, len(ratios)),
    }


def sign_test(agreeing: int, n_pairs: int) -> float:
    """Chance of at least this many agreements among fair coin tosses."""
    return sum(math.comb(n_pairs, k) for k in range(agreeing, n_pairs + 1)) / 2**n_pairs


PARTS: dict[str, Callable[[Session], Iterator[Record]]] = {
    "reach": reach,
    "budget": budget,
    "exact": exact,
    "cheap": cheap,
    "monotone": monotone,
    "techniques": techniques,
}


def run_parts(session: Session, names: Sequence[str]) -> Iterator[Record]:
    """The records of the parts named; a part that fails gives a record with the error and ends."""
    for name in names:
        head = {"model": session.bench.name, "size": session.bench.size, "part": name, "key": None}
        try:
            for record in PARTS[name](session):
                yield head | record
        except Exception as error:  # noqa: BLE001  one model's failure must not end a run of hours
            yield head | {"key": "error", "error": f"{type(error).__name__}: {error}"}
