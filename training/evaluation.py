"""Held-out numbers of a trained model on the standard library: needle retrieval and loss."""

from __future__ import annotations

import random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tidaldecode.eval.haystack import standard_library_text
from tidaldecode.eval.needle import Haystack, NeedleSample, NeedleShape, make_sample

_HAYSTACK_CHARACTERS = 2_000_000


def held_out_haystack(tokenizer: PreTrainedTokenizerFast, seed: int) -> Haystack:
    """About two million characters of the standard library, tokenised."""
    text = standard_library_text(_HAYSTACK_CHARACTERS, seed)
    return Haystack.from_text(text, tokenizer.encode, tokenizer.decode)


def needle_samples(
    haystack: Haystack,
    tokenizer: PreTrainedTokenizerFast,
    *,
    context: int,
    samples: int,
    distractors: int,
    seed: int,
) -> list[NeedleSample]:
    """``samples`` questions of ``context`` tokens in all, their needles' depths spread evenly."""
    rng = random.Random(seed)
    return [
        make_sample(
            haystack,
            tokenizer.encode,
            context_tokens=context,
            depth=(index + 0.5) / samples,
            shape=NeedleShape(distractors=distractors),
            rng=rng,
        )
        for index in range(samples)
    ]


@torch.inference_mode()
def needle_accuracy(
    model: PreTrainedModel, samples: list[NeedleSample], tokens_per_call: int = 65_536
) -> float:
    """Share of samples whose whole answer greedy decoding would give, from 0 to 1.

    One forward pass over context, question and answer suffices: greedy decoding is right as a whole
    exactly when every answer token is the most likely one after the right ones before it.
    """
    right = 0
    per_call = max(1, tokens_per_call // samples[0].total_tokens)
    for first in range(0, len(samples), per_call):
        chunk = samples[first : first + per_call]
        rows = [s.context_ids + s.solved for s in chunk]
        answers = torch.tensor([s.answers[0].ids for s in chunk], device=model.device)
        ids = torch.tensor(rows, device=model.device)
        logits = model(ids, logits_to_keep=answers.shape[1] + 1, use_cache=False).logits
        right += int((logits[:, :-1].argmax(-1) == answers).all(1).sum())
    return right / len(samples)


@torch.inference_mode()
def language_model_loss(
    model: PreTrainedModel, haystack: Haystack, context: int, windows: int, seed: int
) -> float:
    """Mean loss in nats a token over ``windows`` needle-free windows of ``context`` tokens."""
    rng = random.Random(seed)
    losses = []
    for _ in range(windows):
        ids = torch.tensor([haystack.window(context, rng)[0]], device=model.device)
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
    return sum(losses) / len(losses)
