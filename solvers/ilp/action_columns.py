"""The integer program's variables for the choices themselves: save, recompute or compress each tensor."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Compress
from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.ilp.presolve import Presolved

if TYPE_CHECKING:
    from fxhybrid.solvers.ilp.backend import Literal, Term

COST_SCALE = 1e4  # the step in the objective's units: solver tolerances are absolute
LEAST_STEP_S = 1e-12  # where no op takes any time
CHOSEN = 0.5  # a binary variable above this is one


def _load_backend() -> None:
    """Loads PuLP and HiGHS, which take a while; in a thread of its own, as PuLP keeps tracebacks of its import.

    Their frames would keep alive whatever the callers up the stack hold, such as the outputs of a user's step.
    """
    thread = threading.Thread(target=importlib.import_module, args=("fxhybrid.solvers.ilp.backend",))
    thread.start()
    thread.join()


class ActionColumns:
    """Holds k_t, r_t, c_tb, r_o and N_g of ``model``, reads a plan from their values and sets them from a plan.

    Attributes:
        program: the linear program that they belong to.
        save: k_t per decided tensor.
        recompute: r_t per decided tensor.
        compress: c_tb per decided tensor, in the order of its options.
        rerun: r_o per op that may be recomputed.
        unit_s: seconds of one unit of the objective.
    """

    def __init__(self, problem: Problem, presolved: Presolved) -> None:
        _load_backend()
        from fxhybrid.solvers.ilp.backend import LinearProgram

        self.problem = problem
        self.presolved = presolved
        self.program = LinearProgram()
        self.unit_s = max(problem.step_s, LEAST_STEP_S) / COST_SCALE
        self.save: dict[int, Literal] = {}
        self.recompute: dict[int, Literal] = {}
        self.compress: dict[int, tuple[Literal, ...]] = {}
        self.rerun: dict[int, Literal] = {}
        self._costs: list[Term] = []
        self._counts: list[tuple[Literal, list[Literal]]] = []
        self._rerun_columns()
        self._tensor_columns()
        self._count_columns()

    def _rerun_columns(self) -> None:
        decided, program = set(self.presolved.decided), self.program
        for o in sorted(self.presolved.rerunnable):
            made = [t for t in self.problem.forward[o].outputs if t in decided]
            self.rerun[o] = program.column("r", integer=True)
            if len(made) == 1:
                self.recompute[made[0]] = self.rerun[o]
            else:
                self.recompute.update((t, program.column("rt", integer=True)) for t in made)
                for t in made:
                    program.at_least([(1, self.rerun[o]), (-1, self.recompute[t])], 0)
                program.at_most([(1, self.rerun[o]), *((-1.0, self.recompute[t]) for t in made)], 0)
            self._costs.append((self._cost(o) if o in self.presolved.required else 0.0, self.rerun[o]))

    def _tensor_columns(self) -> None:
        for t in self.presolved.decided:
            self.recompute.setdefault(t, 0)
            self.save[t] = self.program.column("k")
            options = self.presolved.options[t]
            self.compress[t] = tuple(self.program.column("c", integer=True) for _ in options)
            for option, c in zip(options, self.compress[t], strict=True):
                self._costs.append(((option.encode_s + option.decode_s) / self.unit_s, c))

    def _count_columns(self) -> None:
        """Makes N_g: branching settles how many of the equal choices of repeated layers are made before which."""
        alike: dict[tuple[object, ...], list[Literal]] = {}
        for o, rerun in self.rerun.items():
            op = self.problem.forward[o]
            sizes = tuple(self.problem.tensors[t].size_bytes for t in op.outputs)
            alike.setdefault((op.seconds, op.alloc_peak_bytes, len(op.inputs), sizes), []).append(rerun)
        for t in self.presolved.decided:
            for option, c in zip(self.presolved.options[t], self.compress[t], strict=True):
                same = replace(option, error=0.0)  # measured layer by layer, so rarely equal
                alike.setdefault((self.problem.tensors[t].size_bytes, same), []).append(c)
        for choices in alike.values():
            if len(choices) > 1:
                count = self.program.column("count", most=len(choices), integer=True)
                self._counts.append((count, choices))
                self.program.equal([(1.0, count), *((-1.0, x) for x in choices)], 0)

    def _cost(self, o: int) -> float:
        return self.problem.forward[o].seconds / self.unit_s

    def at_least_each(self, lower: Iterable[Iterable[Term]]) -> Literal:
        """Makes a variable that is at least each of the given sums."""
        variable = self.program.column("live")
        for terms in lower:
            self.program.at_least([(1, variable), *((-x, v) for x, v in terms)], 0)
        return variable

    def stored(self, t: int, *, exact: bool = False) -> list[Term]:
        """Returns terms of "t is kept in some form", or in a form that gives back the very same bits."""
        options = zip(self.presolved.options[t], self.compress[t], strict=True)
        return [(1.0, self.save[t]), *((1.0, c) for o, c in options if o.lossless or not exact)]

    def encoded(self, t: int, *, lossless: bool) -> list[tuple[int, Literal]]:
        """Returns (encoded bytes, literal) of the lossless or of the lossy options of t."""
        options = zip(self.presolved.options[t], self.compress[t], strict=True)
        return [(o.encoded_bytes, c) for o, c in options if o.lossless is lossless]

    def forbid(self, actions: Mapping[int, Action], tensors: Sequence[int]) -> None:
        """Adds a no-good cut: off are exactly the plans that choose these actions for all the tensors named."""
        chosen: list[Term] = []
        for t in tensors:
            action = actions[t]
            if isinstance(action, Compress):
                codecs = [o.codec for o in self.presolved.options[t]]
                chosen.append((1.0, self.compress[t][codecs.index(action.codec)]))
            else:
                chosen.append((1.0, self.save[t] if action is SAVE else self.recompute[t]))
        self.program.at_most(chosen, len(chosen) - 1)

    def actions(self) -> dict[int, Action]:
        """Reads the actions that the variables' values say."""
        chosen: dict[int, Action] = {}
        for t in self.presolved.decided:
            chosen[t] = RECOMPUTE if _is_chosen(self.recompute[t]) else SAVE
            for option, c in zip(self.presolved.options[t], self.compress[t], strict=True):
                if _is_chosen(c):
                    chosen[t] = Compress(option.codec)
        return chosen

    def start(self, actions: Mapping[int, Action]) -> dict[str, float]:
        """Returns values by name of the whole-number variables for ``actions``, which name what backward reaches."""
        values: dict[str, float] = {}
        for t in self.presolved.decided:
            action = actions.get(t)
            for option, c in zip(self.presolved.options[t], self.compress[t], strict=True):
                values[c.name] = float(isinstance(action, Compress) and action.codec == option.codec)
            if not isinstance(self.recompute[t], int):
                recomputed = float(action is RECOMPUTE)
                rerun = self.rerun[self.problem.producer[t]].name
                values[self.recompute[t].name] = recomputed
                values[rerun] = max(recomputed, values.get(rerun, 0.0))
        for count, choices in self._counts:
            values[count.name] = sum(values[x.name] for x in choices)
        return values


def _is_chosen(literal: Literal) -> bool:
    return not isinstance(literal, int) and (literal.varValue or 0.0) > CHOSEN
