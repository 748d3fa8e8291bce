"""Training loops of other libraries, with a compiled module and with a callback: losses equal the unmodified run's."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import fxhybrid
from fxhybrid import HybridModule, InvalidArgument, Plan
from fxhybrid.integrations.planned_forward import PlannedForward
from fxhybrid.profiling.allocator import memory_rise
from fxhybrid.profiling.state_bytes import storage_bytes
from tests.models import WIDTH, mlp

pytestmark = pytest.mark.filterwarnings("ignore")  # these libraries warn of each other's names
OPTIONS: dict[str, Any] = {"budget": 1 << 30, "solver": "mps", "compression": "lossless"}
SMALL = GPT2Config(
    n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=1, pad_token_id=1
)
X = torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(1))


class Texts(Dataset[dict[str, Tensor]]):
    """Random tokens that follow from the index."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        words = torch.randint(2, 64, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": words, "labels": words}


def language_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(SMALL)


@dataclass
class Run:
    """What a training left behind."""

    losses: list[float]
    model: nn.Module
    folder: Path
    history: list[dict[str, Any]]


def train(model: nn.Module, folder: Path, callbacks: Any = (), resume: str | None = None) -> Run:
    """Four accumulating steps in bfloat16 by transformers' Trainer, evaluated and saved after two and four."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        bf16=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Texts()
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    losses = [record.get("loss", record.get("eval_loss")) for record in history]
    return Run([loss for loss in losses if loss is not None], model, folder, history)


@pytest.fixture(scope="module")
def unmodified(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(language_model(), tmp_path_factory.mktemp("plain"))


def same_run(found: Run, expected: Run) -> None:
    assert found.losses == expected.losses
    for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)
    config = json.loads((found.folder / "checkpoint-4" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]


def test_transformers_trainer_takes_a_compiled_model(unmodified: Run, tmp_path: Path) -> None:
    run = train(fxhybrid.compile(language_model(), **OPTIONS), tmp_path)
    same_run(run, unmodified)
    assert len(run.model.plans) == 1
    resumed = train(fxhybrid.compile(language_model(), **OPTIONS), tmp_path, resume=str(tmp_path / "checkpoint-2"))
    same_run(resumed, unmodified)
    start = torch.tensor([[2, 3, 4]])
    texts = [m.eval().generate(start, max_new_tokens=4, do_sample=False) for m in (run.model, unmodified.model)]
    assert torch.equal(*texts)


def padded(texts: list[Tensor]) -> dict[str, Tensor]:
    words = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=1)
    return {"input_ids": words, "labels": words.masked_fill(words == 1, -100), "attention_mask": (words != 1).long()}


def test_peaks_inside_train_stay_within_the_budget(tmp_path: Path) -> None:
    """Batches of many lengths with AdamW's state, then the same accumulated in bfloat16; the second training counts."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = GPT2Config(**{**SMALL.to_dict(), "n_embd": 64, "vocab_size": 256, "n_positions": 96})
    texts = [torch.randint(2, 256, (20 + 5 * i,), generator=torch.Generator().manual_seed(i)) for i in range(16)]
    longest = padded(texts[-8:])  # of 95 words

    def peak_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> int:
        before = [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=8,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            **settings,
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=texts, data_collator=padded, optimizers=(optimizer, None)
        )
        return storage_bytes(before) + memory_rise(trainer.train).peak_rise_bytes

    model = GPT2LMHeadModel(config).train()
    eager = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dynamic = {name: {1: 95} for name in longest}
    options = {**OPTIONS, "budget": 0.8, "optimizer": optimizer, "example_inputs": longest, "dynamic": dynamic}
    hybrid = fxhybrid.compile(model, **options)
    budget_bytes = hybrid.plan.budget_bytes
    assert peak_bytes(eager, torch.optim.AdamW(eager.parameters(), lr=1e-3)) > budget_bytes
    for settings in ({}, {"gradient_accumulation_steps": 2, "bf16": True}):
        peak_bytes(hybrid, optimizer, **settings)  # plans new kinds of calls, which takes memory of its own
        assert peak_bytes(hybrid, optimizer, **settings) <= budget_bytes


def test_callback_of_transformers_trainer(unmodified: Run, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from fxhybrid.integrations.hf_trainer import PLAN_FILE, FxHybridCallback

    callback = FxHybridCallback(**OPTIONS)
    run = train(language_model(), tmp_path, [callback])
    same_run(run, unmodified)
    plan = callback.planned.plan
    assert plan is not None
    logged = [record for record in run.history if "loss" in record]
    assert all(record["fxhybrid/peak_mib"] == plan.peak_bytes / 2**20 for record in logged)
    assert all("fxhybrid/overhead_ms" in record for record in logged)
    saved = Plan.load(tmp_path / "checkpoint-4" / PLAN_FILE)
    assert saved.actions == plan.actions
    with pytest.raises(InvalidArgument, match="no option bugdet"):
        train(language_model(), tmp_path, [FxHybridCallback(budget=1.0, bugdet=2)])


def test_callback_of_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from fxhybrid.integrations.lightning_trainer import FxHybridCallback

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss = self.model(batch[0]).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(task: Task, *callbacks: Any) -> Any:
        torch.manual_seed(3)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            callbacks=list(callbacks),
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, DataLoader(TensorDataset(X), batch_size=32))
        return trainer

    torch.manual_seed(0)
    model = mlp(0.1).train()
    tasks = Task(copy.deepcopy(model)), Task(copy.deepcopy(model)), Task(fxhybrid.compile(model, **OPTIONS))
    fit(tasks[0])
    callback = FxHybridCallback(**OPTIONS)
    trainer = fit(tasks[1], callback)
    fit(tasks[2])
    assert tasks[0].losses == tasks[1].losses == tasks[2].losses
    assert "forward" not in vars(tasks[1].model)
    assert trainer.logged_metrics["fxhybrid/peak_mib"] == pytest.approx(callback.planned.plan.peak_bytes / 2**20)
    (path,) = (tmp_path / "checkpoints").glob("*1.ckpt")
    kept = torch.load(path, weights_only=False)["fxhybrid_plan"]
    assert Plan.from_json(kept).actions == callback.planned.plan.actions
    task = Task(mlp())
    task.other = nn.Linear(2, 2)
    with pytest.raises(InvalidArgument, match=r'2 children with parameters \(model, other\).*module="\.\.\."'):
        fit(task, FxHybridCallback(**OPTIONS))


def test_accelerate_prepares_a_compiled_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    models = []
    for compile in (lambda m: m, lambda m: fxhybrid.compile(m, **OPTIONS)):
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        model, optimizer = compile(mlp(0.1).train()), None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        torch.manual_seed(3)
        for x in X.split(24):
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        models.append(model)
        bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert isinstance(bare, type(model))
        bare(X).sum().backward()  # who unwraps keeps the planned step
    assert isinstance(models[1], HybridModule)
    assert len(models[1].plans) > 1
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_adapters(order: str) -> None:
    peft = pytest.importorskip("peft")
    words = torch.randint(2, 64, (2, 16))

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        return peft.get_peft_model(model, config).train()

    model = language_model()
    model.enable_input_require_grads()
    plain = adapted(copy.deepcopy(model))
    if order == "before":
        outer = hybrid = fxhybrid.compile(adapted(model), **OPTIONS)
    else:
        hybrid = fxhybrid.compile(model, **OPTIONS)  # adapters are put into the compiled model
        outer = adapted(hybrid)
    gradients = []
    for found in (plain, outer):
        torch.manual_seed(3)
        found(input_ids=words, labels=words).loss.backward()
        gradients.append([p.grad for p in found.parameters() if p.grad is not None])
    assert len(gradients[0]) == 2  # of one layer: A and B
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(hybrid.plans) == 1


def test_a_forward_in_its_place_is_the_models_own() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.calls, self.hooked = mlp(), 0, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.body(x)

    def count(module: Any, *_: Any) -> None:
        module.hooked += 1

    model = Counting().train()
    model.register_forward_hook(count)
    expected = copy.deepcopy(model)
    planned = PlannedForward(model, 1 << 30, {"solver": "mps", "compression": "lossless"})
    for m in (model, expected, model, expected):
        m(X).square().mean().backward()
    assert (model.calls, model.hooked) == (expected.calls, expected.hooked) == (2, 2)
    assert torch.equal(model.body[0].weight.grad, expected.body[0].weight.grad)
    assert planned.plan is not None
    assert torch.equal(model.eval()(X), expected.eval()(X))
    planned.remove()
    assert "forward" not in vars(model)


def test_settings_that_need_gradients_after_the_backward_pass_are_refused(tmp_path: Path) -> None:
    transformers, lightning = pytest.importorskip("transformers"), pytest.importorskip("lightning.pytorch")
    from fxhybrid.integrations import hf_trainer, lightning_trainer

    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True)  # clips by default
    with pytest.raises(InvalidArgument, match="no gradients for max_grad_norm of"):
        hf_trainer.FxHybridCallback("1GiB", step_in_backward=True).on_train_begin(args, None, None)
    trainer = lightning.Trainer(accelerator="cpu", accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False)
    with pytest.raises(InvalidArgument, match="for gradient_clip_val and accumulate_grad_batches of"):
        lightning_trainer.FxHybridCallback("1GiB", step_in_backward=True).on_train_start(trainer, nn.Identity())
