"""Flower: the driver's requests over the Grid's push and pull, and the two apps of a deployment.

The only module that imports flwr. A node's id is its device's name: start SuperNodes with a key of their own
(``--auth-supernode-private-key``), then it survives restarts.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fxhybrid.errors import InvalidArgument, PlanMismatchError
from fxhybrid.federated.client.node import Node
from fxhybrid.federated.flower.run_config import driver_from_config
from fxhybrid.federated.protocol.messages import Arrays, Kind, Outcome, Reply, Request, failed
from fxhybrid.federated.protocol.transport import is_out_of_memory
from fxhybrid.federated.server.driver import Driver

POLL_S = 0.3
MESSAGE_TYPES = {Kind.REPORT: "query", Kind.TRAIN: "train"}
_PAYLOAD, _ARRAYS = "payload", "arrays"
_OUTCOMES = {5: Outcome.LOST, 8: Outcome.KILLED}  # Flower's codes: the node left; its client process was killed


class FlowerTransport:
    """Reaches the SuperNodes that the SuperLink knows."""

    def __init__(self, grid: Grid, *, poll_s: float = POLL_S) -> None:
        """Keeps the grid.

        Args:
            grid: what a ServerApp gets.
            poll_s: seconds between two polls for replies.
        """
        self.grid = grid
        self.poll_s = poll_s
        self._nodes: dict[str, int] = {}
        self._open: dict[str, tuple[Request, float]] = {}
        self._ready: list[Reply] = []

    def devices(self) -> Sequence[str]:
        """Lists the nodes that are online; the previous ones where the SuperLink cannot be reached."""
        with contextlib.suppress(Exception):  # transport errors of Flower have no common class
            self._nodes = {str(node): node for node in sorted(self.grid.get_node_ids())}
        return list(self._nodes)

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Pushes all requests and pulls replies until the last is there or late; see ``Transport``."""
        waiting, lost = self._push(requests)
        replies = {reply.device: reply for reply in lost}
        while waiting:
            replies |= {reply.device: reply for reply in self._replies(waiting)}
        return [replies[request.device] for request in requests]

    def send(self, requests: Sequence[Request]) -> None:
        """Pushes requests; see ``Transport``."""
        waiting, lost = self._push(requests)
        self._open |= waiting
        self._ready += lost

    def receive(self) -> Reply | None:
        """Pulls until there is a reply, or a request is late; see ``Transport``."""
        while self._open and not self._ready:
            self._ready += self._replies(self._open)
        return self._ready.pop(0) if self._ready else None

    def drop(self) -> None:
        """Forgets what was sent; devices cannot be told to stop, and their answers are not pulled."""
        self._open.clear()
        self._ready.clear()

    def _replies(self, waiting: dict[str, tuple[Request, float]]) -> list[Reply]:
        """Takes the replies that are there now from ``waiting``, and those that are late; else sleeps for a moment."""
        found = []
        for message in self._pull(list(waiting)):
            request, sent_s = waiting.pop(message.metadata.reply_to_message_id, (None, 0.0))
            if request is not None:
                found.append(decode_reply(message, request, time.monotonic() - sent_s))
        for identity, (request, sent_s) in list(waiting.items()):
            if time.monotonic() - sent_s > request.deadline_s:
                del waiting[identity]
                found.append(failed(request, Outcome.LATE, request.deadline_s, "no answer before the deadline"))
        if not found and waiting:
            time.sleep(self.poll_s)
        return found

    def _push(self, requests: Sequence[Request]) -> tuple[dict[str, tuple[Request, float]], list[Reply]]:
        """Sends requests; returns them and when, by the ids of their messages, and those that could not be sent."""
        messages = []
        for request in requests:
            kind = MESSAGE_TYPES[request.kind]
            node, ttl = self._nodes[request.device], request.deadline_s
            messages.append(self.grid.create_message(encode_request(request), kind, node, str(request.round), ttl))
        try:
            identities = list(self.grid.push_messages(messages))
        except Exception:  # noqa: BLE001 - transport errors of Flower have no common class
            identities = []
        now_s = time.monotonic()
        sent = {name: (r, now_s) for name, r in zip(identities, requests, strict=False) if name}
        taken = {request.device for request, _ in sent.values()}
        return sent, [failed(r, Outcome.LOST, 0.0, "could not be sent") for r in requests if r.device not in taken]

    def _pull(self, identities: Sequence[str]) -> list[Message]:
        try:
            return list(self.grid.pull_messages(identities))
        except Exception:  # noqa: BLE001 - as above
            return []  # the SuperLink may be starting again; the deadline bounds the wait


# -- messages ---------------------------------------------------------------------------------------------


def _pack(payload: Mapping[str, Any], arrays: Arrays) -> RecordDict:
    held = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return RecordDict({_PAYLOAD: ConfigRecord({"json": json.dumps(dict(payload))}), _ARRAYS: held})


def _unpack(record: RecordDict) -> tuple[dict[str, Any], Arrays]:
    payload: dict[str, Any] = json.loads(str(record.config_records[_PAYLOAD]["json"]))
    return payload, {name: array.numpy() for name, array in record.array_records[_ARRAYS].items()}


def encode_request(request: Request) -> RecordDict:
    """Encodes a request as Flower's records."""
    head = {"round": request.round, "now_s": request.now_s, "deadline_s": request.deadline_s}
    return _pack({**head, "payload": dict(request.payload)}, request.arrays)


def decode_request(message: Message, kind: Kind) -> Request:
    """Decodes the request in a message that a device got."""
    payload, arrays = _unpack(message.content)
    device = str(message.metadata.dst_node_id)
    return Request(device, kind, payload["round"], payload["now_s"], payload["deadline_s"], payload["payload"], arrays)


def decode_reply(message: Message, request: Request, elapsed_s: float) -> Reply:
    """Decodes the reply in a message that the server got; whatever is wrong with it becomes its outcome."""
    if message.has_error():
        code, reason = message.error.code, str(message.error.reason or "")
        return failed(request, _outcome(code, reason), elapsed_s, f"Flower error {code}: {reason}")
    try:
        payload, arrays = _unpack(message.content)
        outcome, detail = Outcome(payload["outcome"]), str(payload["detail"])
        return Reply(request.device, request.round, outcome, elapsed_s, payload["payload"], arrays, detail)
    except Exception as error:  # noqa: BLE001 - a foreign client may send anything
        return failed(request, Outcome.INVALID, elapsed_s, f"not a reply: {error!r}")


def _outcome(code: int, reason: str) -> Outcome:
    if "MemoryError" in reason or is_out_of_memory(RuntimeError(reason)):
        return Outcome.OOM
    if PlanMismatchError.__name__ in reason:
        return Outcome.REFUSED
    return _OUTCOMES.get(code, Outcome.FAILED)


# -- apps -------------------------------------------------------------------------------------------------


def make_client_app(make_node: Callable[[Mapping[str, Any], Mapping[str, Any]], Node] = Node) -> ClientApp:
    """Makes a ClientApp whose devices are nodes made from node and run configuration."""
    app = ClientApp()

    def answer(message: Message, context: Context, kind: Kind) -> Message:
        node = make_node(context.node_config, context.run_config)
        reply = node.answer(decode_request(message, kind))
        payload = {"outcome": reply.outcome.value, "detail": reply.detail, "payload": dict(reply.payload)}
        return Message(_pack(payload, reply.arrays), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return answer(message, context, Kind.REPORT)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, Kind.TRAIN)

    return app


def make_server_app(
    make_driver: Callable[[FlowerTransport, Mapping[str, Any]], Driver] = driver_from_config,
) -> ServerApp:
    """Makes a ServerApp that runs a driver made from the run configuration."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        transport = FlowerTransport(grid)
        config = dict(context.run_config)
        driver = make_driver(transport, config)
        wait_for_nodes(transport, int(config["min-nodes"]), float(config["wait-s"]))
        if config["resume"]:
            driver.resume()
        driver.run()
        if config["out"]:
            score = driver.evaluate(driver.arrays)
            result = {"rounds": driver.round, "outcomes": dict(driver.outcomes), "accuracy": score.accuracy}
            Path(str(config["out"])).write_text(json.dumps(result), encoding="utf-8")

    return app


def wait_for_nodes(transport: FlowerTransport, count: int, limit_s: float) -> None:
    """Returns as soon as there are ``count`` nodes.

    Raises:
        InvalidArgument: there are not in time.
    """
    end = time.monotonic() + limit_s
    while len(transport.devices()) < count:
        if time.monotonic() > end:
            raise InvalidArgument(f"{len(transport.devices())} nodes are there after {limit_s:.0f} s, not {count}")
        time.sleep(transport.poll_s)
