"""The devices' app: a plain train function of Flower's, whose steps run by plans."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn import functional as F

from fxhybrid.federated.flower.client_mod import FxHybridMod
from fxhybrid.federated.tasks.data import ArrayData
from guest_app.task import make_model, points

N_EXAMPLES = 256

mod = FxHybridMod(N_EXAMPLES)
app = ClientApp()
app.query()(mod.report)


@app.train(mods=[mod])
def train(message: Message, context: Context) -> Message:
    """Trains the model that came, and sends it back."""
    model = make_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = ArrayData(*points(int(context.node_config["partition-id"]), N_EXAMPLES))
    for step in mod.steps(model, F.cross_entropy, optimizer, data.batches(64, (0,))):
        step()
        optimizer.step()
    metrics = MetricRecord({"num-examples": N_EXAMPLES})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)
