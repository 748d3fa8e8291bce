"""Keeps what planning learnt on disk, so that a second start pays for capture and rewrite only.

A record holds the offered codecs with their measured errors, all known plans and bounds. It is found by everything that
they follow from: graph, options, resident bytes, device and versions. Weights and data are not part of that: errors are
trusted, as they are while a model trains. What is chosen is simulated again before it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fxhybrid.accuracy.calibration import ErrorPair
from fxhybrid.accuracy.replan_loop import MeasuredErrors, ReplanResult
from fxhybrid.accuracy.verifier import CaptureCheck
from fxhybrid.codecs import get_codec
from fxhybrid.codecs.kernels.cache_folder import cache_folder
from fxhybrid.compiler.plan_transfer import versions
from fxhybrid.compiler.planner import error_target
from fxhybrid.errors import FxHybridError
from fxhybrid.ir.json_text import from_json, to_json
from fxhybrid.ir.plan import Action, Actions, parse_action
from fxhybrid.ir.problem import Problem, single_techniques
from fxhybrid.options import Options
from fxhybrid.pipeline import Prepared
from fxhybrid.profiling.cost_cache import replace_file
from fxhybrid.solvers.base import FrontierPoint, Status
from fxhybrid.solvers.ilp.min_peak import MinPeak
from fxhybrid.solvers.portfolio.known_plans import KnownPlan, KnownPlans, plans_of

FORMAT = 1
PREFIX = "plans-"
EARLIER = "in an earlier run: "
MAX_RECORDS = 256  # the oldest are removed


@dataclass(frozen=True)
class PlanRecord:
    """Holds what planning learnt.

    Attributes:
        result: codecs, errors and plans.
        budgets: in bytes, those that plans were searched for.
        check: how the captured graph compared with eager.
        path: of its file; None where nothing is kept.
        is_new: whether it was made in this process, and not read.
    """

    result: ReplanResult
    budgets: tuple[int, ...]
    check: CaptureCheck
    path: Path | None
    is_new: bool = False


def record_path(prepared: Prepared, options: Options) -> Path | None:
    """Returns the file of a signature's record; None where nothing is kept: no folder, or a solver of the user's.

    Args:
        prepared: before calibration.
        options: what the user asked for.
    """
    folder = cache_folder()
    if folder is None or not isinstance(options.solver, str):
        return None
    problem = prepared.problem
    key = (
        (prepared.fingerprint, prepared.traced.channels_last),
        sorted(prepared.expected.absent),
        sorted(prepared.expected.dropped),
        (options.solver, options.compression, options.exact, options.max_grad_error),
        [getattr(problem, f.name) for f in dataclasses.fields(problem) if f.name.endswith("_bytes")],
        [op.alloc_peak_bytes for op in problem.backward if not op.outputs],  # the optimizer's step, or its parts
        [[option.codec for option in tensor.codecs] for tensor in problem.tensors],
        (prepared.profile.device, sorted(versions().items()), FORMAT),
    )
    return folder / f"{PREFIX}{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json"


def read_record(path: Path | None, prepared: Prepared, options: Options) -> PlanRecord | None:
    """Reads a record; None where there is none, or it is cut off, changed or foreign."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        return from_json(
            text, lambda raw: _build(raw, prepared, options, path), FxHybridError, "no record", version=FORMAT
        )
    except (OSError, UnicodeError, FxHybridError):
        return None


def write_record(record: PlanRecord) -> None:
    """Writes a record; where the folder cannot be written to, the next start plans again, nothing else."""
    path = record.path
    if path is None:
        return
    content = json.dumps(_content(record))
    with contextlib.suppress(OSError):
        replace_file(path, to_json({"digest": _digest(content), "content": content}, version=FORMAT))
        records = sorted(path.parent.glob(f"{PREFIX}*.json"), key=lambda found: found.stat().st_mtime)
        for old in records[:-MAX_RECORDS]:
            old.unlink(missing_ok=True)


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _content(record: PlanRecord) -> dict[str, Any]:
    prepared, known, errors = record.result.prepared, record.result.plans, record.result.errors
    tensors = prepared.problem.tensors
    words: dict[str, int] = {}
    return {
        "offers": {str(t): [[o.codec, o.error] for o in tensors[t].codecs] for t in prepared.choices},
        "known": _known_content(known, words),
        "alone": [_known_content(one, words) for one in known.alone],
        "min_peak": None if known.min_peak is None else _min_peak_content(known.min_peak, words),
        "measured": [[_actions_content(dict(actions), words), error] for actions, error in errors.by_actions.items()],
        "pairs": [dataclasses.astuple(pair) for pair in errors.pairs],
        "budgets": list(record.budgets),
        "check": record.check.note.removeprefix(EARLIER),
        "words": list(words),  # last: the others fill it
    }


def _known_content(known: KnownPlans, words: dict[str, int]) -> dict[str, Any]:
    return {
        "plans": [_plan_content(plan, words) for plan in known.plans],
        "fallback": [_plan_content(plan, words) for plan in known.fallback],
        "bounds_s": list(known.bounds_s.items()),
        "lower_bound_bytes": known.lower_bound_bytes,
        "polished_s": list(known.polished_s.items()),
        "has_stricter": known.has_stricter,
    }


def _plan_content(plan: KnownPlan, words: dict[str, int]) -> list[Any]:
    point = plan.point
    figures = [point.peak_bytes, point.overhead_s, point.error]
    return [
        _actions_content(point.actions, words),
        figures,
        plan.solver,
        plan.status.value,
        plan.lower_bound_s,
        plan.solve_s,
    ]


def _min_peak_content(found: MinPeak, words: dict[str, int]) -> dict[str, Any]:
    kept = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return {**kept, "actions": _actions_content(found.actions, words), "details": dict(found.details)}


def _actions_content(actions: Actions, words: dict[str, int]) -> list[int]:
    """Returns tensor and action in turn, each action as its number among all words."""
    return [n for t, action in sorted(actions.items()) for n in (t, words.setdefault(str(action), len(words)))]


def _build(raw: Mapping[str, Any], prepared: Prepared, options: Options, path: Path) -> PlanRecord:
    """Builds the record of what ``_content`` wrote; raises ``ValueError`` and others if it is something else."""
    if _digest(raw["content"]) != raw["digest"]:
        raise ValueError("it was changed")
    content = json.loads(raw["content"])
    words = [parse_action(word) for word in content["words"]]
    offers = {int(t): [(codec, error) for codec, error in found] for t, found in content["offers"].items()}
    choices = {t: tuple(codec for codec, _ in found) for t, found in offers.items()}
    errors = {(t, c): e for t, found in offers.items() for c, e in found if not get_codec(c).lossless}
    prepared = prepared.with_choices(choices).with_errors(errors)
    problem, max_error = prepared.problem, error_target(options)
    known = _known(content["known"], problem, max_error, words)
    alone = tuple(
        _known(one, offered, max_error, words)
        for one, offered in zip(content["alone"], single_techniques(problem), strict=False)
    )
    found = content["min_peak"]
    min_peak = None if found is None else MinPeak(**{**found, "actions": _actions(found["actions"], words)})
    measured = MeasuredErrors(
        tuple(ErrorPair(*pair) for pair in content["pairs"]),
        {frozenset(_actions(actions, words).items()): error for actions, error in content["measured"]},
    )
    known = replace(known, alone=alone, min_peak=min_peak)
    check = CaptureCheck(None, EARLIER + content["check"])
    return PlanRecord(ReplanResult(prepared, known, measured), tuple(content["budgets"]), check, path)


def _known(content: Mapping[str, Any], problem: Problem, max_error: float, words: Sequence[Action]) -> KnownPlans:
    def plan(raw: Sequence[Any]) -> KnownPlan:
        actions, figures, solver, status, *seconds = raw
        return KnownPlan(FrontierPoint(_actions(actions, words), *figures), solver, Status(status), *seconds)

    return replace(
        plans_of(problem, max_error=max_error),
        plans=tuple(map(plan, content["plans"])),
        fallback=tuple(map(plan, content["fallback"])),
        bounds_s=dict(content["bounds_s"]),
        lower_bound_bytes=content["lower_bound_bytes"],
        polished_s=dict(content["polished_s"]),
        has_stricter=content["has_stricter"],
    )


def _actions(content: Sequence[int], words: Sequence[Action]) -> dict[int, Action]:
    return {t: words[word] for t, word in zip(content[::2], content[1::2], strict=True)}
