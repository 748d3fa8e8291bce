"""How requests reach devices: the protocol, and a transport within one process."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from fxhybrid.errors import PlanMismatchError
from fxhybrid.federated.protocol.messages import Outcome, Reply, Request, failed


@dataclass(frozen=True)
class Deferred:
    """Holds an answer of which only the time is known yet; it is made when somebody wants it.

    Attributes:
        elapsed_s: seconds from request to answer.
        finish: makes the answer.
    """

    elapsed_s: float
    finish: Callable[[], Reply]


Answer = TypeVar("Answer", Reply, Reply | Deferred)
Handler = Callable[[Request], Reply | Deferred]


class Transport(Protocol):
    """Reaches devices, wherever they are. Every request has one reply; a device's failure is one too."""

    def devices(self) -> Sequence[str]:
        """Lists the devices that can be asked now, in a fixed order."""
        ...

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Returns one reply per request, in the same order; whoever misses a request's deadline is late."""
        ...

    def send(self, requests: Sequence[Request]) -> None:
        """Sends requests whose replies :meth:`receive` returns, at most one per device at a time."""
        ...

    def receive(self) -> Reply | None:
        """Waits for the next reply to what was sent; None where no request is open."""
        ...

    def drop(self) -> None:
        """Waits for no reply any more."""
        ...


class InProcessTransport:
    """Reaches devices that are functions of this process.

    ``elapsed_s`` of their replies is what they say it is: a simulated device keeps a clock of its own, and replies are
    received in the order of that clock.
    """

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        """Keeps the function that answers for each device."""
        self.handlers = dict(handlers)
        self._open: list[tuple[float, int, Request, Reply | Deferred]] = []
        self._numbers = itertools.count()

    def devices(self) -> Sequence[str]:
        """Lists all of them."""
        return list(self.handlers)

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Answers by calling the handlers; see ``Transport``."""
        return [_in_time(self._answer(request), request) for request in requests]

    def send(self, requests: Sequence[Request]) -> None:
        """Calls the handlers, and keeps what they say for :meth:`receive`."""
        for request in requests:
            answer = self._answer(request)
            arrival_s = request.now_s + min(answer.elapsed_s, request.deadline_s)
            heapq.heappush(self._open, (arrival_s, next(self._numbers), request, answer))

    def receive(self) -> Reply | None:
        """Returns the reply that comes first."""
        if not self._open:
            return None
        _, _, request, answer = heapq.heappop(self._open)
        return _in_time(answer, request)

    def drop(self) -> None:
        """Forgets all open requests; answers that were put off are never made."""
        self._open.clear()

    def _answer(self, request: Request) -> Reply | Deferred:
        handler = self.handlers.get(request.device)
        if handler is None:
            return failed(request, Outcome.LOST, request.deadline_s, "no such device")
        return answered(handler, request)


def _in_time(answer: Reply | Deferred, request: Request) -> Reply:
    """Returns the answer itself, or that it is late."""
    if answer.elapsed_s > request.deadline_s:
        return failed(request, Outcome.LATE, request.deadline_s, f"answered after {answer.elapsed_s:.1f} s")
    if isinstance(answer, Deferred):
        finish, elapsed_s = answer.finish, answer.elapsed_s
        answer = replace(answered(lambda _: finish(), request), elapsed_s=elapsed_s)
    return replace(answer, device=request.device, round=request.round)


def answered(handler: Callable[[Request], Answer], request: Request) -> Answer | Reply:
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
