"""Runs a function by Dynamo, with as many graphs as it takes, and Python between them as it is.

``torch.compile`` leaves a function alone in which a graph would end within a loop, and PyTorch's own modules where such
a function calls them. Here both become graphs, so that no more than must be runs outside of a plan. What gets no tensor
and makes none before its loop stays Python, and so does NumPy: each turn of the loop would be traced by itself.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any
from unittest.mock import patch

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxhybrid.capture.tracing_settings import tracing_settings, without_value_checks
from fxhybrid.errors import CaptureError
from fxhybrid.segments.continuations import returning_calls, run_parts
from fxhybrid.segments.images import StrideGuards
from fxhybrid.segments.segment import Segment
from fxhybrid.torch_internals import (
    DictViewIterator,
    FailOnRecompileLimitHit,
    FrameStateSizeEntry,
    Hooks,
    InstructionTranslatorBase,
    ListIteratorVariable,
    OptimizeContext,
    OutputGraph,
    TupleVariable,
    auto_dynamic,
    builder,
    convert_frame,
    disable_current_modes,
    dynamo_config,
    names_in_guards,
)

MOST_VARIANTS = 256  # graphs of one function, each for other sizes or Python values
TOO_MANY = (
    f"a function of the model was traced {MOST_VARIANTS} times, each for other sizes or other values of Python's: it "
    "would run outside of any plan from now on. Pad what changes its size, or pass numbers as tensors"
)
_SETTINGS = {
    "trace_numpy": False,
    "accumulated_recompile_limit": MOST_VARIANTS * 16,
    "fail_on_recompile_limit_hit": True,
}
_LOOPS = "maybe_has_backedge"
_RECONSTRUCT = "reconstruct"
_ATTRIBUTE = "L['self']"  # a module's: a rate, which operators take as a constant
_BUILDER: Any = builder
_SUPPRESSED = "an error was suppressed"  # Dynamo's words for a function that it gives up on
LEFT = "{name} ({file}:{line}) cannot be split into graphs: its own operators run in eager mode, outside of the plan"

Backend = Callable[[fx.GraphModule, Sequence[Any]], Segment]
LeftToEager = Callable[[str], None]


def in_graphs(
    function: Callable[..., Any],
    backend: Backend,
    before: Callable[[], None],
    left_to_eager: LeftToEager,
    *,
    any_layout: bool,
) -> Callable[..., Any]:
    """Returns a function that runs ``function`` by graphs that ``backend`` gets to see.

    Args:
        function: plain Python.
        backend: takes each graph when it is traced first, with example inputs; returns what runs it.
        before: is called when a part of the function is going to be traced; what it raises ends the run.
        left_to_eager: is told of functions whose operators run outside of any graph.
        any_layout: whether graphs may hand on images in another layout than eager.

    The function raises ``CaptureError`` where one of its parts is traced too often.
    """
    hooks = Hooks()
    guards = StrideGuards()

    def traced(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Segment:
        segment = backend(graph, example_inputs)
        guards.graph(graph, segment.images)
        return segment

    inner = convert_frame.convert_frame(traced, hooks, recompile_limit=MOST_VARIANTS)
    converted = _Converted(inner, before, left_to_eager, guards if any_layout else None)
    context = OptimizeContext(
        _Frames(converted, hooks), contextlib.nullcontext, first_ctx=True, isolate_recompiles=True
    )
    compiled = context(run_parts)

    def run(*args: Any) -> Any:
        with without_value_checks():
            try:
                return compiled(function, [*args])
            except FailOnRecompileLimitHit as error:
                raise CaptureError(TOO_MANY) from error

    return run


class _Converted:
    """Converts frames under the settings of a capture."""

    def __init__(
        self,
        inner: convert_frame.ConvertFrame,
        before: Callable[[], None],
        left_to_eager: LeftToEager,
        guards: StrideGuards | None,
    ) -> None:
        self.inner, self.before, self.left_to_eager, self.guards = inner, before, left_to_eager, guards
        self._torchdynamo_orig_backend = inner._torchdynamo_orig_backend
        self._clone_with_backend = inner._clone_with_backend
        self._floats: dict[tuple[CodeType, str], set[float]] = {}  # seen, by the function that they come into

    def __call__(self, frame: Any, *args: Any, **kwargs: Any) -> Any:
        self.before()
        with contextlib.ExitStack() as settings:
            for each in self._settings():
                settings.enter_context(each)
            result = self.inner(frame, *args, **kwargs)
        if _SUPPRESSED in (getattr(result, "skip_reason", None) or "") and _holds_tensors(frame):
            code = frame.f_code
            self.left_to_eager(LEFT.format(name=code.co_qualname, file=code.co_filename, line=code.co_firstlineno))
        return result

    def _settings(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        yield tracing_settings()
        yield dynamo_config.patch(_SETTINGS)
        yield convert_frame.register_bytecode_hook(lambda _, converted: returning_calls(converted))
        yield _graphs_within_loops()
        yield _iterators_between_graphs()
        yield patch.object(OutputGraph, "resolve_source_value", _resolve)
        yield self._numbers_as_inputs()
        if self.guards is not None:
            yield self.guards.left_out()

    def _numbers_as_inputs(self) -> contextlib.AbstractContextManager[Any]:
        """Lets floats of Python between graphs become inputs of the later one from their second value on."""
        torchs_own = _BUILDER.process_automatic_dynamic

        def process(tx: Any, name: str, entry: Any, **options: Any) -> Any:
            value = entry.scalar
            if not isinstance(value, float) or name.startswith(_ATTRIBUTE):
                return torchs_own(tx, name, entry, **options)
            values = self._floats.setdefault((tx.f_code, name), {value})
            values.add(value)
            return (
                FrameStateSizeEntry(scalar=auto_dynamic) if len(values) > 1 else torchs_own(tx, name, entry, **options)
            )

        return patch.object(_BUILDER, "process_automatic_dynamic", process)


class _Frames(convert_frame.CatchErrorsWrapper):
    """Chooses the frames to convert: what Dynamo chooses, and PyTorch's own modules."""

    def __call__(self, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        code = frame.f_code
        is_own = code.co_name == "forward" and isinstance(frame.f_locals.get("self"), nn.Module)
        if is_own and type(frame.f_locals["self"]).__module__.startswith("torch.nn.modules"):
            with convert_frame.compile_lock, disable_current_modes():
                return self._torchdynamo_orig_backend(frame, cache_entry, self.hooks, frame_state, skip=1)
        return super().__call__(frame, cache_entry, frame_state)


def _graphs_within_loops() -> contextlib.AbstractContextManager[Any]:
    torchs_own = getattr(InstructionTranslatorBase, _LOOPS)
    return patch.object(InstructionTranslatorBase, _LOOPS, lambda frame: torchs_own(frame) and _has_no_tensor(frame))


@contextlib.contextmanager
def _iterators_between_graphs() -> Iterator[None]:
    """Lets a graph end within a loop over a dictionary, such as ``for layer in self.layers``, as Dynamo does not."""
    if _RECONSTRUCT in vars(DictViewIterator):
        yield
        return
    setattr(DictViewIterator, _RECONSTRUCT, _reconstruct)
    try:
        yield
    finally:
        delattr(DictViewIterator, _RECONSTRUCT)


def _resolve(output: Any, source: Any) -> Any:
    """Returns a value that Dynamo looks at, which may come from an iterator that an earlier graph began.

    Sources name iterators as guards do; Dynamo's own function does not know those names.
    """
    frame = output.root_tx
    return source.get_value({**names_in_guards(), "G": frame.f_globals, "L": frame.f_locals}, {}, {})


def _reconstruct(iterator: Any, codegen: Any) -> None:
    """Makes an iterator over what is left of one over a dictionary's keys, values or items."""
    left = list(copy.copy(iterator._iter))  # noqa: SLF001 (no public name)
    if iterator.view_type == "keys":
        left = [key.vt for key in left]
    elif iterator.view_type == "items":
        left = [TupleVariable([key.vt, value]) for key, value in left]
    ListIteratorVariable(left).reconstruct(codegen)


def _has_no_tensor(frame: Any) -> bool:
    """Says whether a function was given no tensor and has computed none so far."""
    return frame.output.count_calls() == 0 and not _holds_tensors(frame)


def _holds_tensors(frame: Any) -> bool:
    return any(isinstance(value, Tensor) for value in pytree.tree_leaves(frame.f_locals))
