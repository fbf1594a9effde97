"""Texts of a `DecodeStep` that stands after its prompts: what lossless decoding must equal, or beat."""

from __future__ import annotations

import torch

from tidaldecode.integrations.transformers.decode_step import DecodeStep
from tidaldecode.integrations.transformers.processing import Processing


@torch.inference_mode()
def greedy_text(step: DecodeStep, newest: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` tokens ``[B, count]``, of which ``newest [B, 1]`` are the first."""
    text = torch.empty(len(newest), count, dtype=torch.int64, device=newest.device)
    text[:, :1] = newest
    step.tokens.copy_(newest)
    for index in range(1, count):
        step.run()
        text[:, index] = step.tokens[:, 0]
    return text


@torch.inference_mode()
def sampled_text(
    step: DecodeStep, newest: torch.Tensor, count: int, processing: Processing
) -> torch.Tensor:
    """As `greedy_text`, but drawn from the processed logits, as plain sampling does.

    ``processing`` must do without history.
    """
    text = torch.empty(len(newest), count, dtype=torch.int64, device=newest.device)
    text[:, :1] = newest
    step.tokens.copy_(newest)
    for index in range(1, count):
        scores = processing(step.run().float()[:, None], newest, [])[:, 0]
        step.tokens.copy_(torch.multinomial(scores.softmax(-1), 1))
        text[:, index] = step.tokens[:, 0]
    return text


@torch.inference_mode()
def watched_text(
    step: DecodeStep, first: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`greedy_text`, and how far the two best logits are apart at each token, both ``[B, count]``.

    ``first [B, vocabulary]``: the logits of the first token.
    """
    text, gaps = [first.argmax(-1, keepdim=True)], [_gap(first)]
    step.tokens.copy_(text[0])
    for _ in range(1, count):
        gaps.append(_gap(step.run()))
        text.append(step.tokens.clone())
    return torch.cat(text, dim=1), torch.stack(gaps, dim=1)


def _gap(logits: torch.Tensor) -> torch.Tensor:
    best = logits.float().topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]
