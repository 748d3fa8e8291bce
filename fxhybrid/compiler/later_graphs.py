"""Graphs, layouts and costs of new sizes that are made when somebody reads them: running a known plan needs none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.passes.storages import Layout
from fxhybrid.profiling.cost_cache import OpCost


class _Later:
    """A frozen dataclass that takes the fields that it lacks from another one, which is built then."""

    def __init__(self, build: Callable[[], Any], **known: Any) -> None:
        """Takes what builds the other one, and the fields that are known without."""
        self.__dict__.update(known, _build=build)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_build" not in self.__dict__:
            raise AttributeError(name)
        built = self.__dict__["_build"]()
        self.__dict__.pop("_build", None)
        self.__dict__.update({field: value for field, value in vars(built).items() if field not in self.__dict__})
        return getattr(self, name)


class LaterJointGraph(_Later, JointGraph):
    """A joint graph that is built when its nodes are read; its roles may be known before."""


class LaterLayout(_Later, Layout):
    """A layout that is built when it is read."""


class LaterCosts(Mapping[str, OpCost]):
    """Costs by call key that are worked out when somebody asks for one."""

    def __init__(self, build: Callable[[], Mapping[str, OpCost]]) -> None:
        """Takes what works the costs out."""
        self._build = build

    @cached_property
    def _costs(self) -> Mapping[str, OpCost]:
        return self._build()

    def __getitem__(self, key: str) -> OpCost:
        return self._costs[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._costs)

    def __len__(self) -> int:
        return len(self._costs)
