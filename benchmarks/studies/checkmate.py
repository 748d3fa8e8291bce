"""Decides ADR 16: compares Checkmate's full integer program with ours, on small steps.

Problem
    As published (Jain et al., 2020): a step runs in stages, one per op; in stage t everything up to op t may run again.
    It may run an op any number of times, forward or backward; our plans run one again at most once, in the
    backward pass. So its optimum is never above ours, and the difference is what our shorter model gives away.

Data
    ops 1..n (forward, then backward), s_i seconds, M_i bytes of what i makes, edges (i, j): j reads i

Variables
    R_ti           op i runs in stage t                     binary, R_tt = 1, 0 for i > t
    S_ti           what i made is kept from stage t-1 to t  binary, 0 for i >= t
    FREE_tik       in stage t, what i made is freed after k binary, for k = i or k reading i
    U_tk           bytes while op k runs in stage t         0 <= U_tk <= budget

Model
    minimise   sum_{i < t} s_i R_ti                        (what comes on top of running each op once)
    R_tj <= R_ti + S_ti for edges (i, j);    S_ti <= R_t-1,i + S_t-1,i
    U_t,0 = resident + sum M_i S_ti;    U_tk = U_t,k-1 + M_k R_tk - sum_{i freed by k-1} M_i FREE_t,i,k-1
    hazards_tik = (1 - R_tk) + S_t+1,i + sum_{j > k reading i} R_tj
    1 - FREE_tik <= hazards_tik <= most_ik (1 - FREE_tik)

Steps have no codecs, one output per op, and no workspace, so that both see the same costs.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from typing import Any

import pulp
from rich.table import Table

from benchmarks.lib.checks import check_of, checks_table
from benchmarks.lib.common import wide_console
from fxhybrid.ir.problem import Op, Problem, Tensor
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.solvers.ilp.min_peak import MinPeakSolver
from fxhybrid.solvers.ilp.solver import IlpSolver

MINUTES = 15
NEEDS = ""

LENGTHS = (8, 12, 16, 20)
SHARES = (0.0, 0.3, 0.6)
ALLOWED = 0.01  # of the step
BYTE_UNIT = 100.0


def small_chain(n_ops: int, seed: int, *, skips: bool) -> Problem:
    """A chain of ``n_ops`` forward and backward ops; with ``skips`` every third op reads the one three before, too."""
    rnd, depth = random.Random(seed), n_ops // 2
    reads = [
        tuple(sorted({i - 1, i - 3} if skips and i % 3 == 0 and i >= 3 else {i - 1})) if i else () for i in range(depth)
    ]
    tensors = [Tensor(f"x{i}", rnd.randint(50, 150)) for i in range(depth)]
    forward = [
        Op(
            f"f{i}",
            reads[i],
            (i,),
            rnd.choice((1.0, 1.0, 4.0)) * rnd.uniform(0.5, 1.5),
            tensors[i].size_bytes,
            pinned=True,
        )
        for i in range(depth)
    ]
    backward: list[Op] = []
    for number, i in enumerate(reversed(range(depth))):
        grad = len(tensors)
        tensors.append(Tensor(f"g{i}", tensors[max(i - 1, 0)].size_bytes))
        sources = (*reads[i], i, *((grad - 1,) if number else ()))
        backward.append(Op(f"b{i}", sources, (grad,), 2 * forward[i].seconds, tensors[grad].size_bytes))
    return Problem(tuple(tensors), tuple(forward), tuple(backward), (), (), (len(tensors) - 1,), resident_bytes=0)


class Checkmate:
    """The program of one step and budget."""

    def __init__(self, problem: Problem, budget_bytes: int) -> None:
        self.problem = problem
        self.ops = [*problem.forward, *problem.backward]
        made = {t: i for i, op in enumerate(self.ops) for t in op.outputs}
        self.reads = [[made[t] for t in op.inputs] for op in self.ops]
        self.users = [[j for j in range(len(self.ops)) if i in self.reads[j]] for i in range(len(self.ops))]
        self.bytes = [sum(problem.tensors[t].size_bytes for t in op.outputs) / BYTE_UNIT for op in self.ops]
        self.lp = pulp.LpProblem("checkmate", pulp.LpMinimize)
        n = len(self.ops)
        self.runs = {(t, i): 1 if i == t else self._binary("R", t, i) for t in range(n) for i in range(t + 1)}
        self.kept = {(t, i): self._binary("S", t, i) for t in range(n) for i in range(t)}
        self.lp.setObjective(pulp.lpSum(self.ops[i].seconds * r for (t, i), r in self.runs.items() if i < t))
        for t in range(n):
            self._dependencies(t)
            self._memory(t, (budget_bytes - problem.resident_bytes) / BYTE_UNIT)

    def _binary(self, name: str, *at: int) -> Any:
        return pulp.LpVariable("_".join([name, *map(str, at)]), cat="Binary")

    def _dependencies(self, t: int) -> None:
        for j in range(t + 1):
            for i in self.reads[j]:
                self.lp += self.runs[t, j] <= self.runs[t, i] + self.kept.get((t, i), 0)
        for i in range(t):
            self.lp += self.kept[t, i] <= self.runs[t - 1, i] + self.kept.get((t - 1, i), 0)

    def _memory(self, t: int, budget: float) -> None:
        used: Any = pulp.lpSum(self.bytes[i] * self.kept[t, i] for i in range(t))
        for k in range(t + 1):
            height = pulp.LpVariable(f"U_{t}_{k}", 0, budget)
            self.lp += height == used + self.bytes[k] * self.runs[t, k]
            used = height - pulp.lpSum(self.bytes[i] * self._freed(t, i, k) for i in (*self.reads[k], k))

    def _freed(self, t: int, i: int, k: int) -> Any:
        free = self._binary("FREE", t, i, k)
        later = [self.runs[t, j] for j in self.users[i] if k < j <= t]
        hazards = 1 - self.runs[t, k] + self.kept.get((t + 1, i), 0) + pulp.lpSum(later)
        self.lp += 1 - free <= hazards
        self.lp += hazards <= (2 + len(later)) * (1 - free)
        return free

    def solve(self, time_limit_s: float) -> tuple[float, float, int]:
        """(seconds added, proven lower bound of it, ops that run more than twice); infinite without a plan."""
        # presolve is off for the reason that solvers/ilp/backend.py gives
        self.lp.solve(pulp.HiGHS(msg=False, threads=1, timeLimit=time_limit_s, presolve="off", gapRel=1e-4))
        info = self.lp.solverModel.getInfo()
        often = sum(
            sum(pulp.value(self.runs[t, i]) > 0.5 for t in range(i, len(self.ops))) > 2 for i in range(len(self.ops))
        )
        return info.objective_function_value, info.mip_dual_bound, often


def main(argv: Sequence[str] | None = None) -> None:
    """Solves each small step with both programs and prints the differences."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.studies.checkmate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--lengths", default=",".join(map(str, LENGTHS)), metavar="LIST", help="ops (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="per solve of Checkmate's program (default: 60)")
    arguments = parser.parse_args(argv)
    table = Table(title="added seconds, share of the step: Checkmate against one rerun per op")
    for name in ("step", "budget", "Checkmate", "its bound", "its seconds", "ours", "our seconds", "ops run > 2 times"):
        table.add_column(name, justify="right")
    excess: dict[str, float] = {}
    for n_ops in map(int, arguments.lengths.split(",")):
        for skips in (False, True):
            problem = small_chain(n_ops, n_ops, skips=skips)
            low = MinPeakSolver().solve(problem, max_error=0.0).peak_bytes
            high = simulate_actions(problem, {}).peak_bytes
            for share in SHARES:
                name = f"{'skips' if skips else 'chain'} {n_ops} at {share}"
                excess[name] = _compare(table, name, problem, int(low + share * (high - low)), arguments.seconds)
    console = wide_console()
    console.print(table)
    asked = f"(step + ours) / (step + Checkmate's bound) - 1 <= {ALLOWED:.0%}"
    console.print(checks_table([check_of("against Checkmate", asked, excess, ALLOWED, "{:.2%}")]))


def _compare(table: Table, name: str, problem: Problem, budget_bytes: int, limit_s: float) -> float:
    ours = IlpSolver(gap=0.0).solve(problem, budget_bytes, max_error=0.0)
    start = time.perf_counter()
    overhead_s, bound_s, often = Checkmate(problem, budget_bytes).solve(limit_s)
    seconds, step_s = time.perf_counter() - start, problem.step_s
    shares = [f"{x / step_s:.2%}" for x in (overhead_s, bound_s)]
    table.add_row(
        name,
        str(budget_bytes),
        *shares,
        f"{seconds:.1f}",
        f"{ours.overhead_s / step_s:.2%}",
        f"{ours.solve_s:.2f}",
        str(often),
    )
    return (step_s + ours.overhead_s) / (step_s + bound_s) - 1


if __name__ == "__main__":
    main()
