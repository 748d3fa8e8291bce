"""Runs a function by Dynamo, with as many graphs as it takes, and Python between them as it is.

``torch.compile`` leaves a function alone in which a graph would end within a loop, and PyTorch's own modules where such
a function calls them. Here both become graphs, so that no more than must be runs outside of a plan. What gets no tensor
and makes none before its loop stays Python, and so does NumPy: each turn of the loop would be traced by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxhybrid.capture.tracing_settings import tracing_settings, without_value_checks
from fxhybrid.errors import CaptureError
from fxhybrid.torch_internals import (
    FailOnRecompileLimitHit,
    FrameStateSizeEntry,
    Hooks,
    InstructionTranslatorBase,
    OptimizeContext,
    auto_dynamic,
    builder,
    convert_frame,
    disable_current_modes,
    dynamo_config,
)

MOST_VARIANTS = 256  # graphs of one function, each for other sizes or Python values
TOO_MANY = (
    f"a function of the model was traced {MOST_VARIANTS} times, each for other sizes or other values of Python's: it "
    "would run outside of any plan from now on. Pad what changes its size, or pass numbers as tensors"
)
_LOOPS = "maybe_has_backedge"
_ATTRIBUTE = "L['self']"  # a module's: a rate, which operators take as a constant
_BUILDER: Any = builder

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def in_graphs(function: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    """Returns a function that runs ``function`` by graphs that ``backend`` gets to see.

    Args:
        function: plain Python.
        backend: takes each graph when it is traced first, with example inputs; returns what runs it.

    The function raises ``CaptureError`` where one of its parts is traced too often.
    """
    hooks = Hooks()
    converted = _Converted(convert_frame.convert_frame(backend, hooks, recompile_limit=MOST_VARIANTS))
    context = OptimizeContext(
        _Frames(converted, hooks), contextlib.nullcontext, first_ctx=True, isolate_recompiles=True
    )
    compiled = context(function)

    def run(*args: Any) -> Any:
        limits = {"accumulated_recompile_limit": MOST_VARIANTS * 16, "fail_on_recompile_limit_hit": True}
        with without_value_checks(), dynamo_config.patch(limits):
            try:
                return compiled(*args)
            except FailOnRecompileLimitHit as error:
                raise CaptureError(TOO_MANY) from error

    return run


class _Converted:
    """Converts frames under the settings of a capture."""

    def __init__(self, inner: convert_frame.ConvertFrame) -> None:
        self.inner = inner
        self._torchdynamo_orig_backend = inner._torchdynamo_orig_backend
        self._clone_with_backend = inner._clone_with_backend
        self._floats: dict[tuple[CodeType, str], set[float]] = {}  # seen, by the function that they come into

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        numpy: Any = dynamo_config.patch(trace_numpy=False)
        with tracing_settings(), numpy, _graphs_within_loops(), self._numbers_as_inputs():
            return self.inner(*args, **kwargs)

    @contextlib.contextmanager
    def _numbers_as_inputs(self) -> Iterator[None]:
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

        _BUILDER.process_automatic_dynamic = process
        try:
            yield
        finally:
            _BUILDER.process_automatic_dynamic = torchs_own


class _Frames(convert_frame.CatchErrorsWrapper):
    """Chooses the frames to convert: what Dynamo chooses, and PyTorch's own modules."""

    def __call__(self, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        code = frame.f_code
        is_own = code.co_name == "forward" and isinstance(frame.f_locals.get("self"), nn.Module)
        if is_own and type(frame.f_locals["self"]).__module__.startswith("torch.nn.modules"):
            with convert_frame.compile_lock, disable_current_modes():
                return self._torchdynamo_orig_backend(frame, cache_entry, self.hooks, frame_state, skip=1)
        return super().__call__(frame, cache_entry, frame_state)


@contextlib.contextmanager
def _graphs_within_loops() -> Iterator[None]:
    torchs_own = getattr(InstructionTranslatorBase, _LOOPS)
    setattr(InstructionTranslatorBase, _LOOPS, lambda frame: torchs_own(frame) and _has_no_tensor(frame))
    try:
        yield
    finally:
        setattr(InstructionTranslatorBase, _LOOPS, torchs_own)


def _has_no_tensor(frame: Any) -> bool:
    """Says whether a function was given no tensor and has computed none so far."""
    given = pytree.tree_leaves(frame.f_locals)
    return frame.output.count_calls() == 0 and not any(isinstance(value, Tensor) for value in given)
