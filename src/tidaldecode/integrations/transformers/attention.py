"""The attention function that transformers calls for every layer of an enabled model.

Registered once under `NAME` in the public registries, beside the mask function of the host, so that
masks are exactly the host's. A decode step (one query per sequence, no autograd) goes to
`decode_attention`; everything else, and layers that are not planned, to the host's own attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tidaldecode.algorithm import DecodeState, LayerPlan, Role, decode_attention
from tidaldecode.config import TidalConfig
from tidaldecode.engine import OnScores
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.step_layers import check_window, step_attention

NAME = "tidal"
HOST = "sdpa"
KEYWORD = "tidal_forward"

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def register() -> None:
    """Make `NAME` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, tidal_attention_forward)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[HOST])


@dataclass
class Forward:
    """What the layers share during one forward pass of the decoder; passed down as a keyword."""

    config: TidalConfig
    plan: LayerPlan
    on_scores: OnScores | None = None
    reached: bool = False
    """Whether any layer's attention came by."""
    fits: bool = False
    """Whether every row fits the budget, which makes the step dense: the host's, bit for bit."""
    state: DecodeState | None = field(default=None)
    dense: bool = False
    """Whether one query is full attention too: the host's, bit for bit."""
    on_device: bool = False
    """Whether `StepLayers` run the layers, and nothing may be asked of the host."""

    def begin(self, key: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Read every row's range off the host's mask, once per forward. ``key [B, Hkv, L, D]``."""
        batch, length = key.shape[0], key.shape[2]
        if mask is None:
            self.fits = length <= self.config.budget
            seq_lens = torch.full((batch,), length, dtype=torch.int32, device=key.device)
            self.state = DecodeState.begin(self.config, self.plan, seq_lens)
            self.state.on_scores = self.on_scores
            return
        starts, seq_lens = _ranges(mask, batch, length)
        self.fits = int((seq_lens - starts).max()) <= self.config.budget
        self.state = DecodeState.begin(self.config, self.plan, seq_lens, starts)
        self.state.on_scores = self.on_scores


def tidal_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Signature and result of a transformers attention function.

    ``query [B, Hq, Q, D]``, ``key, value [B, Hkv, L, D]``; returns ``[B, Q, Hq, D]`` and no weights.

    Errors: `TidalError` for what the kernels do not do, and when the model did not pass our state.
    """
    forward: Forward | None = kwargs.pop(KEYWORD, None)
    if forward is None:
        raise TidalError(
            f"model: expected {type(module).__name__} to pass keyword arguments on to its attention "
            "function, but it drops them (or attn_implementation='tidal' was set by hand: use "
            "tidaldecode.enable(model)); this model cannot be supported"
        )
    forward.reached = True
    layer = cast(int, module.layer_idx)
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise TidalError(
                f"layer {layer}: expected plain softmax attention, got {name} from the "
                "model, which the kernels do not have"
            )
    window = kwargs.get("sliding_window")
    if forward.on_device:
        # The plan is not looked at: one compilation of a model serves every plan.
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if query.shape[2] > 1:
            several = (states.transpose(1, 2) for states in (query, key, value))
            return step_attention(*several, layer, window, scale), None
        newest = (states[:, :, 0] for states in (query, key, value))
        return step_attention(*newest, layer, window, scale)[:, None], None
    role = forward.plan[layer]
    check_window(layer, role, window)
    one = query.shape[2] == 1 and not forward.dense
    decodes = one and not (torch.is_grad_enabled() and query.requires_grad)
    if decodes and role is not Role.HOST and forward.state is None:
        forward.begin(key, attention_mask)
    if not decodes or role is Role.HOST or forward.fits:
        host = cast(AttentionFunction, ALL_ATTENTION_FUNCTIONS[HOST])
        return host(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    assert forward.state is not None
    out = decode_attention(
        query[:, :, 0],
        key,
        value,
        layer,
        forward.plan,
        forward.state,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return out[:, None], None


def _ranges(mask: torch.Tensor, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First valid position and end of every row, ``[B]`` int32, from a mask ``[B or 1, 1, 1, L]``.

    Errors: `TidalError` for a mask that is not boolean or has holes.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[-1] != length:
        raise TidalError(
            f"attention_mask: expected a boolean mask [B, 1, 1, {length}], got "
            f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}; pass a 2-D mask of ones "
            "and zeros"
        )
    valid = mask[:, 0, -1].expand(batch, length)
    counts = valid.sum(-1)
    starts = valid.int().argmax(-1)
    ends = torch.where(counts > 0, length - valid.flip(-1).int().argmax(-1), starts)
    if not torch.equal(counts, ends - starts):
        row = int((counts != ends - starts).nonzero()[0])
        raise TidalError(
            "attention_mask: expected padding at the ends of a row only, found a gap inside row "
            f"{row}; decode such rows separately, or without padding between turns"
        )
    return starts.int(), ends.int()
