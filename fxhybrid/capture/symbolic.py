"""Captures with symbolic sizes: one trace of a step that holds for calls of other shapes, too.

Dimensions are made symbolic as Dynamo's automatic dynamic shapes do it, once two calls are seen to differ in them. A
model may still fix some, by what it computes or decides; Dynamo's guards then say so, as for any capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils import _pytree as pytree

from fxhybrid.capture.capture import Capture, capture
from fxhybrid.capture.joint_graph import JointGraph, OutputKind
from fxhybrid.capture.symbolic_arithmetic import remembered_arithmetic
from fxhybrid.errors import CaptureError, FxHybridError
from fxhybrid.torch_internals import builder, maybe_mark_dynamic

Dims = Mapping[int, frozenset[int]]  # dimensions by the position of a tensor among a call's leaves
Sizes = dict[str, int]  # by the symbol's name
_ALIKE = (
    "_fxhybrid_alike"  # attribute of a tensor that is traced: dimensions that are one symbol with others of the size
)


@dataclass(frozen=True, eq=False)
class SymbolicCapture:
    """Holds a capture whose sizes are symbolic.

    Attributes:
        capture: its joint graph has symbolic sizes in ``meta["val"]`` and operators that compute sizes.
        dims: what was made symbolic.
        decisions: what is decided by sizes after the trace.
    """

    capture: Capture
    dims: Dims
    decisions: SizeDecisions
    _read: Callable[[Mapping[str, Any]], Sizes]
    _parameters: tuple[str, ...]

    def sizes(self, *call: Any) -> Sizes | None:
        """Reads the symbols' values off a call; None where it has another structure."""
        try:
            return self._read(dict(zip(self._parameters, call, strict=True)))
        except (LookupError, AttributeError, TypeError, ValueError):
            return None


class SizeDecisions:
    """Collects what Python code decides by symbolic sizes after the trace, which its guards know nothing of."""

    def __init__(self, shape_env: Any) -> None:
        """Begins to collect; so far everything that was decided is in the guards."""
        self._env = shape_env
        self._n_guards, self._fixed = len(shape_env.guards), dict(shape_env.replacements)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Lets code decide without a warning."""
        frozen, self._env.frozen = self._env.frozen, False
        try:
            yield
        finally:
            self._env.frozen = frozen

    def taken(self) -> list[sympy.Basic] | None:
        """Returns the conditions under which everything is decided alike; None where that fixes a size."""
        if dict(self._env.replacements) != self._fixed:
            return None
        return [guard.expr for guard in self._env.guards[self._n_guards :]]


def capture_symbolic(
    module: nn.Module, args: tuple[Any, ...], dims: Dims, *, alike: Dims | None = None, exact: bool = True
) -> SymbolicCapture:
    """Traces ``module(*args)`` and its backward pass with some sizes symbolic.

    Args:
        module: to be traced.
        args: of the call.
        dims: what to make symbolic where the model allows it; sizes 0 and 1 always stay as they are.
        alike: those of ``dims`` that get one symbol where they have one size. A model mostly finds two sizes of a batch
            equal at the end only, and all that was traced before is traced in other words from then on.
        exact: see ``capture``.

    Raises:
        CaptureError: a static capture may succeed where this does: the step cannot be traced so, or computes numbers
            from sizes whose rounding may differ from eager's.
    """
    marked = _marked(args, dims, alike or {})
    try:
        with remembered_arithmetic(), one_symbol_for_alike_dims():
            captured = capture(module, marked, exact=exact)
        _check_supported(captured.joint)
        env = _shape_env(captured.joint)
        read = _reader(env, captured.joint)
        holds = captured.holds(module, *args)
    except FxHybridError:
        raise
    except Exception as error:  # symbolic arithmetic raises whatever it likes
        raise CaptureError(f"the step cannot be traced with symbolic sizes: {error}") from error
    if not holds:
        raise CaptureError("a capture with symbolic sizes does not hold for the call that it was traced with")
    code = type(module).forward.__code__
    parameters = code.co_varnames[: code.co_argcount]
    return SymbolicCapture(captured, dims, SizeDecisions(env), read, parameters)


@contextlib.contextmanager
def one_symbol_for_alike_dims() -> Iterator[None]:
    """Lets Dynamo give marked dimensions of one size one symbol; a guard says that they are equal."""
    name = "_automatic_dynamic"
    torchs_own = getattr(builder, name)

    def with_alike(tensor: Any, *args: Any, **options: Any) -> Any:
        context = torchs_own(tensor, *args, **options)
        for dim in getattr(tensor, _ALIKE, ()):
            if context.dynamic_sizes[dim] is DimDynamic.DYNAMIC:
                context.dynamic_sizes[dim] = DimDynamic.DUCK
        return context

    with patch.object(builder, name, with_alike):
        yield


def _marked(args: tuple[Any, ...], dims: Dims, alike: Dims) -> tuple[Any, ...]:
    """Returns the arguments with aliases of tensors, of which Dynamo takes ``dims`` as dynamic if it can."""
    leaves, spec = pytree.tree_flatten(args)
    aliases: dict[int, Tensor] = {}
    for position, marked in dims.items():
        tensor = leaves[position]
        if id(tensor) not in aliases:
            aliases[id(tensor)] = tensor.detach().requires_grad_(tensor.requires_grad)
        for dim in marked:
            maybe_mark_dynamic(aliases[id(tensor)], dim)
        setattr(aliases[id(tensor)], _ALIKE, alike.get(position, frozenset()))
    return tuple(pytree.tree_unflatten([aliases.get(id(leaf), leaf) for leaf in leaves], spec))


def _check_supported(joint: JointGraph) -> None:
    """Refuses what a graph made concrete cannot give back: sizes as outputs, and rounding in an unknown order."""
    for node, role in zip(joint.output_nodes, joint.outputs, strict=True):
        if role.kind is not OutputKind.GRADIENT and node is not None and not isinstance(node.meta["val"], Tensor):
            raise CaptureError("the step returns a size")
    for node in joint.module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymFloat) and not _rounds_once(value.node.expr):
            raise CaptureError("the step computes with fractions of sizes, whose rounding may differ")


def _rounds_once(expression: Any) -> bool:
    """Whether a float follows from integers by steps that arithmetic on symbols cannot rearrange."""
    sums = expression.atoms(sympy.Add, sympy.Mul, sympy.Pow)
    return all(part.is_integer for part in sums)


def _shape_env(joint: JointGraph) -> Any:
    values = [node.meta["val"] for node in joint.placeholders]
    modes = (getattr(value, "fake_mode", None) for value in values)
    return next(mode.shape_env for mode in modes if mode is not None)


def _reader(shape_env: Any, joint: JointGraph) -> Callable[[Mapping[str, Any]], Sizes]:
    """Compiles what reads the value of each symbol of ``joint`` off a call, by Dynamo's own text of where it stands."""
    symbols = sorted(_symbols(joint), key=str)
    parts = (f"{str(symbol)!r}: {shape_env.var_to_sources[symbol][0].name}, " for symbol in symbols)
    return eval(f"lambda L: {{{''.join(parts)}}}", {})  # type: ignore[no-any-return]


def _symbols(joint: JointGraph) -> set[sympy.Symbol]:
    found: set[sympy.Symbol] = set()
    for node in joint.module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            for number in _numbers(value):
                if isinstance(number, torch.SymInt):
                    found |= number.node.expr.free_symbols
    return found


def _numbers(value: Any) -> Sequence[Any]:
    if isinstance(value, Tensor):
        return (*value.shape, *value.stride(), value.storage_offset(), value.untyped_storage().nbytes())
    return (value,)
