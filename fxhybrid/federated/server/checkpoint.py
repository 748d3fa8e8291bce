"""Checkpoints: everything that a run needs to go on bit-exactly, in one file of arrays and JSON; no pickle."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.protocol.messages import Array, Arrays, Kind, Request

FORMAT = 6
_MODEL, _OPEN = "model/", "open/"
_HEAD = ("device", "round", "now_s", "deadline_s")


@dataclass(frozen=True)
class Checkpoint:
    """Holds a run after a finished round.

    Attributes:
        arrays: the global model.
        state: everything else, as JSON values; ``identity`` among them says which run it is.
        requests: that devices are still working on; they are asked again.
    """

    arrays: Arrays
    state: Mapping[str, Any]
    requests: Sequence[Request] = ()

    def save(self, path: Path) -> None:
        """Writes the file in one stroke: whenever the process dies, the old one or the new one is whole."""
        heads = [{name: getattr(r, name) for name in _HEAD} | {"payload": dict(r.payload)} for r in self.requests]
        text = json.dumps({"format": FORMAT, **self.state, "requests": heads}).encode()
        entries: dict[str, Any] = {_MODEL + name: array for name, array in self.arrays.items()}
        for request in self.requests:
            entries |= {f"{_OPEN}{request.device}/{name}": array for name, array in request.arrays.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            np.savez(file, state=np.frombuffer(text, np.uint8), **entries)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, Any]) -> Checkpoint:
        """Reads a file of the run ``identity``.

        Raises:
            InvalidArgument: it cannot be read, or belongs to another run.
        """
        try:
            # numpy leaves a file open that is no archive, so it is opened here
            with path.open("rb") as file, np.load(file, allow_pickle=False) as entries:
                state: dict[str, Any] = json.loads(bytes(entries["state"]))
                arrays = _under(_MODEL, entries)
                requests = [
                    Request(**head, kind=Kind.TRAIN, arrays=_under(f"{_OPEN}{head['device']}/", entries))
                    for head in state.pop("requests")
                ]
            if state.pop("format") != FORMAT:
                raise ValueError(f"checkpoint format is not {FORMAT}")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InvalidArgument(f"{path} is no checkpoint that can be read: {error}") from error
        if state["identity"] != json.loads(json.dumps(identity)):
            raise InvalidArgument(f"{path} belongs to another run: {state['identity']}, not {dict(identity)}")
        return cls(arrays, state, requests)


def _under(prefix: str, entries: Any) -> dict[str, Array]:
    return {name.removeprefix(prefix): entries[name] for name in entries.files if name.startswith(prefix)}
