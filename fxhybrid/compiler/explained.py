"""Explanations and pictures of what a signature runs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from fxhybrid.compiler.planning_state import PlanningState
from fxhybrid.compiler.report import Report
from fxhybrid.compiler.signature import Signature
from fxhybrid.explain.explanation import Explanation, explain
from fxhybrid.explain.memory_timeline import memory_timelines
from fxhybrid.explain.page import picture, settings_table, write_page
from fxhybrid.explain.planned_step import PlannedStep, planned_step
from fxhybrid.explain.plot import memory_figure, plans_figure
from fxhybrid.ir.simulator import describe_peak
from fxhybrid.profiling.optimizer_step import optimizer_bytes
from fxhybrid.profiling.state_bytes import storage_bytes

MODEL = "the model"


def explanation_of(signature: Signature) -> Explanation:
    """Explains what runs for fresh gradients by module and source line."""
    step = _planned_step(signature)
    at = describe_peak(step.problem, step.planned.schedule, step.planned.timeline)
    return explain(step, signature.active().plan, at)


def memory_figure_of(signature: Signature) -> Any:
    """Draws memory over the unmodified and over the planned step.

    Raises:
        InvalidArgument: matplotlib is not installed.
    """
    plan = signature.active().plan
    title = f"{model_name(signature.state)}: memory over one training step"
    return memory_figure(*memory_timelines(_planned_step(signature)), plan.budget_bytes, title)


def write_report(signature: Signature, report: Report, path: str | Path) -> None:
    """Writes the report, pictures, plan and settings to one HTML file.

    Raises:
        InvalidArgument: matplotlib is not installed.
    """
    state, plan = signature.state, signature.active().plan
    points = [(known.point.peak_bytes, known.point.overhead_s) for known in state.plans.plans]
    name = model_name(state)
    chosen = plan.peak_bytes, plan.added_s
    plans = plans_figure(points, chosen, plan.budget_bytes, plan.step_s, f"{name}: what other budgets would cost")
    settings = {field.name: _shown(getattr(state.options, field.name)) for field in fields(state.options)}
    sections = [
        ("Plan", report._repr_html_()),
        ("Memory over one training step", picture(memory_figure_of(signature), "memory over one training step")),
        ("Other budgets", picture(plans, "added time of known plans by their peak")),
        ("By module and line", explanation_of(signature)._repr_html_()),
        ("Settings", settings_table({**settings, "device": plan.device, **plan.versions})),
    ]
    write_page(path, f"fxhybrid: {name}", sections)


def _shown(value: object) -> object:
    return getattr(value, "__qualname__", value)


def model_name(state: PlanningState) -> str:
    """Returns the class name of the user's model."""
    model = state.model() if state.model is not None else None
    return type(model).__name__ if model is not None else MODEL


def _planned_step(signature: Signature) -> PlannedStep:
    state = signature.state
    return planned_step(state.prepared, signature.active().actions, _resident(state))


def _resident(state: PlanningState) -> dict[str, int]:
    """Splits what is there through the whole step by kind."""
    model = state.model() if state.model is not None else None
    options = state.options
    known = {
        "parameters": 0 if model is None else storage_bytes(model.parameters()),
        "optimizer state": optimizer_bytes(options.optimizer).state_bytes,
        "reserve": options.reserve_bytes,
    }
    return {**known, "inputs and buffers": state.prepared.problem.resident_bytes - sum(known.values())}
