"""Transformers from Hugging Face configurations, with random weights."""

from __future__ import annotations

import torch
from torch import Generator

from fxhybrid.optional_imports import require
from fxhybrid.suite.case import Size, SuiteCase, logits_loss, next_token_loss, token_loss
from fxhybrid.suite.sample_data import labels, smooth_images, word_ids


def bert(size: Size, data: Generator) -> SuiteCase:
    transformers = require("transformers", "suite model 'bert'")
    batch, length, layers, width, vocabulary = (16, 128, 4, 256, 8000) if size == "full" else (8, 48, 2, 64, 500)
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        use_cache=False,
    )
    model = transformers.BertForSequenceClassification(config)
    ids = word_ids(batch, length, vocabulary, data)
    return SuiteCase("bert", model, (ids,), logits_loss, (labels(batch, 2, data),))


def gpt2(size: Size, data: Generator) -> SuiteCase:
    transformers = require("transformers", "suite model 'gpt2'")
    batch, length, layers, width, vocabulary = (8, 256, 6, 384, 8000) if size == "full" else (4, 48, 2, 64, 500)
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64 if size == "full" else 4,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    ids = word_ids(batch, length, vocabulary, data)
    return SuiteCase("gpt2", transformers.GPT2LMHeadModel(config), (ids,), next_token_loss, (ids.clone(),))


def vit(size: Size, data: Generator) -> SuiteCase:
    transformers = require("transformers", "suite model 'vit'")
    batch, pixels, layers, width = (16, 224, 12, 192) if size == "full" else (8, 96, 3, 48)
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=4 * width,
        image_size=pixels,
        patch_size=16,
        num_labels=100,
    )
    model = transformers.ViTForImageClassification(config)
    images = smooth_images(batch, pixels, data)
    return SuiteCase("vit", model, (images,), logits_loss, (labels(batch, 100, data),))


def t5(size: Size, data: Generator) -> SuiteCase:
    transformers = require("transformers", "suite model 't5'")
    batch, length, layers, width, vocabulary = (8, 128, 6, 256, 8000) if size == "full" else (4, 32, 2, 64, 500)
    config = transformers.T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // 8,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=8,
        decoder_start_token_id=0,
        use_cache=False,
    )
    source = word_ids(batch, length, vocabulary, data)
    target = word_ids(batch, length // 2, vocabulary, data)
    start = torch.full((batch, 1), config.decoder_start_token_id)
    decoder_ids = torch.cat([start, target[:, :-1]], dim=1)
    model = transformers.T5ForConditionalGeneration(config)
    return SuiteCase("t5", model, (source,), token_loss, (target,), {"decoder_input_ids": decoder_ids})
