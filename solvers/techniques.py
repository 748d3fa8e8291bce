"""One technique alone, as a problem of its own: every solver and bound then holds for it."""

from __future__ import annotations

from dataclasses import replace

from fxhybrid.problem import Problem


def without_codecs(problem: Problem) -> Problem:
    """The problem where tensors are kept as they are or made again."""
    return replace(problem, tensors=tuple(replace(t, codecs=()) for t in problem.tensors))


def without_recomputation(problem: Problem) -> Problem:
    """The problem where no op runs twice; those that only serve the backward pass may still wait for it."""
    once = tuple(
        op if i in problem.deferrable else replace(op, recomputable=False) for i, op in enumerate(problem.forward)
    )
    return replace(problem, forward=once)


def single_techniques(problem: Problem) -> tuple[Problem, ...]:
    """Recomputing only and compressing only; nothing where ``problem`` offers no codecs."""
    if not any(t.codecs for t in problem.tensors):
        return ()
    return without_codecs(problem), without_recomputation(problem)
