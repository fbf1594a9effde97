"""Tiny random models and prompts: fp32, evaluation mode, seeded, and no end-of-sequence token."""

from __future__ import annotations

from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedModel

VOCABULARY = 96

# Weights this large make attention peaked, so that a wrong token set shows in the logits.
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "tie_word_embeddings": False,
    "eos_token_id": None,
}
WINDOW = 8
_HYBRID: dict[str, Any] = {
    "head_dim": 16,
    "num_hidden_layers": 12,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 6,
}

# Name of the family: what its configuration needs beside the base.
SUPPORTED: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma3": _HYBRID,
    "Phi3": {},
    "GPTNeoX": {},
    "Olmo2": {},
    "Granite": {"attention_multiplier": 0.1},
    "Cohere2": {**_HYBRID, "logit_scale": 1.0},
    "Glm4": {"head_dim": 16},
    "SmolLM3": {},
    "Mixtral": {"num_local_experts": 4, "sliding_window": None},
}
REFUSED: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": 16},
    "GptOss": {"head_dim": 16, "num_local_experts": 4},
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 8,
    },
    "StableLm": {},
    "Nemotron": {},
    "Falcon": {"alibi": False},
    "Qwen3Next": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 4},
    "Jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
}
_CONFIG_CLASSES = {"Gemma3": "Gemma3TextConfig"}


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model; ``changes`` go to its configuration."""
    extra = {**SUPPORTED, **REFUSED}[family]
    config_class = getattr(transformers, _CONFIG_CLASSES.get(family, f"{family}Config"))
    _skip_if_broken(config_class)
    config = config_class(**{**_BASE, **extra, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero otherwise, which would test nothing
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _skip_if_broken(config_class: type) -> None:
    """Skip where a class cannot hold its own defaults, which `generate` needs.

    transformers 5.4 declares Cohere2's ``use_cache`` and OLMo2's ``tie_word_embeddings`` as int, and
    newer versions of huggingface_hub take no bool for an int. Without TidalDecode it fails the same.
    """
    if not transformers.__version__.startswith("5.4."):
        return
    try:
        config_class()
    except StrictDataclassFieldValidationError as error:
        pytest.skip(
            f"transformers {transformers.__version__} with huggingface_hub "
            f"{huggingface_hub.__version__}: {config_class.__name__}() fails: {error}"
        )


def prompt(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]`` without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)
