"""generate's logits processors on tokens that may yet be rejected.

A processor that looks at single positions works on any number of them at once. One that looks at the
tokens before is asked again for every position, with the drafted prefix; that is exact where its
answer depends on nothing else. All others are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.generation import LogitsProcessorList

from tidaldecode.errors import TidalError

POINTWISE = frozenset(
    "TemperatureLogitsWarper TopKLogitsWarper TopPLogitsWarper TopHLogitsWarper MinPLogitsWarper "
    "TypicalLogitsWarper EpsilonLogitsWarper EtaLogitsWarper SuppressTokensLogitsProcessor "
    "InfNanRemoveLogitsProcessor LogitNormalization".split()
)
"""Processors of transformers that look at the scores alone."""
REPLAYABLE = frozenset(
    "MinLengthLogitsProcessor MinNewTokensLengthLogitsProcessor RepetitionPenaltyLogitsProcessor "
    "NoRepeatNGramLogitsProcessor SequenceBiasLogitsProcessor NoBadWordsLogitsProcessor "
    "ForcedBOSTokenLogitsProcessor ForcedEOSTokenLogitsProcessor ExponentialDecayLengthPenalty "
    "SuppressTokensAtBeginLogitsProcessor".split()
)
"""Processors of transformers that look at a row's tokens and scores, and at nothing else."""
PROMISE = "tidal_replayable"
"""A processor of one's own with this attribute set to True promises to be such a one."""


def beyond_scores(processors: LogitsProcessorList) -> list[str]:
    """Names of those that look at more than the scores, as far as is known."""
    names = ((type(p).__name__, _is_transformers(p)) for p in processors)
    return [name for name, theirs in names if not (theirs and name in POINTWISE)]


class Processing:
    """Applies processors to many positions. Errors: `TidalError` for one that cannot be replayed."""

    def __init__(self, processors: LogitsProcessorList) -> None:
        self._processors = processors
        self.processes = bool(processors)
        """Whether there is anything to apply."""
        for processor in processors:
            _check(processor)
        self.needs_history = bool(beyond_scores(processors))

    def __call__(
        self, scores: torch.Tensor, history: torch.Tensor, lengths: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Processed scores.

        Args:
            scores: ``[B, n, V]`` fp32 logits.
            history: ``[B, at least the lengths]`` the tokens of every row.
            lengths: for each row and position, the number of tokens before it.

        Without `needs_history` no token of the history is looked at, and no length.
        """
        if not self._processors:
            return scores
        if not self.needs_history:
            flat = scores.flatten(0, 1)
            found: torch.Tensor = self._processors(history[:1, :1].expand(len(flat), 1), flat)
            return found.view_as(scores)
        found = scores.clone()
        every = torch.arange(len(scores), device=scores.device)
        for length in sorted({length for places in lengths for length in places}):
            # The whole batch is asked, since a processor may know its rows; those of this length count.
            hits = [places.index(length) if length in places else 0 for places in lengths]
            at = torch.tensor(hits, device=scores.device)
            told = self._processors(history[:, :length], scores[every, at])
            for row, places in enumerate(lengths):
                if length in places:
                    found[row, places.index(length)] = told[row]
        return found


def _check(processor: object) -> None:
    name = type(processor).__name__
    known = _is_transformers(processor) and name in POINTWISE | REPLAYABLE
    if not known and getattr(processor, PROMISE, False) is not True:
        raise TidalError(
            "logits_processor: expected ones that depend on a row's tokens and scores alone, so that "
            f"they can be replayed on drafted tokens, got {name}, of which that is not known; leave it "
            f"out, use mode='sparse', or set {PROMISE} = True on a processor of your own that keeps "
            "nothing between calls and treats every row by itself"
        )


def _is_transformers(processor: object) -> bool:
    return type(processor).__module__.startswith("transformers.")
