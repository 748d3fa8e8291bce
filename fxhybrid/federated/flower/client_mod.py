"""A mod of Flower's that carries out plans in a user's own train function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor, nn

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.client.local_steps import LocalWork, local_steps
from fxhybrid.federated.client.node import ProcessMemoryMonitor, introduction
from fxhybrid.federated.client.training_reply import LocalResult
from fxhybrid.federated.flower.records import WORK, decode_request, encode_reply, from_json_record, json_record
from fxhybrid.federated.protocol.messages import Kind, Outcome, Reply
from fxhybrid.ir.plan import Plan
from fxhybrid.suite.sample_data import Batch

LossFn = Callable[[Tensor, Tensor], Tensor]


class FxHybridMod:
    """Runs the local steps of a train function by the plans that ``FxHybridStrategy`` sends; see docs/FEDERATED.md.

    Args:
        n_examples: that this device holds.
    """

    def __init__(self, n_examples: int) -> None:
        self.n_examples = n_examples
        self._work: LocalWork | None = None
        self._monitor = ProcessMemoryMonitor(None, is_guarded=False)
        self._losses: list[float] = []
        self._plans: list[Plan] = []

    def report(self, message: Message, context: Context) -> Message:
        """Answers how much memory there is: what a ClientApp does for messages of the type "query"."""
        request = decode_request(message, Kind.REPORT)
        monitor = ProcessMemoryMonitor.of(context.node_config)
        payload = introduction(request, monitor.available_bytes(), self.n_examples)
        reply = Reply(request.device, request.round, Outcome.OK, 0.0, payload)
        return Message(encode_reply(reply), reply_to=message)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Has the train function run, and adds what was measured to its reply."""
        if WORK not in message.content:
            raise InvalidArgument("there is no plan in this message; the server needs FxHybridStrategy")
        payload = from_json_record(message.content.config_records[WORK])
        self._work = LocalWork.from_payload(payload)
        self._monitor = monitor = ProcessMemoryMonitor.of(context.node_config)
        self._losses, self._plans = [], []
        start_s = time.monotonic()
        reply = call_next(message, context)
        if not reply.has_error() and self._plans:
            measured = LocalResult({}, self._losses, self._plans).measured(
                self.n_examples,
                steps_s=monitor.steps_s,
                busy_s=time.monotonic() - start_s,
                readings=[[payload["now_s"] + t_s, free] for t_s, free in monitor.readings],
            )
            reply.content = RecordDict({**reply.content, WORK: json_record(measured)})
        return reply

    def steps(
        self, model: nn.Module, loss_fn: LossFn, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]
    ) -> Iterator[Callable[[], float]]:
        """Yields local steps, as many as the server asked for and memory and time allow.

        A step runs one forward and one backward pass, fills ``.grad`` and returns the loss. The optimizer is the
        caller's to step.

        Args:
            model: of the same graph as the server's task.
            loss_fn: ``loss_fn(output, target)``.
            optimizer: whose state counts in the plans' peaks.
            batches: of inputs and targets, all of one shape.

        Raises:
            PlanMismatchError: the plan was made for another graph.
            MemoryError: memory ran out, or there was never enough for the smallest plan.
        """
        if self._work is None:
            raise InvalidArgument("steps are made within a train function that has this mod")
        from fxhybrid.federated.tasks.captured_step import capture_model  # takes torch's compiler, a report does not

        source = iter(batches)
        batch = next(source)
        hybrid = capture_model(model, loss_fn, optimizer, batch, plan=self._work.plans[0])
        for number, plan in enumerate(local_steps(self._work, self._monitor)):
            inputs, targets = batch if number == 0 else next(source)
            hybrid.use_plan(plan)

            def step(x: Tensor = inputs, y: Tensor = targets, own: Plan = plan) -> float:
                optimizer.zero_grad(set_to_none=True)
                loss = self._monitor.run_step(lambda: _pass(hybrid, x, y), own)
                self._losses.append(loss)
                self._plans.append(own)
                return loss

            yield step


def _pass(hybrid: Any, inputs: Tensor, targets: Tensor) -> float:
    loss = hybrid(inputs, loss_args=(targets,))
    loss.backward()
    return float(loss.detach())
