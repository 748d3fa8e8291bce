"""What a model keeps in Python rather than in parameters and buffers: attributes, containers, generators."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

Undo = Callable[[], None]


@contextlib.contextmanager
def unchanged_python_state(module: nn.Module) -> Iterator[None]:
    """Undoes what runs of ``module`` within the block leave in Python.

    Restored are the attributes of all submodules and of plain objects that they hold, the contents of lists, dicts,
    sets, deques and arrays among them (and of those that hooks and other functions close over), tensors kept as
    attributes, and generators: those of ``random``, NumPy and torch's CPU, and those that are global where the classes
    of submodules are defined. Parameters and registered buffers keep their identity; their values are the caller's
    business.
    """
    undo = undo_of_runs(module)
    try:
        yield
    finally:
        undo()


@dataclass(frozen=True, eq=False)
class UndoOfRuns:
    """Undoes, when called, what runs have left since it was made.

    Attributes:
        undo_all: one function for each thing that may have changed.
        n_bytes: of the tensors that are copied for that.
    """

    undo_all: Sequence[Undo]
    n_bytes: int

    def __call__(self) -> None:
        """Puts everything back."""
        for undo in self.undo_all:
            undo()


def undo_of_runs(module: nn.Module) -> UndoOfRuns:
    """Returns what undoes all that runs of ``module`` leave in Python from now on."""
    snapshot = _Snapshot([*module.parameters(), *module.buffers()])
    for part in module.modules():
        snapshot.take(part)
    for generator in _global_generators(module):
        snapshot.take(generator)
    return UndoOfRuns((*_generators(), *snapshot.undo_all), snapshot.n_bytes)


def undo_of_step(module: nn.Module, changed: Iterable[Tensor] = ()) -> UndoOfRuns:
    """Returns what undoes all that steps of ``module`` leave, in its buffers and ``changed`` tensors, too."""
    undo_runs = undo_of_runs(module)
    kept = [(tensor, tensor.detach().clone()) for tensor in (*module.buffers(), *changed)]

    def undo() -> None:
        for tensor, value in kept:
            _put_back(tensor, value)

    n_bytes = undo_runs.n_bytes + sum(value.untyped_storage().nbytes() for _, value in kept)
    return UndoOfRuns((*undo_runs.undo_all, undo), n_bytes)


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copies a module, and cuts tensors of autograd's graph that it keeps off from it, which ``copy.deepcopy`` refuses.

    Args:
        module: a user's; it stays as it is.
        memo: of a copy that is under way.
    """
    memo = {} if memo is None else memo
    finder = _TensorFinder([*module.parameters(), *module.buffers()])
    for part in module.modules():
        finder.take(part)
    memo |= {id(t): t.detach().clone() for t in finder.found if t.grad_fn is not None}
    return copy.deepcopy(module, memo)


@cache
def generator_state_bytes() -> int:
    """Returns the size of the tensor that holds a state of torch's CPU generator."""
    return torch.get_rng_state().nbytes


def _generators() -> Iterator[Undo]:
    """Snapshots of the process-wide generators; NumPy's only if something has loaded it."""
    yield partial(_set_generator, torch.default_generator, torch.default_generator.clone_state())
    yield partial(random.setstate, random.getstate())
    if "numpy" in sys.modules:
        legacy = sys.modules["numpy"].random
        yield partial(legacy.set_state, legacy.get_state())


def _global_generators(module: nn.Module) -> Iterator[object]:
    """Finds generators among the global names of the files in which the classes of submodules are defined."""
    classes = dict.fromkeys(base for part in module.modules() for base in type(part).__mro__)
    names = dict.fromkeys(each.__module__ for each in classes if _package_of(each) not in _LIBRARIES)
    kinds = _generator_types()
    for name in names:
        values = list(getattr(sys.modules.get(name), "__dict__", {}).values())
        yield from (value for value in values if isinstance(value, kinds))


def _generator_types() -> tuple[type, ...]:
    numpy = sys.modules.get("numpy")
    numpys = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    return (random.Random, torch.Generator, *numpys)


class _Snapshot:
    """Walks over Python objects and notes how to put each one's contents back.

    Attributes:
        undo_all: one function for each object that can change in place.
        n_bytes: of the tensors that were copied.
    """

    def __init__(self, apart: Iterable[object]) -> None:
        self.undo_all: list[Undo] = []
        self.n_bytes = 0
        self._seen: dict[int, object] = {id(value): value for value in apart}  # keeps them alive, so ids stay theirs

    def take(self, value: object) -> None:
        """Notes the contents of ``value`` and of all that it holds."""
        pending = [value]
        while pending:
            value = pending.pop()
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                pending += self._note(value)

    def _note(self, value: Any) -> Iterable[object]:
        """Notes how to restore one object, and returns what it holds."""
        if isinstance(value, Tensor):
            return self._note_tensor(value)
        if isinstance(value, (list, deque, set, dict)):
            return self._note_container(value)
        if isinstance(value, tuple):
            return value
        if isinstance(value, FunctionType):
            return [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        if isinstance(value, MethodType):
            return [value.__self__]
        if isinstance(value, partial):
            return [value.func, *value.args, *value.keywords.values()]
        return self._note_object(value)

    def _note_tensor(self, value: Tensor) -> Iterable[object]:
        kept = value.detach().clone()
        self.n_bytes += kept.untyped_storage().nbytes() if kept.layout is torch.strided else 0

        self.undo_all.append(partial(_put_back, value, kept))
        return ()

    def _note_container(self, value: Any) -> Iterable[object]:
        kept = dict(value) if isinstance(value, dict) else list(value)

        def undo() -> None:
            value.clear()
            value.update(kept) if isinstance(value, (set, dict)) else value.extend(kept)

        self.undo_all.append(undo)
        return list(kept.values()) if isinstance(kept, dict) else kept

    def _note_object(self, value: Any) -> Iterable[object]:
        if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):  # which has no state
            self.undo_all.append(partial(value.setstate, value.getstate()))
            return ()
        if isinstance(value, torch.Generator):
            self.undo_all.append(partial(_set_generator, value, value.clone_state()))
            return ()
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray):
            self.undo_all.append(partial(numpy.copyto, value, value.copy()))
            return ()
        if numpy is not None and isinstance(value, numpy.random.Generator):
            state = value.bit_generator.state
            self.undo_all.append(partial(setattr, value.bit_generator, "state", state))
            return ()
        if numpy is not None and isinstance(value, numpy.random.RandomState):
            self.undo_all.append(partial(value.set_state, value.get_state()))
            return ()
        attributes = getattr(value, "__dict__", None)
        # of libraries' objects and classes none is the model's state; a model's own class is user code
        if isinstance(value, type) or not isinstance(attributes, dict) or not _is_user_object(value):
            return ()
        return self._note_container(attributes)


class _TensorFinder(_Snapshot):
    """Finds the tensors that Python objects hold.

    Attributes:
        found: those tensors.
    """

    def __init__(self, apart: Iterable[object]) -> None:
        super().__init__(apart)
        self.found: list[Tensor] = []

    def _note_tensor(self, value: Tensor) -> Iterable[object]:
        self.found.append(value)
        return ()


def _put_back(tensor: Tensor, value: Tensor) -> None:
    """Writes a value where it is another one: writing bumps the version that a pending backward pass looks at."""
    if not torch.equal(tensor, value):
        with torch.no_grad():
            tensor.copy_(value)


def _set_generator(generator: torch.Generator, kept: torch.Generator) -> None:
    """Sets a generator back to the state of a copy, which is no tensor."""
    generator.set_state(kept.get_state())


def _is_filled(cell: Any) -> bool:
    """Whether a closure's cell holds anything yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _is_user_object(value: object) -> bool:
    """Whether an object with attributes may be part of the model's state: a module, or of a class outside torch."""
    if isinstance(value, nn.Module):
        return True
    return _package_of(type(value)) not in _LIBRARIES and not isinstance(value, Mapping)


def _package_of(kind: type) -> str:
    return kind.__module__.partition(".")[0]


_LIBRARIES = frozenset({"torch", "builtins", "types", "functools", "typing", "logging", "threading", "numpy", "enum"})
