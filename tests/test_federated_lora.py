"""The LoRA task: adapters on a frozen base, trained within plans, with 8-bit optimizer state that counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.client.local_steps import LocalWork
from fxhybrid.federated.client.trainer import Trainer
from fxhybrid.federated.protocol.model_arrays import load_arrays, to_arrays
from fxhybrid.federated.server.fleet_planner import FleetPlanner
from fxhybrid.federated.tasks import lora
from fxhybrid.federated.tasks.adam8bit import BLOCK, Adam8bit
from fxhybrid.federated.tasks.tasks import score_model
from fxhybrid.profiling.optimizer_step import optimizer_bytes


def test_8_bit_adam_follows_adam_on_a_quarter_of_the_state() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(40, 50, generator=generator)
    ends = []
    for kind in (torch.optim.Adam, Adam8bit):
        parameter = torch.nn.Parameter(torch.zeros(40, 50))
        optimizer = kind([parameter], lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            (parameter - target).square().sum().backward()
            optimizer.step()
        ends.append(float((parameter.detach() - target).norm() / target.norm()))
    assert max(ends) < 0.2
    assert abs(ends[0] - ends[1]) < 0.05
    # 2,000 numbers are 8 blocks of 256: a byte for each moment and number, 4 bytes a block for each moment's scale
    assert optimizer_bytes(optimizer).state_bytes == 8 * (2 * BLOCK + 2 * 4)


def test_adapters_train_within_plans_and_nothing_else_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "BASE_STEPS", 5)
    monkeypatch.setattr(lora, "N_LAYERS", 1)
    task = lora.lora_task(3)
    assert len(task.clients) == 3
    trainer = Trainer(task)
    planner, profile = FleetPlanner.of(trainer.hybrid), DeviceProfile()
    low, high = planner.smallest_bytes(profile), planner.save_all_bytes
    assert low < 0.7 * high
    start = to_arrays(trainer.model)
    assert {name.rpartition(".")[2] for name in start} == {"down", "up"}
    frozen = {name: value.clone() for name, value in trainer.model.state_dict().items() if name not in start}
    planned = planner.plan(profile, (low + high) // 2)
    assert planned is not None
    work = LocalWork((planned.plan,), 10, 0.0, (1,), elastic=False)
    before = score_model(task, trainer.model).loss
    result = trainer.train_by([planned.plan] * 10, start, work, next(iter(task.clients.values())))
    assert all(np.abs(result.arrays[name]).max() > 0 for name in start)
    load_arrays(trainer.model, result.arrays)
    assert score_model(task, trainer.model).loss < before
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in frozen.items())
    with pytest.raises(InvalidArgument, match="width"):
        task.make_model(0.5)
