"""Which models TidalDecode can run, read off the model itself and not off a list of names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidaldecode.errors import TidalError
from tidaldecode.integrations.shape import ModelShape, read_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    return decoder, read_shape(config, name)
