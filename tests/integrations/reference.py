"""TidalDecode from scratch, with no cache and no kernels: whole sequences under explicit masks.

Every decoded position is a row of one full-sequence forward pass. In a sparse layer such a row sees
only the positions that the same row ranked best in the last select layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from tidaldecode import LayerPlan, Role, TidalConfig

_NAME = "reference"


def chosen_positions(scores: list[float], config: TidalConfig) -> set[int]:
    """Sinks, recents and the newest of ``len(scores)`` positions, filled up with the best."""
    length = len(scores)
    forced = set(range(min(config.sink_tokens, length)))
    forced |= set(range(max(length - 1 - config.recent_tokens, 0), length))
    others = sorted(set(range(length)) - forced, key=lambda position: -scores[position])
    return forced | set(others[: config.budget - len(forced)])


class MaskedAttention:
    """Plain attention over whole sequences ``[1, H, T, D]`` that obeys a plan in decoded rows."""

    def __init__(self, plan: LayerPlan, config: TidalConfig, decoded: Iterable[int]) -> None:
        self.plan, self.config, self.decoded = plan, config, sorted(decoded)
        self.selected: torch.Tensor | None = None

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """``visible [T, T]``: what each row may see without a budget. Returns ``[1, H, T, D]``."""
        heads, length = query.shape[1], query.shape[2]
        group = heads // key.shape[1]
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        role = self.plan[layer]
        visible = visible.expand(1, heads, length, length).clone()
        if role is Role.SPARSE:
            if self.selected is None:  # no layer selects: sinks and recents alone
                self._select(torch.zeros(1, heads, length, length), group)
            for row in self.decoded:
                visible[:, :, row] &= self.selected[:, row]
        logits = (query @ key.transpose(2, 3)) * scale
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        if role is Role.SELECT:
            self._select(logits if self.config.score == "logits" else weights, group)
        return weights @ value

    def _select(self, scores: torch.Tensor, group: int) -> None:
        heads, length = scores.shape[1:3]
        shares = {"shared": heads, "kv_head": group, "query_head": 1}[self.config.granularity]
        self.selected = torch.zeros(heads, length, length, dtype=torch.bool)
        for row in self.decoded:
            for first in range(0, heads, shares):
                sums = scores[0, first : first + shares, row, : row + 1].sum(0)
                for position in chosen_positions(sums.tolist(), self.config):
                    self.selected[first : first + shares, row, position] = True


@torch.no_grad()
def masked_logits(
    model: PreTrainedModel,
    ids: torch.Tensor,
    plan: LayerPlan,
    config: TidalConfig,
    decoded: Iterable[int],
) -> torch.Tensor:
    """Logits ``[T, V]`` of any model for one whole sequence ``ids [1, T]``."""
    attention = MaskedAttention(plan, config, decoded)
    with _registered(attention, model):
        return model(ids, use_cache=False).logits[0]


@contextlib.contextmanager
def _registered(attention: MaskedAttention, model: PreTrainedModel) -> Iterator[None]:
    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        length = query.shape[2]
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        if attention_mask is not None:
            visible = attention_mask[0, 0]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = attention(module.layer_idx, query, key, value, visible, scale)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, forward)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    previous = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


@torch.no_grad()
def llama_logits(
    model: PreTrainedModel,
    ids: torch.Tensor,
    plan: LayerPlan,
    config: TidalConfig,
    decoded: Iterable[int],
) -> torch.Tensor:
    """As `masked_logits`, for Llama, written out by hand from the weights alone."""
    weights, shape = model.state_dict(), model.config
    length = ids.shape[1]
    head_dim = shape.hidden_size // shape.num_attention_heads
    attention = MaskedAttention(plan, config, decoded)

    def norm(hidden: torch.Tensor, name: str) -> torch.Tensor:
        mean_square = hidden.square().mean(-1, keepdim=True)
        return hidden / (mean_square + shape.rms_norm_eps).sqrt() * weights[f"model.{name}.weight"]

    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(length)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(heads: torch.Tensor) -> torch.Tensor:
        real, imaginary = heads.chunk(2, dim=-1)
        turned = torch.complex(real, imaginary) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    hidden = weights["model.embed_tokens.weight"][ids]
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    for layer in range(shape.num_hidden_layers):
        name = f"layers.{layer}"

        def linear(inputs: torch.Tensor, part: str, prefix: str = f"model.{name}") -> torch.Tensor:
            return inputs @ weights[f"{prefix}.{part}.weight"].T

        inputs = norm(hidden, f"{name}.input_layernorm")
        query, key, value = (
            linear(inputs, f"self_attn.{part}_proj").unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for part in "qkv"
        )
        out = attention(layer, rotate(query), rotate(key), value, visible, head_dim**-0.5)
        hidden = hidden + linear(out.transpose(1, 2).flatten(2), "self_attn.o_proj")
        inputs = norm(hidden, f"{name}.post_attention_layernorm")
        gate = torch.nn.functional.silu(linear(inputs, "mlp.gate_proj"))
        hidden = hidden + linear(gate * linear(inputs, "mlp.up_proj"), "mlp.down_proj")
    return (norm(hidden, "norm") @ weights["lm_head.weight"].T)[0]
