"""How requests reach devices: the protocol, and a transport within one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from fxhybrid.errors import PlanMismatchError
from fxhybrid.federated.protocol.messages import Outcome, Reply, Request, failed

Handler = Callable[[Request], Reply]


class Transport(Protocol):
    """Reaches devices, wherever they are."""

    def devices(self) -> Sequence[str]:
        """Lists the devices that can be asked now, in a fixed order."""
        ...

    def ask(self, requests: Sequence[Request], deadline_s: float) -> list[Reply]:
        """Returns one reply per request, in the same order; a device's failure is a reply too, never an exception.

        Args:
            requests: at most one per device.
            deadline_s: seconds after which an answer is too late.
        """
        ...


class InProcessTransport:
    """Reaches devices that are functions of this process.

    ``elapsed_s`` of their replies is what they say it is: a simulated device keeps a clock of its own.
    """

    def __init__(self, handlers: Mapping[str, Handler], *, workers: int = 1) -> None:
        """Keeps the devices.

        Args:
            handlers: what answers for each device.
            workers: requests answered at the same time; the result is the same for any number.
        """
        self.handlers = dict(handlers)
        self.workers = workers

    def devices(self) -> Sequence[str]:
        """Lists all of them."""
        return list(self.handlers)

    def ask(self, requests: Sequence[Request], deadline_s: float) -> list[Reply]:
        """Answers by calling the handlers; see ``Transport``."""
        if self.workers == 1 or len(requests) == 1:
            return [self._answer(request, deadline_s) for request in requests]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda request: self._answer(request, deadline_s), requests))

    def _answer(self, request: Request, deadline_s: float) -> Reply:
        handler = self.handlers.get(request.device)
        if handler is None:
            return failed(request, Outcome.LOST, deadline_s, "no such device")
        reply = answered(handler, request)
        if reply.elapsed_s > deadline_s:
            return failed(request, Outcome.LATE, deadline_s, f"answered after {reply.elapsed_s:.1f} s")
        return replace(reply, device=request.device, round=request.round)


def answered(handler: Handler, request: Request) -> Reply:
    """Returns what the handler replies; an exception becomes a typed reply."""
    try:
        return handler(request)
    except PlanMismatchError as error:
        return failed(request, Outcome.REFUSED, 0.0, str(error))
    except Exception as error:  # noqa: BLE001 - a device's fault must not end the run, whatever it is
        outcome = Outcome.OOM if is_out_of_memory(error) else Outcome.FAILED
        return failed(request, outcome, 0.0, f"{type(error).__name__}: {error}")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception says that memory ran out; torch on CPU says so in a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
