"""Trains a BERT classifier with transformers' Trainer and dynamic padding; the callback plans at the first batch.

Needs ``pip install 'fxhybrid[hf]'``. The task: is a line of Python's standard library code, or a comment?
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers

from fxhybrid.integrations.hf_trainer import FxHybridCallback

LONGEST, PAD = 96, 0


def examples() -> list[dict[str, list[int] | int]]:
    """Reads lines as bytes; 0 is left for padding."""
    source = Path(tempfile.__file__).read_text(encoding="utf-8").splitlines()
    lines = [line for line in source if len(line.strip()) > 8]
    return [
        {"input_ids": [min(b, 127) for b in line.encode()[:LONGEST]], "labels": int(line.lstrip().startswith("#"))}
        for line in lines
    ]


def padded(batch: list[dict[str, list[int] | int]]) -> dict[str, torch.Tensor]:
    """Pads each batch to its own longest line."""
    ids = [torch.tensor(example["input_ids"]) for example in batch]
    words = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
    labels = torch.tensor([example["labels"] for example in batch])
    return {"input_ids": words, "attention_mask": (words != PAD).long(), "labels": labels}


config = transformers.BertConfig(
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=LONGEST,
    num_labels=2,
    problem_type="single_label_classification",
)
with tempfile.TemporaryDirectory() as folder:
    trainer = transformers.Trainer(
        model=transformers.BertForSequenceClassification(config),
        args=transformers.TrainingArguments(
            folder, max_steps=8, per_device_train_batch_size=16, logging_steps=2, report_to=[], use_cpu=True
        ),
        train_dataset=examples(),
        data_collator=padded,
        callbacks=[FxHybridCallback(budget="80%", dynamic={"input_ids": {1: LONGEST}, "attention_mask": {1: LONGEST}})],
    )
    trainer.train()
