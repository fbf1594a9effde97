"""What calibration measures: KL of the logits to full attention, on prompts that are prefilled once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tidaldecode.config import TidalConfig
from tidaldecode.engine import Engine
from tidaldecode.eval.agreement import kl_nats
from tidaldecode.eval.needle import Encode, Haystack, make_sample


@dataclass(frozen=True)
class Prompt:
    """A context, what is fed after it, and the steps whose logits count."""

    context_ids: list[int]
    forced_ids: list[int]
    counted_from: int
    """First step that counts: the first digit of an answer, or 0 for plain text."""


def make_prompts(
    text: Haystack, encode: Encode, *, context: int, needles: int, passages: int, seed: int
) -> list[Prompt]:
    """Retrieval questions with their right answers, and plain text, all of ``context`` tokens.

    Errors: `TidalError` when ``text`` is too short.
    """
    prompts = []
    for index in range(needles):
        sample = make_sample(
            text,
            encode,
            context_tokens=context,
            depth=(index + 0.5) / needles,
            rng=random.Random(f"{seed}/needle/{index}"),
        )
        # The last digit is a target only: what follows an answer is anybody's guess.
        forced = sample.solved[:-1]
        prompts.append(Prompt(sample.context_ids, forced, sample.answers[0].first_step))
    steps = max((len(prompt.forced_ids) for prompt in prompts), default=24)
    for index in range(passages):
        ids, _ = text.window(context, random.Random(f"{seed}/passage/{index}"))
        prompts.append(Prompt(ids[:-steps], ids[-steps:], 0))
    return prompts


class Divergence:
    """Mean KL to full attention, each prompt counting the same; prompts are prefilled once."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt]) -> None:
        self.engine, self.prompts = engine, prompts
        self._scripts = [prompt.forced_ids for prompt in prompts]
        engine.prefill([prompt.context_ids for prompt in prompts])
        self._full = [step.logits for step in engine.steps(self._scripts, None)]

    def measure(self, config: TidalConfig) -> float:
        """KL(full || config) in nats a token: one decode pass over all prompts."""
        steps = self.engine.steps(self._scripts, config)
        kl = [kl_nats(full, step.logits) for full, step in zip(self._full, steps, strict=True)]
        means = []
        for row, prompt in enumerate(self.prompts):
            counted = [kl[step][row] for step in range(prompt.counted_from, len(prompt.forced_ids))]
            means.append(sum(counted) / len(counted))
        return sum(means) / len(means)

    def shared_mass(self, config: TidalConfig, num_layers: int) -> list[list[float]]:
        """``[i][j]``: softmax mass that layer j finds in layer i's best tokens, over that in its own.

        One decode pass in which every layer of ``config.select_layers`` selects, averaged over the
        counted steps; 0 where either layer does not. Source: Kascade, arXiv 2512.16391.
        """
        total = torch.zeros(num_layers, num_layers)
        counted = 0
        scores: dict[int, torch.Tensor] = {}
        steps = self.engine.steps(self._scripts, config, on_scores=scores.__setitem__)
        for index, _ in enumerate(steps):
            rows = [
                row
                for row, prompt in enumerate(self.prompts)
                if prompt.counted_from <= index < len(prompt.forced_ids)
            ]
            layers = sorted(scores)
            found = torch.stack([scores[layer][rows, 0].clamp(min=0) for layer in layers], dim=1)
            best = found.topk(min(config.budget, found.shape[-1]), dim=-1)
            own = best.values.sum(-1)
            for place, layer in enumerate(layers):
                picked = best.indices[:, place, None].expand(-1, len(layers), -1)
                share = found.gather(-1, picked).sum(-1) / own
                total[layer, layers] += share.sum(0).cpu()
            counted += len(rows)
            scores.clear()
        result: list[list[float]] = (total / counted).tolist()
        return result
