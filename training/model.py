"""The models that are trained here: small Llamas, in two sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096


@dataclass(frozen=True)
class Size:
    """Shape of a model; every size has 12 layers, 8 query heads and 2 KV heads."""

    hidden: int
    feed_forward: int
    head_dim: int


SIZES = {
    "8M": Size(hidden=256, feed_forward=512, head_dim=32),
    "29M": Size(hidden=512, feed_forward=1024, head_dim=64),
}
"""By parameters; the embedded model is the first."""


def build_model(
    size: Size, tokenizer: PreTrainedTokenizerFast, longest: int, device: str
) -> LlamaForCausalLM:
    """A fresh model with bf16 parameters on ``device``; contexts up to ``longest`` tokens."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=size.head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=max(16_384, longest),
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(device)
    for parameter in model.parameters():
        # Not model.bfloat16(): that would round the rotary frequencies too.
        parameter.data = parameter.data.bfloat16()
    return model


def hidden_states(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Final hidden states ``[B, T, hidden]`` of whole sequences, without cache or mask tensors."""
    decoder = model.model
    states = decoder.embed_tokens(ids)
    rope = decoder.rotary_emb(states, torch.arange(ids.shape[1], device=ids.device)[None])
    for layer in decoder.layers:
        states = layer(states, position_embeddings=rope)
    return decoder.norm(states)
