"""The ClientApp of a deployment on Flower: a node for every message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fxhybrid.federated.client.node import Node
from fxhybrid.federated.flower.records import decode_request, encode_reply
from fxhybrid.federated.protocol.messages import Kind


def make_client_app(make_node: Callable[[Mapping[str, Any], Mapping[str, Any]], Node] = Node) -> ClientApp:
    """Makes a ClientApp whose devices are nodes made from node and run configuration."""
    app = ClientApp()

    def answer(message: Message, context: Context, kind: Kind) -> Message:
        node = make_node(context.node_config, context.run_config)
        return Message(encode_reply(node.answer(decode_request(message, kind))), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return answer(message, context, Kind.REPORT)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, Kind.TRAIN)

    return app
