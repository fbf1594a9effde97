"""Greedy lossless decoding against greedy full attention, token for token.

Every prompt is prefilled once; full attention and every draft decode from copies of its cache.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from tidaldecode.algorithm.parting import differences
from tidaldecode.algorithm.tally import Tally
from tidaldecode.config import TidalConfig
from tidaldecode.integrations.transformers import enable
from tidaldecode.integrations.transformers.speculative_steps import SpeculativeSteps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Draft:
    """One way to draft."""

    draft_tokens: int | str
    budget: int
    random: bool = False
    """Whether random tokens take the place of the draft step's."""
    selection: str = "round"
    """`TidalConfig.draft_selection`."""

    @property
    def name(self) -> str:
        """``k=4 N=64``, as results name it."""
        kind = " token" if self.selection == "token" else ""
        return f"k={self.draft_tokens} N={self.budget}{kind}" + (" random" if self.random else "")

    def settings(self, config: TidalConfig) -> TidalConfig:
        """``config`` with this draft."""
        return config.replace(
            mode="lossless",
            budget=self.budget,
            draft_tokens=self.draft_tokens,
            draft_selection=self.selection,
        )


class RandomSteps(SpeculativeSteps):
    """Drafts that have nothing to do with the model: the worst a draft step can do."""

    def draft(self, tokens: torch.Tensor, begins: torch.Tensor, longest: int) -> torch.Tensor:
        """Random logits ``[B, V]``; the cache is written as by a real draft step."""
        return torch.randn_like(super().draft(tokens, begins, longest))


@torch.inference_mode()
def compare_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    drafts: Sequence[Draft],
    config: TidalConfig,
    *,
    new_tokens: int,
) -> Iterator[dict[str, Any]]:
    """Decode a left-padded batch by full attention and by every draft; a row for each of these.

    A row has ``draft, equal`` (prompts), ``differences`` (first place and logit gap of each prompt
    that differs), the fields of a `Tally`, ``seconds`` and ``dense_seconds`` (decoding alone).
    """
    ids, mask = left_padded(prompts, model.device)
    cache = DynamicCache()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(
        ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        past_key_values=cache,
        logits_to_keep=1,
    )

    def decode() -> tuple[Any, float]:
        own = copy.deepcopy(cache)
        begin = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=own,
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return output, time.perf_counter() - begin

    dense, dense_seconds = decode()
    best = torch.stack(dense.logits, dim=1).topk(2, dim=-1).values
    gaps = best[..., 0] - best[..., 1]
    wanted = dense.sequences[:, ids.shape[1] :]
    for draft in drafts:
        with enable(model, draft.settings(config)) as handle:
            if draft.random:
                handle.speculative_steps = RandomSteps
            found, seconds = decode()
            tally = handle.stats()
        parted = differences(wanted, found.sequences[:, ids.shape[1] :], gaps)
        yield {
            "draft": draft.name,
            "prompts": len(prompts),
            "equal": len(prompts) - len(parted),
            "differences": parted,
            **vars(tally),
            "seconds": seconds,
            "dense_seconds": dense_seconds,
        }


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each draft: prompts that are equal, acceptance, tokens per verification."""
    lines = []
    for name in dict.fromkeys(row["draft"] for row in rows):
        mine = [row for row in rows if row["draft"] == name]
        tally = Tally()
        for row in mine:
            tally.add(Tally(**{field: row[field] for field in vars(tally)}))
        parted = [one for row in mine for one in row["differences"]]
        found = [one["gap"] for one in parted if one["gap"] is not None]
        lines.append(
            {
                "draft": name,
                "prompts": sum(row["prompts"] for row in mine),
                "equal": sum(row["equal"] for row in mine),
                "differences": parted,
                "gaps": [median(found), max(found)] if found else None,
                "acceptance": tally.acceptance,
                "tokens_per_verify": tally.tokens_per_verify,
                "kv_share": tally.kv_share,
                "seconds": sum(row["seconds"] for row in mine),
                "dense_seconds": sum(row["dense_seconds"] for row in mine),
            }
        )
    return lines


def left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``[B, longest]`` of prompts of different lengths."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
