"""How the tests generate: fixed lengths, logits kept, and either cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

# Keyword arguments of `generate` for each kind of cache.
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
}
SMALL: dict[str, Any] = {"budget": 8, "sink_tokens": 1, "recent_tokens": 2}


def generate(model: PreTrainedModel, ids: torch.Tensor, tokens: int = 6, **options: Any) -> Any:
    """``model.generate``: greedy unless told otherwise, exactly ``tokens`` new tokens."""
    settings = {
        "do_sample": False,
        "max_new_tokens": tokens,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return model.generate(ids, **{**settings, **options})


def logits_of(output: Any) -> torch.Tensor:
    """Raw logits of every new token, ``[B, T, V]``."""
    return torch.stack(output.logits, dim=1)


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of rows ``[1, L]`` of different lengths, and its attention mask."""
    width = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - row.shape[1] :] = row[0]
        mask[index, width - row.shape[1] :] = 1
    return ids, mask
