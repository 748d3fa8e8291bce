"""What the calls of a step cost at new sizes, by arithmetic over size symbols that is compiled once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx

from fxhybrid.codecs import TensorMeta, get_codec
from fxhybrid.compiler.scaled_profile import StepCalls, Work, scaled_cost
from fxhybrid.compiler.workspace_formula import WorkspaceFormula, follows_formula
from fxhybrid.passes.build_problem import calls_of, codec_calls, codec_costs
from fxhybrid.passes.concretize import ConcreteTensors, Recipe, value_recipe
from fxhybrid.passes.size_program import SYMBOLIC, SizeProgram, Sizes, Values
from fxhybrid.passes.storages import Layout, OpCall, fused_form
from fxhybrid.profiling.cost_cache import OpCost
from fxhybrid.profiling.op_profiler import Call, Profile, call_of, measure_alloc_peaks

CodecKey = tuple[int, str]  # a storage, and a codec that it is offered
_NamedCall = tuple[Hashable, Callable[[], Call]]  # the name of its formula, False where it follows none; what makes it


@dataclass(frozen=True, eq=False)
class CostsAtSizes:
    """Holds what the calls of a step cost at some sizes.

    Attributes:
        ops: by the op's name.
        fused: of backward ops in their fused form, by the op's name.
        codecs: of encoding and decoding.
        metas: by storage, of those that some node reads whole.
    """

    ops: Mapping[str, OpCost]
    fused: Mapping[str, OpCost]
    codecs: Mapping[CodecKey, tuple[OpCost, OpCost]]
    metas: Mapping[int, TensorMeta]

    def of_op(self, op: OpCall) -> OpCost:
        """Returns the cost of an op."""
        return self.ops[op.name]

    def of_fused(self, op: OpCall) -> OpCost:
        """Returns the cost of a backward op in its fused form."""
        return self.fused[op.name]

    def of_codec(self, storage: int, codec: str) -> tuple[OpCost, OpCost]:
        """Returns the costs of encoding and decoding a storage."""
        return codec_costs(codec, self.metas[storage], *self.codecs[storage, codec])

    def meta(self, storage: int) -> TensorMeta:
        """Returns the meta of a storage that is offered codecs."""
        return self.metas[storage]


class SizedCalls:
    """Holds the calls of a layout with symbolic sizes beside the same calls at sizes that were measured."""

    def __init__(self, layout: Layout, measured: Profile, at: StepCalls, program: SizeProgram) -> None:
        """Notes the numbers of all calls in a program.

        Args:
            layout: with symbolic sizes.
            measured: the profile of the step ``at`` some sizes.
            at: the same calls, in the same order, and those of codecs behind them.
            program: takes the numbers in.
        """
        self._names = [
            (op.name, is_fused)
            for op in layout.forward + layout.backward
            for is_fused in ((False, True) if fused_form(op.node) else (False,))
        ]
        results = zip(calls_of(layout, {}), StepCalls(layout, {}).results, strict=True)
        self._calls = [_SizedCall(call, tuple(map(program.place, Work.of(call, *made)))) for call, made in results]
        old = [(measured.cost(sized.call), sized.work) for sized in at.sized]
        self._old, of_codecs = old[: len(self._calls)], iter(old[len(self._calls) :])
        keys = [(t, codec) for t, codecs in at.choices.items() for codec in codecs]
        self._old_codecs = {key: (next(of_codecs), next(of_codecs)) for key in keys}
        self._workspaces: defaultdict[Hashable, WorkspaceFormula] = defaultdict(WorkspaceFormula)

    def costs(
        self,
        sizes: Sizes,
        values: Values,
        metas: Mapping[int, TensorMeta],
        specs: Mapping[CodecKey, str],
        bases: Mapping[int, Tensor],
    ) -> CostsAtSizes:
        """Works out what everything costs at some sizes.

        Args:
            sizes: by the symbol's name.
            values: what the program comes to at these.
            metas: by storage, of those that some node reads whole.
            specs: by storage and measured codec, the codec that stands for it.
            bases: fake values of the storages that are offered codecs.

        Raises:
            ProfileError: memory does not suffice for an operator.
        """
        fakes = ConcreteTensors()
        costs = [sized.cost(cost, old, values) for sized, (cost, old) in zip(self._calls, self._old, strict=True)]
        plain = (follows_formula(sized.call.target) and sized.call.key for sized in self._calls)
        making = (partial(sized.at, sizes, fakes) for sized in self._calls)
        made: list[_NamedCall] = list(zip(plain, making, strict=True))
        for (t, spec), new in specs.items():
            stand_in = get_codec(new).profiled_as()
            made_bytes = sum(stand_in.encoded_bytes(metas[t])), metas[t].nbytes
            bytewise = ":" not in stand_in.spec and metas[t].numel % 8 == 0  # others pad rows, or the last byte
            for call, n_bytes, (cost, old) in zip(
                codec_calls(bases[t], stand_in.spec), made_bytes, self._old_codecs[t, spec], strict=True
            ):
                costs.append(scaled_cost(cost, old, Work.of(call, None, n_bytes), call.target))
                made.append((bytewise and (t, call.target), partial(_same, call)))
        unknown = {i: made[i] for i, cost in enumerate(costs) if cost.alloc_peak_bytes < 0}
        for i, n_bytes in self._alloc_peaks(sizes, unknown).items():
            costs[i] = OpCost(costs[i].seconds, n_bytes)
        named = list(zip(self._names, costs, strict=False))
        coded = iter(costs[len(self._names) :])
        return CostsAtSizes(
            {name: cost for (name, is_fused), cost in named if not is_fused},
            {name: cost for (name, is_fused), cost in named if is_fused},
            {(t, new): (next(coded), next(coded)) for (t, _), new in specs.items()},
            metas,
        )

    def _alloc_peaks(self, sizes: Sizes, calls: Mapping[int, _NamedCall]) -> dict[int, int]:
        """Returns the bytes that calls allocate, by their position: by formulas where these are known, else measured.

        Args:
            sizes: by the symbol's name.
            calls: by position.

        Raises:
            ProfileError: memory does not suffice for an operator.
        """
        found: dict[int, int] = {}
        made: dict[Hashable, Call] = {}  # layers make the same calls
        for i, (name, make) in calls.items():
            n_bytes = self._workspaces[name].at(sizes) if name else None
            if n_bytes is not None:
                found[i] = n_bytes
            elif (name or i) not in made:
                made[name or i] = make()
        peaks = measure_alloc_peaks(made.values())
        for name, call in made.items():
            if not isinstance(name, int):
                self._workspaces[name].note(sizes, peaks[call.key])
        return found | {i: peaks[made[name or i].key] for i, (name, _) in calls.items() if i not in found}


def _same(call: Call) -> Call:
    return call


@dataclass(frozen=True, eq=False)
class _Open:
    """Stands for an argument that depends on sizes."""

    recipe: Recipe


class _SizedCall:
    """Holds a call with symbolic sizes, and where a program has its work."""

    def __init__(self, call: Call, places: tuple[int, ...]) -> None:
        self.call, self.places = call, places
        self.is_fixed = not _symbolic_leaves(call)
        self._arguments: tuple[Callable[[Sizes], Values], Any] | None = None

    def cost(self, cost: OpCost, old: Work, values: Values) -> OpCost:
        """Returns its cost, from that at other sizes."""
        if self.is_fixed:
            return cost
        return scaled_cost(cost, old, Work(*(values[place] for place in self.places)), self.call.target)

    def at(self, sizes: Sizes, fakes: ConcreteTensors) -> Call:
        """Returns the call at some sizes."""
        if self._arguments is None:
            self._arguments = self._open()
        evaluate, recipes = self._arguments
        values = evaluate(sizes)

        def closed(leaf: Any) -> Any:
            return leaf.recipe(values, fakes) if isinstance(leaf, _Open) else leaf

        found: Any = fx.node.map_aggregate(recipes, closed)
        args, kwargs = found
        return call_of(self.call.target, args, kwargs)

    def _open(self) -> tuple[Callable[[Sizes], Values], Any]:
        """Returns what evaluates the numbers of the arguments, and the arguments with recipes in them."""
        program = SizeProgram()

        def opened(value: Any) -> Any:
            return _Open(value_recipe(value, program)) if isinstance(value, (Tensor, *SYMBOLIC)) else value

        recipes = fx.node.map_aggregate((self.call.args, dict(self.call.kwargs)), opened)
        return program.compiled(), recipes


def _symbolic_leaves(call: Call) -> list[Any]:
    """Finds the arguments that depend on sizes."""
    found: list[Any] = []

    def note(value: Any) -> Any:
        numbers = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
        found.extend(number for number in numbers if isinstance(number, SYMBOLIC))
        return value

    fx.node.map_aggregate((call.args, dict(call.kwargs)), note)
    return found
