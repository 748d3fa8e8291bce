"""Random planning problems shaped like training steps, for the solvers' tests."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from hypothesis import strategies as st

from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Compress
from fxhybrid.ir.problem import CodecOption, Fusion, Op, Problem, Tensor

LOSSY = (("q8", 4, 0.01), ("q4", 8, 0.04), ("q2", 16, 0.2))


class _Builder:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tensors: list[Tensor] = []
        self.forward: list[Op] = []
        self.backward: list[Op] = []
        self.gradients: list[int] = []

    def tensor(self, name: str, size_bytes: int, codecs: tuple[CodecOption, ...] = ()) -> int:
        self.tensors.append(Tensor(f"{name}_{len(self.tensors)}", size_bytes, codecs))
        return len(self.tensors) - 1

    def codecs(self, size: int, *, lossy: bool) -> tuple[CodecOption, ...]:
        """Draws halving without loss, and up to three lossy options."""
        speed = self.random.choice((0.5, 1.0, 3.0)) * size * 1e-4
        options = []
        if self.random.random() < 0.4:
            half = size // 2
            options.append(CodecOption("half", half, speed, speed, half, size, True))
        if lossy:
            for codec, factor, error in LOSSY[: self.random.randint(1, 3)]:
                error *= self.random.uniform(0.3, 1.5)
                options.append(CodecOption(codec, size // factor, speed, speed, size // 4, size, False, error))
        return tuple(options)

    def rise(self, size: int) -> int:
        return size + self.random.choice((0, 0, 0, size // 3))


def random_problem(
    seed: int,
    n_forward: int = 8,
    *,
    lossy: bool = True,
    mean_bytes: int = 4000,
    with_masks: bool = True,
    fused: bool = False,
) -> Problem:
    """Builds a layered forward program with its mirrored backward program.

    Args:
        seed: the same seed gives the same problem.
        n_forward: forward ops, masks not counted.
        lossy: whether some tensors offer lossy codecs.
        mean_bytes: mean size of a tensor.
        with_masks: whether some ops have a mask that only the backward program reads (deferrable ops).
        fused: whether the readers of masks have a form that reads the mask's source instead.
    """
    b = _Builder(seed)
    rnd = b.random
    made: list[int] = []
    layers: list[tuple[tuple[int, ...], int, tuple[int, ...]]] = []  # inputs, output, extra backward reads
    for i in range(n_forward):
        recent = made[-4:]
        inputs = tuple(sorted(set(rnd.sample(recent, min(len(recent), rnd.choice((1, 1, 2)))))))
        heavy = rnd.random() < 0.4
        size = rnd.randint(mean_bytes // 2, 3 * mean_bytes // 2)
        out = b.tensor("x", size, b.codecs(size, lossy=lossy and rnd.random() < 0.7))
        outputs: tuple[int, ...] = (out,)
        reads: tuple[int, ...] = inputs if rnd.random() < 0.6 else (out,)
        if rnd.random() < 0.15:  # statistics that backward reads too
            stats = b.tensor("stats", size // 8)
            outputs, reads = (out, stats), (*reads, stats)
        seconds = size * 1e-4 * (rnd.uniform(5, 40) if heavy else rnd.uniform(0.3, 2.0))
        once = rnd.random() < 0.15
        b.forward.append(Op(f"op{i}", inputs, outputs, seconds, b.rise(size), recomputable=not once, pinned=once))
        if with_masks and not heavy and rnd.random() < 0.5:
            bits = CodecOption("bitpack", size // 32, size * 1e-5, size * 1e-5, size // 32, size // 4, True)
            mask = b.tensor("mask", size // 4, (bits,))
            b.forward.append(Op(f"mask{i}", (out,), (mask,), size * 5e-5, size // 4))
            reads = (mask,)
        made.append(out)
        layers.append((inputs, out, reads))
    _mirror(b, layers, fused)
    outputs_held = (made[-1],) if made and rnd.random() < 0.5 else ()
    mutations = tuple(rnd.sample(made, 1)) if made and rnd.random() < 0.2 else ()
    if made and not outputs_held and not mutations:
        outputs_held = (made[-1],)
    return Problem(
        tuple(b.tensors),
        tuple(b.forward),
        tuple(b.backward),
        outputs_held,
        mutations,
        tuple(b.gradients),
        resident_bytes=rnd.randint(0, mean_bytes),
        tangent_bytes=b.tensors[made[-1]].size_bytes if made else 0,
    )


def _mirror(b: _Builder, layers: list[tuple[tuple[int, ...], int, tuple[int, ...]]], fused: bool) -> None:
    grad: dict[int, int] = {}
    masks = {op.outputs[0]: i for i, op in enumerate(b.forward) if op.name.startswith("mask")}
    for number, (inputs, out, reads) in enumerate(reversed(layers)):
        sources = (*reads, *((grad[out],) if out in grad else ()))
        results = [b.tensor("grad", b.tensors[t].size_bytes) for t in inputs]
        if b.random.random() < 0.5 or not results:
            results.append(b.tensor("param", b.random.randint(1, 500)))
            b.gradients.append(results[-1])
        size = sum(b.tensors[t].size_bytes for t in results)
        mask = masks.get(reads[0]) if fused and reads else None
        fusion = None if mask is None else Fusion(mask, size)
        inputs_read = tuple(dict.fromkeys(sources))
        op = Op(f"back{number}", inputs_read, tuple(results), size * 5e-4, b.rise(size), fusion=fusion)
        b.backward.append(op)
        grad.update(zip(inputs, results, strict=False))


def problems(min_ops: int = 1, max_ops: int = 12, *, fused: bool = False) -> st.SearchStrategy[Problem]:
    """Hypothesis strategy over ``random_problem``; ``fused`` adds problems with fusable masks."""
    return st.builds(
        random_problem,
        st.integers(0, 2**32 - 1),
        st.integers(min_ops, max_ops),
        lossy=st.booleans(),
        with_masks=st.booleans(),
        fused=st.booleans() if fused else st.just(False),
    )


def small_problems(count: int, max_candidates: int, first_seed: int = 0) -> Iterator[Problem]:
    """Yields the first ``count`` random problems with 2 to ``max_candidates`` candidates, half with fusable masks."""
    seed = first_seed
    while count:
        problem = random_problem(seed, 3 + seed % 4, fused=seed // 4 % 2 == 1)
        seed += 1
        if 2 <= len(problem.candidates) <= max_candidates:
            count -= 1
            yield problem


def choices(problem: Problem, t: int) -> tuple[Action, ...]:
    """Returns every action that tensor ``t`` offers."""
    actions: list[Action] = [SAVE, *(Compress(o.codec) for o in problem.tensors[t].codecs)]
    if problem.forward[problem.producer[t]].recomputable:
        actions.append(RECOMPUTE)
    return tuple(actions)


def random_actions(problem: Problem, seed: int, tensors: Iterable[int] | None = None) -> dict[int, Action]:
    """Actions drawn at random, made valid: what a recomputed op reads is saved if it was lossy."""
    rnd = random.Random(seed)
    picked = problem.candidates if tensors is None else tuple(tensors)
    actions: dict[int, Action] = {t: rnd.choice(choices(problem, t)) for t in picked}
    held = set(problem.outputs)
    for t in sorted(problem.producer, reverse=True):
        op = problem.forward[problem.producer[t]]
        default = RECOMPUTE if problem.producer[t] in problem.deferrable else SAVE
        if t in held or actions.get(t, default) is not RECOMPUTE:
            continue
        for source in op.inputs:
            action = actions.get(source)
            if isinstance(action, Compress) and not _lossless(problem, source, action):
                actions[source] = SAVE
    return actions


def _lossless(problem: Problem, t: int, action: Compress) -> bool:
    return all(o.lossless for o in problem.tensors[t].codecs if o.codec == action.codec)
