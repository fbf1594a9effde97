"""Training sequences: windows of source code with needles and questions between the lines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from tidaldecode.eval.needle import ANSWER_DIGITS, question_text, statement_text
from tidaldecode.eval.words import ADJECTIVES, NOUNS

SOURCE, STATEMENT, QUESTION, ANSWER = range(4)
"""What a token belongs to."""
LOSS_WEIGHTS = (1.0, 0.0, 1.0, 3.0)
"""Loss weight by kind: statements are random by design, so there is nothing to learn in them."""


@dataclass(frozen=True)
class Batch:
    """Token ids and kinds, both ``[sequences, context + 1]``: inputs and targets overlap by one."""

    ids: NDArray[np.int32]
    kinds: NDArray[np.uint8]


class Composer:
    """Composes batches from a row of token ids; a batch depends on ``seed`` and ``step`` only.

    Args:
        corpus: token ids of all sources in one row.
        breaks: for every token id, whether it holds a line break.
        tokens_per_piece: mean distance in tokens between two needles or questions.
        needle_share: share of sequences that carry needles, from 0 to 1.
    """

    def __init__(
        self,
        corpus: NDArray[np.uint16],
        breaks: NDArray[np.bool_],
        tokenizer: PreTrainedTokenizerFast,
        *,
        seed: int,
        tokens_per_piece: float = 150.0,
        needle_share: float = 0.8,
    ) -> None:
        self._corpus, self._breaks, self._seed = corpus, breaks, seed
        self._tokens_per_piece, self._needle_share = tokens_per_piece, needle_share
        keys = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
        value = "0" * ANSWER_DIGITS
        self._statements = _table(tokenizer, [statement_text(key, value) for key in keys])
        self._questions = _table(tokenizer, [question_text(key) + value + "\n" for key in keys])
        digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
        self._digits = np.array(digits, dtype=np.int32)
        self._statement_digits = np.flatnonzero(self._statements[0] == digits[0])
        self._question_digits = np.flatnonzero(self._questions[0] == digits[0])
        self._question_kinds = np.full(self._questions.shape[1], QUESTION, dtype=np.uint8)
        self._question_kinds[self._question_digits] = ANSWER

    def batch(self, step: int, sequences: int, context: int) -> Batch:
        """``sequences`` sequences of ``context`` input tokens each."""
        rng = np.random.default_rng((self._seed, step))
        ids = np.empty((sequences, context + 1), dtype=np.int32)
        kinds = np.empty((sequences, context + 1), dtype=np.uint8)
        for row in range(sequences):
            pieces = 0
            if rng.random() < self._needle_share:
                pieces = max(2, int(rng.poisson(context / self._tokens_per_piece)))
            self._compose(ids[row], kinds[row], pieces, rng)
        return Batch(ids, kinds)

    def _compose(
        self,
        ids: NDArray[np.int32],
        kinds: NDArray[np.uint8],
        pieces: int,
        rng: np.random.Generator,
    ) -> None:
        """Fill one sequence in place with source and ``pieces`` statements and questions."""
        asks = rng.random(pieces) < 0.5
        asks[:1] = False
        lengths = np.where(asks, self._questions.shape[1], self._statements.shape[1])
        source_tokens = len(ids) - int(lengths.sum())
        start = int(rng.integers(len(self._corpus) - source_tokens))
        source = self._corpus[start : start + source_tokens]
        line_ends = np.flatnonzero(self._breaks[source]) + 1
        if len(line_ends) < pieces:  # one endless line: nowhere to put them
            self._compose(ids, kinds, 0, rng)
            return
        places = np.sort(rng.choice(line_ends, pieces, replace=False))
        told = np.cumsum(~asks) - 1  # index of the latest statement at each piece
        keys = rng.choice(len(self._statements), pieces, replace=False)
        values = self._digits[rng.integers(10, size=(pieces, ANSWER_DIGITS))]
        subjects = np.where(asks, rng.integers(told + 1), told)
        read = written = 0
        for place, ask, subject in zip(places, asks, subjects, strict=True):
            gap = int(place) - read
            ids[written : written + gap] = source[read:place]
            kinds[written : written + gap] = SOURCE
            read, written = int(place), written + gap
            table = self._questions if ask else self._statements
            end = written + table.shape[1]
            ids[written:end] = table[keys[subject]]
            kinds[written:end] = self._question_kinds if ask else STATEMENT
            spots = self._question_digits if ask else self._statement_digits
            ids[written + spots] = values[subject]
            written = end
        ids[written:] = source[read:]
        kinds[written:] = SOURCE


def _table(tokenizer: PreTrainedTokenizerFast, lines: list[str]) -> NDArray[np.int32]:
    """Token ids of all lines, ``[lines, tokens]``.

    Errors: `ValueError` when the lines differ in length, that is, when a word is several tokens.
    """
    rows = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(lines)]
    shortest = min(map(len, rows))
    longer = [line for line, row in zip(lines, rows, strict=True) if len(row) > shortest]
    if longer:
        raise ValueError(
            f"needle words: expected one token each, found {len(longer):,} of {len(lines):,} lines "
            f"longer than {shortest} tokens, such as {longer[0]!r}; write more needles into the "
            "tokenizer's text or use a larger vocabulary"
        )
    return np.array(rows, dtype=np.int32)
