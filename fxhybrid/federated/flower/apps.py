"""The two apps of a deployment on Flower: the driver on the server, nodes on the devices."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.client.node import Node
from fxhybrid.federated.flower.grid_transport import FlowerTransport
from fxhybrid.federated.flower.records import decode_request, encode_reply
from fxhybrid.federated.flower.run_config import driver_from_config
from fxhybrid.federated.protocol.messages import Kind
from fxhybrid.federated.server.driver import Driver


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


def make_server_app(
    make_driver: Callable[[FlowerTransport, Mapping[str, Any]], Driver] = driver_from_config,
) -> ServerApp:
    """Makes a ServerApp that runs a driver made from the run configuration."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        _log_rounds()
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


def _log_rounds() -> None:
    """Has the driver's lines, one a round, appear among those of Flower."""
    logger = logging.getLogger("fxhybrid.federated")
    logger.setLevel(logging.INFO)
    logger.handlers = logging.getLogger("flwr").handlers


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
