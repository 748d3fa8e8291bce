"""A driver for a real fleet, from the flat configuration that Flower's runs have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxhybrid.federated.client.node import task_of
from fxhybrid.federated.client.trainer import Trainer
from fxhybrid.federated.protocol.transport import Transport
from fxhybrid.federated.server.build_driver import build_driver
from fxhybrid.federated.server.driver import Driver
from fxhybrid.federated.server.fleet_planner import FleetPlanner
from fxhybrid.federated.server.policies import Settings, policy_of


def driver_from_config(transport: Transport, config: Mapping[str, Any]) -> Driver:
    """Captures the task's step once, for planning, and joins the parts.

    Args:
        transport: reaches the devices.
        config: keys as in ``flower_app/pyproject.toml``.

    Raises:
        InvalidArgument: a value cannot be used.
    """
    policy = policy_of(str(config["policy"]))
    task = task_of(config, int(config["num-partitions"]))
    planners = {}
    for width in policy.widths:
        trainer = Trainer(task, width)
        planners[width] = FleetPlanner.of(trainer.hybrid, technique=policy.technique)
    settings = Settings(
        int(config["num-server-rounds"]),
        int(config["devices-per-round"]),
        local_steps=int(config["local-steps"]),
        deadline_s=float(config["deadline-s"]) or None,
        report_deadline_s=float(config["report-deadline-s"]),
        report_every=int(config["report-every"]),
        seed=int(config["seed"]),
        overhead_bytes=int(config["overhead-bytes"]),
    )
    folder = Path(str(config["folder"])) if config["folder"] else None
    files = {"log": folder / "rounds.jsonl", "checkpoint": folder / "checkpoint.npz"} if folder else {}
    of = {name: config[name] for name in ("task", "num-partitions")}
    return build_driver(transport, task, planners, policy, settings, of=of, **files)
