"""One planning problem of a whole sequence of parts, for solvers that know nothing of parts.

Forward halves follow each other, then the backward halves in their order. What Python holds between the parts becomes
tensors that operators of no cost make and read; nothing is decided on them. Lifetimes are those of
``sequence_peak`` or longer, so that a plan that fits here fits there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fxhybrid.ir.part import Part, Source
from fxhybrid.ir.plan import RECOMPUTE, Action, Actions, Compress
from fxhybrid.ir.problem import Op, Problem, Tensor
from fxhybrid.ir.sequence import PartSequence


@dataclass(frozen=True, eq=False)
class JoinedProblem:
    """Holds the problem of a sequence, and where in it each part's tensors are.

    Attributes:
        problem: of the whole step.
        offsets: of each part's first tensor.
        sizes: number of each part's tensors.
        sources: what a part read to make a tensor that it can recompute for a later one.
    """

    problem: Problem
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    sources: Mapping[int, tuple[int, ...]]

    def by_part(self, actions: Actions) -> tuple[dict[int, Action], ...]:
        """Splits actions of the whole step; what would be recomputed from an encoded form is kept instead."""
        encoded = {t for t, action in actions.items() if isinstance(action, Compress)}
        recomputed = {t: read for t, read in self.sources.items() if actions.get(t) is RECOMPUTE}
        kept = {t for t, read in recomputed.items() if not encoded.isdisjoint(read)}
        return tuple(
            {t - first: action for t, action in actions.items() if first <= t < first + size and t not in kept}
            for first, size in zip(self.offsets, self.sizes, strict=True)
        )


def join_parts(sequence: PartSequence) -> JoinedProblem:
    """Builds the problem of a sequence."""
    return _Joining(sequence).run()


class _Joining:
    def __init__(self, sequence: PartSequence) -> None:
        self.sequence = sequence
        self.tensors: list[Tensor] = []
        self.offsets: list[int] = []
        self.op_offsets: list[int] = []
        self.forward: list[Op] = []
        self.backward: list[Op] = []
        self.by_python: dict[int, int] = {}  # shared storage -> tensor that stands for what Python holds of it
        self.carried: dict[int, list[int]] = {}  # shared storage -> gradients of it on their way
        self.reads: dict[int, tuple[int, ...]] = {}

    def run(self) -> JoinedProblem:
        parts = self.sequence.parts
        for k, part in enumerate(parts):
            self._forward_half(k, part)
        self._mark("end of the forward pass", self.by_python.values(), rise_bytes=self.sequence.tail.rise_bytes)
        for k in self.sequence.backward:
            self._backward_half(k, parts[k])
        if self.sequence.update_bytes is not None:
            update_bytes = self.sequence.tail.left_bytes + self.sequence.update_bytes
            self.backward.append(Op("optimizer.step", (), (), 0.0, update_bytes))
        problem = Problem(
            tensors=tuple(self.tensors),
            forward=tuple(self.forward),
            backward=tuple(self.backward),
            outputs=tuple(t for key, t in self.by_python.items() if self.sequence.shared[key].held),
            mutations=(),
            gradients=tuple(self._gradients()),
            resident_bytes=self._resident_bytes(),
        )
        sizes = tuple(len(part.problem.tensors) for part in parts)
        return JoinedProblem(problem, tuple(self.offsets), sizes, self.reads)

    def _forward_half(self, k: int, part: Part) -> None:
        ending = [key for key in self.by_python if self.sequence.shared[key].last == k]
        ending = [key for key in ending if not self.sequence.shared[key].held and key in part.arriving.values()]
        loose = self._add_tensor(f"held by Python beside part {k}", part.loose_bytes)
        self._mark(f"part {k} begins", [self.by_python[key] for key in ending], (loose,), part.rise_bytes)
        for key in ending:
            del self.by_python[key]
        first = self._add_tensors(k, part.problem.tensors)
        self.op_offsets.append(len(self.forward))
        sources = {t + first: source for t, source in part.sources.items()}
        self.forward += (self._recomputable(self._shifted(op, k, first), sources) for op in part.problem.forward)
        made = [loose, *(t + first for t in part.problem.mutations)]
        leaving = [key for key in part.leaving.values() if self._outlives(key, k)]
        outside = [key for key in (*part.arriving.values(), *part.taken) if self._outlives(key, k)]
        new = [key for key in dict.fromkeys((*leaving, *outside)) if key not in self.by_python]
        self.by_python |= {key: self._add_tensor(f"held by Python {key}.{k}", self._size(key)) for key in new}
        self._mark(f"part {k} ends", made, [self.by_python[key] for key in new])

    def _outlives(self, key: int, k: int) -> bool:
        """Says whether Python still holds a storage when the forward half of a part is over."""
        shared = self.sequence.shared[key]
        return shared.held or shared.last > k

    def _size(self, key: int) -> int:
        return self.sequence.shared[key].size_bytes

    def _backward_half(self, k: int, part: Part) -> None:
        first = self.offsets[k]
        arrived = [t for key in part.leaving.values() for t in self.carried.pop(key, [])]
        staying_bytes = part.problem.tangent_bytes - sum(tangent.size_bytes for tangent in part.dying)
        tangents = self._add_tensor(f"gradients of the outputs of part {k}", staying_bytes)
        passing = self._add_tensor(f"gradients that pass part {k}", part.passing_bytes)
        name = f"gradient of an output of part {k}, {{}}"
        dying = [(self._add_tensor(name.format(t.position), t.size_bytes), t.last) for t in part.dying]
        self.backward.append(_free_op(f"backward {k} begins", arrived, (tangents, passing, *(t for t, _ in dying))))
        for position, op in enumerate(part.problem.backward):
            shifted = self._shifted(op, k, first)
            read = tuple(t for t, last in dying if last == position)
            self.backward.append(replace(shifted, inputs=(*shifted.inputs, *read)))
        new = [t + first for t in part.input_gradients]
        for t, key in ((t, key) for t, keys in part.input_gradients.items() for key in sorted(keys)):
            if self.sequence.shared[key].maker < k:
                self.carried.setdefault(key, []).append(t + first)
        for key in part.passing:
            passed = self._add_tensor(f"gradient of {key} that part {k} hands on", self._size(key))
            self.carried.setdefault(key, []).append(passed)
        handed_on = [t for key in part.passing for t in self.carried[key][-1:]]
        self.backward.append(_free_op(f"backward {k} ends", [tangents, *new], handed_on))
        behind = _free_op(f"Python's backward behind part {k}", [passing, *new], ())
        self.backward.append(replace(behind, alloc_peak_bytes=part.backward_rise_bytes))

    def _add_tensors(self, k: int, tensors: Sequence[Tensor]) -> int:
        self.offsets.append(len(self.tensors))
        self.tensors += (replace(tensor, name=f"{k}/{tensor.name}") for tensor in tensors)
        return self.offsets[-1]

    def _add_tensor(self, name: str, size_bytes: int) -> int:
        self.tensors.append(Tensor(name, size_bytes))
        return len(self.tensors) - 1

    def _mark(self, name: str, reads: Iterable[int], writes: Iterable[int] = (), rise_bytes: int = 0) -> None:
        mark = _free_op(name, reads, writes)
        self.forward.append(replace(mark, pinned=True, alloc_peak_bytes=rise_bytes))

    def _shifted(self, op: Op, k: int, first: int) -> Op:
        fusion = replace(op.fusion, op=op.fusion.op + self.op_offsets[k]) if op.fusion else None
        inputs, outputs = (tuple(t + first for t in ts) for ts in (op.inputs, op.outputs))
        return replace(op, name=f"{k}/{op.name}", inputs=inputs, outputs=outputs, fusion=fusion)

    def _recomputable(self, op: Op, sources: Mapping[int, Source]) -> Op:
        """Lets what hands a tensor on run its source when it is recomputed.

        The first time that takes no memory and no time: the rise here is an upper bound, the seconds no overhead.
        """
        source = next((sources[t] for t in op.outputs if t in sources), None)
        if source is None:
            return op
        reads = tuple(t + self.offsets[source.part] for t in self.sequence.parts[source.part].arriving)
        self.reads |= dict.fromkeys(op.outputs, reads)
        return replace(op, inputs=reads, seconds=source.seconds, alloc_peak_bytes=source.rise_bytes, recomputable=True)

    def _gradients(self) -> Iterator[int]:
        """Yields the gradients that live to the end of the backward pass."""
        for k in sorted(self.sequence.backward):
            part = self.sequence.parts[k]
            yield from (t + self.offsets[k] for t in part.problem.gradients if t not in part.input_gradients)

    def _resident_bytes(self) -> int:
        parts = self.sequence.parts
        taken = frozenset(key for part in parts for key in part.taken)
        beside = sum(part.beside_bytes for part in parts) + self.sequence.tail.beside_bytes
        roots = sum(shared.size_bytes for shared in self.sequence.shared if shared.is_root)
        return self.sequence.resident_bytes + beside + roots + sum(map(self._size, taken))


def _free_op(name: str, reads: Iterable[int], writes: Iterable[int] = ()) -> Op:
    return Op(name, tuple(reads), tuple(writes), 0.0, 0, recomputable=False)
