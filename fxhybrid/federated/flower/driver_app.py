"""The ServerApp of a deployment on Flower: a driver made from the run configuration."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.flower.grid_transport import FlowerTransport
from fxhybrid.federated.server.build_driver import build_driver, planners_of
from fxhybrid.federated.server.driver import Driver
from fxhybrid.federated.server.policies import Settings, policy_of
from fxhybrid.federated.tasks.named_tasks import load_task


def make_server_app() -> ServerApp:
    """Makes a ServerApp that runs the driver of its run configuration."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        _log_rounds()
        transport = FlowerTransport(grid)
        config = dict(context.run_config)
        driver = driver_from_config(transport, config)
        wait_for_nodes(transport, int(config["min-nodes"]), float(config["wait-s"]))
        if config["resume"]:
            driver.resume()
        driver.run()
        if config["out"]:
            score = driver.evaluate(driver.arrays)
            result = {"rounds": driver.round, "outcomes": dict(driver.outcomes), "accuracy": score.accuracy}
            Path(str(config["out"])).write_text(json.dumps(result), encoding="utf-8")

    return app


def driver_from_config(transport: FlowerTransport, config: Mapping[str, Any]) -> Driver:
    """Captures the task's step once, for planning, and joins the parts.

    Args:
        transport: reaches the devices.
        config: keys as in ``flower_app/pyproject.toml``.

    Raises:
        InvalidArgument: a value cannot be used.
    """
    policy = policy_of(str(config["policy"]))
    task = load_task(str(config["task"]), int(config["num-partitions"]), int(config["seed"]))
    settings = Settings(
        int(config["num-server-rounds"]),
        int(config["devices-per-round"]),
        local_steps=int(config["local-steps"]),
        deadline_s=float(config["deadline-s"]) or None,
        report_deadline_s=float(config["report-deadline-s"]),
        report_every=int(config["report-every"]),
        seed=int(config["seed"]),
        overhead_bytes=int(config["overhead-bytes"]),
        update_bits=int(config["update-bits"]),
    )
    folder = Path(str(config["folder"])) if config["folder"] else None
    files = {"log": folder / "rounds.jsonl", "checkpoint": folder / "checkpoint.npz"} if folder else {}
    of = {name: config[name] for name in ("task", "num-partitions")}
    return build_driver(transport, task, planners_of(task, policy), policy, settings, of=of, **files)


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
