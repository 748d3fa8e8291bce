"""Batches of the zoo: random arguments of a training step by the kind of its task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lib.zoo_list import Architecture

BATCH, LENGTH, SIDE, CLASSES, VOCABULARY = 8, 16, 32, 4, 120


@dataclass(frozen=True)
class Batch:
    """Holds the arguments of one training step.

    Attributes:
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        loss_fn: makes a loss of output and ``loss_args``; None where the model returns its own as ``loss``.
        loss_args: further arguments of ``loss_fn``.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    loss_fn: Callable[..., Tensor] | None = None
    loss_args: tuple[Any, ...] = ()


def _tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length))


def classes(*shape: int) -> Tensor:
    """Draws a class for each image, or for each place of a shape."""
    return torch.randint(0, CLASSES, shape or (BATCH,))


def _text(_: Any, length: int = LENGTH) -> Batch:
    tokens = _tokens(length)
    return Batch(kwargs={"input_ids": tokens, "labels": tokens.clone()})


def _seq2seq(_: Any, target_length: int = 8) -> Batch:
    return Batch(kwargs={"input_ids": _tokens(), "labels": _tokens(target_length)})


def _sequence_classes(_: Any) -> Batch:
    return Batch(kwargs={"input_ids": _tokens(), "labels": classes()})


def _answers(_: Any) -> Batch:
    starts = torch.randint(0, LENGTH, (2, BATCH))
    return Batch(kwargs={"input_ids": _tokens(), "start_positions": starts[0], "end_positions": starts[1]})


def _pixels(side: int = SIDE) -> Tensor:
    return torch.randn(BATCH, 3, side, side)


def _image(model: nn.Module, side: int = SIDE) -> Batch:
    if hasattr(model, "config"):
        return Batch(kwargs={"pixel_values": _pixels(side), "labels": classes()})
    return Batch((_pixels(side),), loss_fn=F.cross_entropy, loss_args=(classes(),))


def _image_alone(_: Any, side: int = SIDE) -> Batch:
    return Batch(kwargs={"pixel_values": _pixels(side)})


def _masked_image(model: Any, side: int = SIDE) -> Batch:
    n_patches = (side // model.config.patch_size) ** 2
    return Batch(kwargs={"pixel_values": _pixels(side), "bool_masked_pos": torch.rand(BATCH, n_patches) < 0.5})


def _segmentation(_: Any, side: int = SIDE) -> Batch:
    return Batch(kwargs={"pixel_values": _pixels(side), "labels": classes(BATCH, side, side)})


def _dense_loss(outputs: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(outputs["out"], target)


def _dense(_: Any, side: int = SIDE) -> Batch:
    return Batch((_pixels(side),), loss_fn=_dense_loss, loss_args=(classes(BATCH, side, side),))


def _depth_loss(output: Any, target: Tensor) -> Tensor:
    return F.mse_loss(output.predicted_depth, target)


def _depth(_: Any, side: int = SIDE) -> Batch:
    return Batch(
        kwargs={"pixel_values": _pixels(side)}, loss_fn=_depth_loss, loss_args=(torch.rand(BATCH, side, side),)
    )


def _larger_loss(output: Any, target: Tensor) -> Tensor:
    return F.l1_loss(output.reconstruction, target)


def _larger(_: Any, side: int = SIDE) -> Batch:
    return Batch(kwargs={"pixel_values": _pixels(side)}, loss_fn=_larger_loss, loss_args=(_pixels(2 * side),))


def _boxes_of_images(class_key: str, box_scale: float) -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[0.3, 0.3, 0.5, 0.5], [0.6, 0.6, 0.8, 0.8]]) * box_scale
    return [{class_key: classes(2), "boxes": boxes.clone()} for _ in range(BATCH)]


def _detection(_: Any, side: int = SIDE) -> Batch:
    return Batch(kwargs={"pixel_values": _pixels(side), "labels": _boxes_of_images("class_labels", 1.0)})


def _sum_of_losses(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def _detection_by_list(_: Any, side: int = 64) -> Batch:
    return Batch((list(_pixels(side)), _boxes_of_images("labels", side)), loss_fn=_sum_of_losses)


def _masks(_: Any, side: int = SIDE) -> Batch:
    masks = [(torch.rand(2, side, side) < 0.5).float() for _ in range(BATCH)]
    return Batch(kwargs={"pixel_values": _pixels(side), "mask_labels": masks, "class_labels": [classes(2)] * BATCH})


def _video(model: Any, side: int = SIDE) -> Batch:
    frames = torch.randn(BATCH, model.config.num_frames, 3, side, side)
    return Batch(kwargs={"pixel_values": frames, "labels": classes()})


def _volume(_: Any, side: int = SIDE) -> Batch:
    return Batch((torch.randn(BATCH, 3, 4, side, side),), loss_fn=F.cross_entropy, loss_args=(classes(),))


def _sound(_: Any) -> Batch:
    return Batch(kwargs={"input_values": torch.randn(BATCH, 1000), "labels": classes()})


def _spectrogram(model: Any) -> Batch:
    shape = (BATCH, model.config.max_length, model.config.num_mel_bins)
    return Batch(kwargs={"input_values": torch.randn(shape), "labels": classes()})


def _ctc(_: Any) -> Batch:
    return Batch(kwargs={"input_values": torch.randn(BATCH, 1000), "labels": _tokens(4)})


def _speech(model: Any, time_first: bool = False) -> Batch:
    if time_first:
        features = torch.randn(BATCH, 32, model.config.input_feat_per_channel)
    else:
        features = torch.randn(BATCH, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    return Batch(kwargs={"input_features": features, "labels": _tokens(8)})


def _raw_speech(_: Any) -> Batch:
    return Batch(kwargs={"input_values": torch.randn(BATCH, 4000), "labels": _tokens(8)})


def _forecast(model: Any) -> Batch:
    config = model.config
    past = config.context_length + max(config.lags_sequence)

    def features(length: int) -> Tensor:
        return torch.randn(BATCH, length, config.num_time_features)

    return Batch(
        kwargs={
            "past_values": torch.rand(BATCH, past),
            "past_time_features": features(past),
            "past_observed_mask": torch.ones(BATCH, past),
            "future_values": torch.rand(BATCH, config.prediction_length),
            "future_time_features": features(config.prediction_length),
        }
    )


def _patched_forecast(model: Any) -> Batch:
    config = model.config
    shapes = {"past_values": config.context_length, "future_values": config.prediction_length}
    return Batch(kwargs={name: torch.randn(BATCH, n, config.num_input_channels) for name, n in shapes.items()})


def _contrastive(_: Any, side: int = SIDE) -> Batch:
    return Batch(kwargs={"input_ids": _tokens(), "pixel_values": _pixels(side), "return_loss": True})


def _captions(_: Any, side: int = SIDE) -> Batch:
    tokens = _tokens()
    return Batch(kwargs={"input_ids": tokens, "pixel_values": _pixels(side), "labels": tokens.clone()})


def _answered_image(model: Any, side: int = SIDE) -> Batch:
    return Batch(
        kwargs={
            "input_ids": _tokens(),
            "pixel_values": _pixels(side),
            "labels": torch.rand(BATCH, model.config.num_labels),
        }
    )


def _image_and_text(model: Any, image_tokens: int, side: int = SIDE) -> Batch:
    images = torch.full((BATCH, image_tokens), model.config.image_token_id)
    tokens = torch.cat((images, _tokens()), 1)
    return Batch(kwargs={"input_ids": tokens, "pixel_values": _pixels(side), "labels": tokens.clone()})


def _prompt_and_answer(model: Any, image_tokens: int, side: int = SIDE) -> Batch:
    """As processors make it of an image, a prompt and an answer: only the answer is learnt, and attends causally."""
    batch = _image_and_text(model, image_tokens, side)
    tokens = batch.kwargs["input_ids"]
    is_answer = (torch.arange(tokens.shape[1]) >= image_tokens + LENGTH // 2).expand_as(tokens)
    given = {"token_type_ids": is_answer.long(), "labels": tokens.where(is_answer, -100)}
    return Batch(kwargs=batch.kwargs | given)


MAKERS: dict[str, Callable[..., Batch]] = {
    "causal LM": _text,
    "masked LM": _text,
    "seq2seq": _seq2seq,
    "sequence classification": _sequence_classes,
    "question answering": _answers,
    "image classification": _image,
    "image": _image_alone,
    "masked image": _masked_image,
    "segmentation": _segmentation,
    "dense classes": _dense,
    "depth": _depth,
    "super-resolution": _larger,
    "detection": _detection,
    "boxes": _detection_by_list,
    "masks": _masks,
    "video classification": _video,
    "video volume": _volume,
    "audio classification": _sound,
    "spectrogram classification": _spectrogram,
    "CTC": _ctc,
    "speech to text": _speech,
    "raw speech to text": _raw_speech,
    "forecast": _forecast,
    "patched forecast": _patched_forecast,
    "contrastive": _contrastive,
    "captions": _captions,
    "captions classes": _answered_image,
    "image and text": _image_and_text,
    "image, prompt and answer": _prompt_and_answer,
}


def make_batch(architecture: Architecture, model: nn.Module) -> Batch:
    """Makes the arguments of an architecture's training step, the same in every process."""
    torch.manual_seed(1)
    return MAKERS[architecture.kind](model, **architecture.batch)
