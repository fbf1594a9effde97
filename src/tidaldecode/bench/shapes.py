"""Shapes of published models, to be filled with random weights; nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidaldecode.errors import TidalError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEY_SPREAD = 2.0
"""Standard deviation of random keys: logits then spread about as far as trained models' do."""

_LLAMA: dict[str, Any] = {"rope_theta": 5e5, "max_position_embeddings": 1 << 20}

# Name: the transformers configuration class, and what it is given.
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": (
        "LlamaConfig",
        {
            **_LLAMA,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        {
            **_LLAMA,
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "llama-3.2-1b": (
        "LlamaConfig",
        {
            **_LLAMA,
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": (
        "Qwen3Config",
        {
            "rope_theta": 1e6,
            "max_position_embeddings": 1 << 20,
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "tiny": (
        "LlamaConfig",
        {
            **_LLAMA,
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
}
SHAPES = tuple(_SHAPES)


def shape_config(name: str) -> PretrainedConfig:
    """The configuration of a named shape. Errors: `TidalError` for another name."""
    import transformers

    if name not in _SHAPES:
        raise TidalError(f"shape: expected one of {', '.join(SHAPES)}, got {name!r}")
    family, settings = _SHAPES[name]
    return getattr(transformers, family)(**settings, eos_token_id=None, bos_token_id=1)
