"""A driver for a real fleet, from the flat configuration that Flower's runs have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxhybrid.federated.protocol.transport import Transport
from fxhybrid.federated.server.build_driver import build_driver, planners_of
from fxhybrid.federated.server.driver import Driver
from fxhybrid.federated.server.policies import Settings, policy_of
from fxhybrid.federated.tasks.named_tasks import load_task


def driver_from_config(transport: Transport, config: Mapping[str, Any]) -> Driver:
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
