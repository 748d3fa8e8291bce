"""The driver's requests over the Grid's push and pull.

A node's id is its device's name: start SuperNodes with a key of their own (``--auth-supernode-private-key``), then it
survives restarts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fxhybrid.federated.flower.records import MESSAGE_TYPES, decode_reply, encode_request
from fxhybrid.federated.protocol.messages import Outcome, Reply, Request, failed

POLL_S = 0.3


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
            group = str(request.round)
            messages.append(Message(encode_request(request), node, kind, ttl=ttl, group_id=group))
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
