"""What planning needs to know of a decoder, read off its transformers configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tidaldecode.errors import TidalError


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a model's decoder."""

    num_layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    full_attention: tuple[bool, ...]
    """For every layer, whether it has full attention."""


def read_shape(config: Any, name: str) -> ModelShape:
    """The shape of the decoder with this transformers configuration; ``name`` is for messages.

    Errors: `TidalError` for a configuration whose layers do not have one kind of heads.
    """
    num_layers = getattr(config, "num_hidden_layers", None)
    query_heads = getattr(config, "num_attention_heads", None)
    if not isinstance(num_layers, int) or not isinstance(query_heads, int):
        raise TidalError(
            f"model: expected a decoder with num_hidden_layers and num_attention_heads, got {name}"
        )
    if shared := getattr(config, "num_kv_shared_layers", None):
        raise TidalError(
            f"model: expected every layer to have keys and values of its own, got {name} with "
            f"{shared} layers that share them"
        )
    try:
        kv_heads = getattr(config, "num_key_value_heads", None)
        head_dim = getattr(config, "head_dim", None)
    except RuntimeError as error:
        # transformers raises where the value differs from layer to layer.
        raise TidalError(
            f"model: expected heads of one size and number in all layers, got {name}: {error}"
        ) from error
    return ModelShape(
        num_layers=num_layers,
        query_heads=query_heads,
        kv_heads=kv_heads or query_heads,
        head_dim=head_dim or config.hidden_size // query_heads,
        full_attention=_full_attention(config, num_layers),
    )


def _full_attention(config: Any, num_layers: int) -> tuple[bool, ...]:
    """For every layer, whether it attends to the whole context."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return tuple(kind == "full_attention" for kind in layer_types[:num_layers])
    windowed = getattr(config, "sliding_window", None) is not None
    # In transformers 5.4 hybrids have another name for it, and no windowed kind.
    block_types = getattr(config, "layers_block_type", None) or ["attention"] * num_layers
    return tuple(kind == "attention" and not windowed for kind in block_types[:num_layers])
