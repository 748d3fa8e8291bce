"""Small, untrained models of the architectures of the zoo, made from their configurations."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks.lib.zoo_list import Architecture

# Sizes by the names that the configurations of transformers use for them; an architecture's own come last.
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "projection_dim"), 32),
    **dict.fromkeys(("encoder_hidden_size", "decoder_hidden_size", "emb_dim", "hidden_dim", "d_embed"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner"), 64),
    **dict.fromkeys(("n_inner", "ffn_hidden_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "d_head"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "rotary_dim", "dt_rank"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "n_group", "topk_group"), 2),
    **dict.fromkeys(("moe_intermediate_size", "state_size", "moe_expert_ffn_hidden_size"), 16),
    "vocab_size": 128,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "use_cache": False,
}


def build_model(architecture: Architecture) -> nn.Module:
    """Builds an architecture in training mode, with random weights that are the same in every process."""
    torch.manual_seed(0)
    if architecture.library == "transformers":
        model = _transformers_model(architecture)
    elif architecture.library == "timm":
        models = importlib.import_module("timm.models")
        model = _named_model(models, architecture, "create_model", {"num_classes": 4})
    else:
        models = importlib.import_module("torchvision.models")
        model = _named_model(models, architecture, "get_model", {"weights": None})
    return model.train()


def _transformers_model(architecture: Architecture) -> nn.Module:
    import transformers

    config = _small_config(transformers.CONFIG_MAPPING[architecture.model_type], architecture.sizes)
    head: Any = getattr(transformers, architecture.head_class)
    model: nn.Module = (head.from_config if architecture.head_class.startswith("AutoModel") else head)(config)
    return model


def _small_config(kind: type[Any], sizes: dict[str, Any]) -> Any:
    """Makes a configuration with small sizes; those nested in it too."""
    known = {*inspect.signature(kind).parameters, "num_labels"}
    values: dict[str, Any] = {name: value for name, value in SMALL.items() if name in known} | sizes
    for name, part in (kind.sub_configs or {}).items():
        own: dict[str, Any] = dict(values.get(name) or {})
        if found := _nested_kind(kind, name, part, own.pop("model_type", None)):
            values[name] = _small_config(found, own)
    return kind(**values)


def _nested_kind(kind: type[Any], name: str, part: Any, model_type: str | None) -> type[Any] | None:
    """The class of a nested configuration: the one asked for, else the usual one; None where there is none."""
    import transformers

    if model_type:
        found: type[Any] = transformers.CONFIG_MAPPING[model_type]
        return found
    if part is not transformers.AutoConfig:
        return part
    usual = getattr(kind(), name)
    return None if usual is None else type(usual)


def _named_model(models: ModuleType, architecture: Architecture, maker: str, options: dict[str, Any]) -> nn.Module:
    """Makes a registered model, or one of a class whose sizes can all be chosen."""
    module, _, name = architecture.in_library.rpartition(".")
    if module:
        kind = getattr(getattr(models, module), name)
        return kind(num_classes=4, **architecture.sizes)
    return getattr(importlib.import_module(models.__name__), maker)(name, **options, **architecture.sizes)
