"""Which models TidalDecode can run, read off the model itself and not off a list of names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidaldecode.errors import TidalError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a model's decoder."""

    num_layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    full_attention: tuple[bool, ...]
    """For every layer, whether it has full attention."""


def inspect_model(model: PreTrainedModel) -> tuple[PreTrainedModel, ModelShape]:
    """The decoder of ``model`` and its shape.

    Errors: `TidalError` for everything whose attention we would get wrong.
    """
    if not hasattr(model, "get_decoder") or not hasattr(model, "set_attn_implementation"):
        raise TidalError(
            f"model: expected a transformers model with a decoder, got {type(model).__name__}"
        )
    decoder = model.get_decoder()
    config = getattr(decoder, "config", None)
    name = type(model).__name__
    if config is None:
        raise TidalError(f"model: expected a model whose decoder has a configuration, got {name}")
    if model.config.is_encoder_decoder:
        raise TidalError(f"model: expected a decoder-only model, got {name} with an encoder")
    if any(getattr(module, "is_causal", True) is False for module in decoder.modules()):
        raise TidalError(f"model: expected a decoder, got {name} with bidirectional attention")
    if (softcap := getattr(config, "attn_logit_softcapping", None)) is not None:
        raise TidalError(
            f"model: expected plain softmax attention, got {name} with attention soft-capping "
            f"(attn_logit_softcapping={softcap}), which the kernels do not have"
        )
    if any(hasattr(module, "sinks") for module in decoder.modules()):
        raise TidalError(
            f"model: expected plain softmax attention, got {name} with learned attention sinks, "
            "which the kernels do not have"
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise TidalError(
            f"model: expected keys and values of one head size, got {name} with multi-head latent "
            "attention, which the kernels do not have"
        )
    return decoder, _shape(config, name)


def _shape(config: Any, name: str) -> ModelShape:
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
