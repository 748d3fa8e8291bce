"""Settings of torch's tracers under which a model is captured, and under which its guards are checked."""

from __future__ import annotations

import contextlib
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributions import Distribution, kl

from fxhybrid.capture.fake_tensor_fixes import contiguous_first, kernel_norms, own_fake_tensors
from fxhybrid.capture.in_place_layouts import in_place_layouts
from fxhybrid.capture.intermediate_leaves import intermediate_leaves
from fxhybrid.capture.kernel_layouts import kernel_layouts
from fxhybrid.capture.native_operators import native_operators
from fxhybrid.capture.random_numbers import untraced_generators
from fxhybrid.ops.cumulative_batch_norm import traceable_batch_norm
from fxhybrid.torch_internals import (
    dynamo_config,
    dynamo_timed,
    functorch_config,
    get_metrics_context,
    inductor_config,
    set_enable_dynamic,
    trace_rules,
)

LOGGING = ("debug", "info", "warning", "warn", "error", "exception", "critical", "fatal", "log", "isEnabledFor")
OBSERVERS = "torch.ao.quantization"
LIBRARIES = ("_once", "_advice")  # endings of the methods that model libraries add to loggers


@contextlib.contextmanager
def tracing_settings() -> Iterator[None]:
    """Sets Dynamo and AOTAutograd up for a capture."""
    _remember_divergences()
    dynamo: Any = dynamo_config.patch(
        skip_nnmodule_hook_guards=False,  # a hook added later would be ignored
        trace_autograd_ops=True,  # gradients that the model itself computes (penalties, forces) are its forward pass
        allow_rnn=True,  # recurrent layers become opaque operators afterwards
        ignore_logging_functions=_logging_functions(),
    )
    # Random operators whose result nobody reads stay: all later random numbers depend on them.
    inductor: Any = inductor_config.patch(fallback_random=True)
    aot: Any = functorch_config.patch(backward_pass_autocast="off")
    values = (without_value_checks(), kernel_norms(), contiguous_first(), own_fake_tensors(), in_place_layouts())
    code = (native_operators(), kernel_layouts(), traceable_batch_norm(), traceable_observers(), intermediate_leaves())
    generators = untraced_generators()
    with contextlib.ExitStack() as stack:
        for setting in (dynamo, inductor, aot, set_enable_dynamic(False), *values, *code, generators):
            stack.enter_context(setting)
        stack.callback(random.setstate, random.getstate())  # Dynamo draws what the model draws
        stack.enter_context(get_metrics_context())
        stack.enter_context(dynamo_timed("fxhybrid_capture"))
        yield


@contextlib.contextmanager
def without_value_checks() -> Iterator[None]:
    """Lets ``torch.distributions`` take its arguments unchecked, as ``torch.compile`` does for a whole process.

    A guard remembers which way it was, so guards are checked under this too.
    """
    before = Distribution._validate_args
    Distribution._validate_args = False
    try:
        yield
    finally:
        Distribution._validate_args = before


def _logging_functions() -> set[Callable[..., Any]]:
    """Finds what writes to a log or warns: it gives nothing back, so a trace may leave it out."""
    places = (logging, logging.Logger, logging.LoggerAdapter)
    found: list[Any] = [getattr(place, name, None) for place in places for name in LOGGING]
    found += [value for name, value in vars(logging.Logger).items() if name.endswith(LIBRARIES)]
    return {function for function in (*found, warnings.warn, warnings.warn_explicit, print) if callable(function)}


def _remember_divergences() -> None:
    """Fills the memory of ``kl_divergence``, whose search by classes cannot be traced."""
    for pair, function in kl._KL_REGISTRY.items():
        kl._KL_MEMOIZE.setdefault(pair, function)


@contextlib.contextmanager
def traceable_observers() -> Iterator[None]:
    """Lets Dynamo trace what prepares for quantization: its hooks and fake quantization are plain tensor code."""
    known: Any = trace_rules.MOD_INLINELIST
    added = {OBSERVERS} - known
    known |= added
    trace_rules.get_mod_inlinelist.cache_clear()
    try:
        yield
    finally:
        known -= added
        trace_rules.get_mod_inlinelist.cache_clear()
