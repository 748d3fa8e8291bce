"""The architectures of the zoo, read from ``zoo_architectures.jsonl``: one line each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("zoo_architectures.jsonl")
HEADS = {  # what a kind of batch trains, unless an architecture names a class of its own
    "causal LM": "AutoModelForCausalLM",
    "masked LM": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence classification": "AutoModelForSequenceClassification",
    "question answering": "AutoModelForQuestionAnswering",
    "image classification": "AutoModelForImageClassification",
    "masked image": "AutoModelForMaskedImageModeling",
    "segmentation": "AutoModelForSemanticSegmentation",
    "detection": "AutoModelForObjectDetection",
    "masks": "AutoModelForUniversalSegmentation",
    "depth": "AutoModelForDepthEstimation",
    "super-resolution": "AutoModelForImageToImage",
    "video classification": "AutoModelForVideoClassification",
    "audio classification": "AutoModelForAudioClassification",
    "spectrogram classification": "AutoModelForAudioClassification",
    "CTC": "AutoModelForCTC",
    "speech to text": "AutoModelForSpeechSeq2Seq",
    "image and text": "AutoModelForImageTextToText",
    "image, prompt and answer": "AutoModelForImageTextToText",
    "contrastive": "AutoModel",
}


@dataclass(frozen=True)
class Architecture:
    """Describes one architecture of the zoo.

    Attributes:
        name: for transformers the type of the model, and a second word where a type has two heads; for timm and
            torchvision the library, then a registered name, or a module and a class with a dot between them.
        family: what it is listed under.
        kind: kind of batch, which decides the head and its loss.
        head: class of transformers that is trained; the kind's if empty.
        sizes: of the configuration, where they differ from the usual small ones.
        batch: of the batch, where they differ from the usual small ones.
    """

    name: str
    family: str
    kind: str
    head: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=dict)

    @property
    def library(self) -> str:
        """The package that holds the model."""
        first = self.name.partition(" ")[0]
        return first if first in ("timm", "torchvision") else "transformers"

    @property
    def model_type(self) -> str:
        """What transformers calls the configuration."""
        return self.name.partition(" ")[0]

    @property
    def in_library(self) -> str:
        """What timm or torchvision calls the model."""
        return self.name.partition(" ")[2]

    @property
    def head_class(self) -> str:
        """The class of transformers that is trained."""
        return self.head or HEADS[self.kind]


def _read() -> Iterator[Architecture]:
    for line in LIST.read_text(encoding="utf-8").splitlines():
        yield Architecture(**json.loads(line))


ARCHITECTURES = {architecture.name: architecture for architecture in _read()}


def installed() -> list[str]:
    """Returns the names of the architectures whose libraries are there."""
    missing = {name for name in ("transformers", "timm", "torchvision") if find_spec(name) is None}
    if "torchvision" in missing:
        missing.add("timm")  # which imports it
    return [name for name, architecture in ARCHITECTURES.items() if architecture.library not in missing]
