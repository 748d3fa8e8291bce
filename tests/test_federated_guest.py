"""A user's own model, data and train function on Flower, with the strategy and the mod of fxhybrid."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install 'fxhybrid[federated]'")

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam, FedAvg
from torch.nn import functional as F

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.flower.client_mod import FxHybridMod
from fxhybrid.federated.flower.strategy import FxHybridStrategy
from fxhybrid.federated.server.policies import Settings
from fxhybrid.federated.tasks.named_tasks import load_task
from tests.flower_deployment import Deployment
from tests.test_federated_flower import LocalGrid

GUEST = Path(__file__).parent / "flower_guest"
SETTINGS = Settings(1, devices_per_round=2, over_selection=1.0, local_steps=40)


@pytest.fixture(scope="module", autouse=True)
def guest() -> Iterator[None]:
    sys.path.insert(0, str(GUEST))
    yield
    sys.path.remove(str(GUEST))
    for name in [name for name in sys.modules if name.startswith("guest_app")]:
        del sys.modules[name]


class Clients(LocalGrid):
    """A Grid whose nodes run the guest's ClientApp; whoever fails is killed in every training."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        super().__init__(dict.fromkeys((1, 2), self._answer))
        self.failing = failing

    def _answer(self, message: Message) -> Message:
        from guest_app.client_app import app

        node = message.metadata.dst_node_id
        if node in self.failing and message.metadata.message_type == "train":
            return Message(Error(code=8, reason="ClientApp stopped responding."), reply_to=message)
        context = Context(1, node, {"partition-id": node}, RecordDict(), {})
        return app(message, context)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(list(messages)))


def accuracy(arrays: ArrayRecord) -> float:
    from guest_app.task import make_model, points

    model = make_model()
    model.load_state_dict(arrays.to_torch_state_dict())
    inputs, targets = points(1000)
    return float((model(inputs).argmax(1) == targets).float().mean())


def strategy(kind: type[FxHybridStrategy] = FxHybridStrategy, **options: object) -> FxHybridStrategy:
    from guest_app.task import make_task

    return kind(make_task(2), settings=SETTINGS, fraction_evaluate=0.0, **options)  # type: ignore[arg-type]


def run(planned: FedAvg | DifferentialPrivacyServerSideFixedClipping, grid: LocalGrid, rounds: int) -> ArrayRecord:
    from guest_app.task import make_model

    return planned.start(grid, ArrayRecord(make_model().state_dict()), num_rounds=rounds).arrays  # type: ignore[arg-type]


def test_an_own_train_function_runs_by_plans_within_differential_privacy() -> None:
    planned = strategy()
    private = DifferentialPrivacyServerSideFixedClipping(planned, 0.001, 10.0, num_sampled_clients=2)
    assert accuracy(run(private, Clients(), 2)) > 0.75
    records = planned.scheduler.records
    assert sorted(records) == ["1", "2"]
    assert [record.times_selected for record in records.values()] == [2, 2]
    assert all(record.slowdown and record.squared_loss is not None for record in records.values())


def test_a_killed_client_teaches_the_forecast_and_other_strategies_average() -> None:
    class Adam(FxHybridStrategy, FedAdam):
        pass

    planned = strategy(Adam, eta=0.01)
    told: list[str] = []
    planned.scheduler.forecaster.report_miss = lambda device, t_s: told.append(device)  # type: ignore[method-assign]
    run(planned, Clients(failing=(2,)), 2)
    assert told == ["2", "2"]  # after two failures it rests
    assert planned.scheduler.records["2"].failures == 2
    assert planned.current_arrays is not None  # FedAdam saw every round


def test_the_mod_needs_a_plan_and_steps_need_the_mod() -> None:
    mod, model = FxHybridMod(1), torch.nn.Linear(2, 2)
    message = Message(RecordDict({"config": ConfigRecord({})}), 1, "train")
    with pytest.raises(InvalidArgument, match="FxHybridStrategy"):
        mod(message, Context(1, 1, {}, RecordDict(), {}), lambda message, context: message)
    with pytest.raises(InvalidArgument, match="train function"):
        next(mod.steps(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), []))


def test_tasks_are_found_by_module_path() -> None:
    assert load_task("guest_app.task:make_task", 3, 0).name == "moons"
    with pytest.raises(InvalidArgument, match="no function"):
        load_task("guest_app.task:make_tusk", 3, 0)
    with pytest.raises(InvalidArgument, match="cannot be called"):
        load_task("guest_app.task:points", 3, 0)
    with pytest.raises(InvalidArgument, match="no task 'digit'"):
        load_task("digit", 3, 0)


@pytest.mark.slow
def test_a_guest_runs_on_flowers_own_processes(tmp_path: Path) -> None:
    with Deployment(tmp_path) as deployment:
        deployment.app = GUEST
        deployment.superlink()
        deployment.supernode(0)
        deployment.supernode(1)
        deployment.start_run(num_server_rounds=2)
        assert deployment.result(400) == {"rounds": 2, "answers": 4, "measured": True}, deployment.logs()
