"""The training text: Python sources of installed packages, English, a tokenizer made from them.

The standard library and the last tenth of the English are never part of it: they are the held-out
texts of the evaluation.
"""

from __future__ import annotations

import hashlib
import lzma
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tidaldecode.eval.haystack import standard_library_files
from tidaldecode.eval.needle import draw_key, draw_value, question_text, statement_text

END_OF_TEXT = "<|endoftext|>"
MAX_FILE_BYTES = 200_000
"""Larger sources are nearly always generated tables."""
_SKIPPED_FOLDERS = {"testdata", "test_data", "test-data", "__pycache__"}
_TOKENIZER_CHARACTERS = 20_000_000
"""Source characters the tokenizer is trained on: more moves hardly any merge."""
_TOKENIZER_NEEDLES = 120_000
"""Needle lines in the tokenizer's text: enough that every word of a key becomes one token."""


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def collect_sources(megabytes: float, seed: int) -> list[str]:
    """About ``megabytes`` (10^6 bytes) of installed packages' sources, in an order set by ``seed``.

    Files of equal content are taken once, copies of standard-library files not at all.
    """
    root = Path(sysconfig.get_path("purelib"))
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )
    random.Random(seed).shuffle(paths)
    seen = {_digest(path.read_bytes()) for path in standard_library_files()}
    texts: list[str] = []
    total = 0
    for path in paths:
        if total >= megabytes * 1e6:
            break
        if not 0 < path.stat().st_size <= MAX_FILE_BYTES:
            continue
        data = path.read_bytes()
        digest = _digest(data)
        if digest in seen:
            continue
        seen.add(digest)
        try:
            texts.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            continue
        total += len(data)
    return texts


def read_english(path: Path) -> list[str]:
    """The first nine tenths of a UTF-8 text, plain or ``.xz``, cut at line ends into documents."""
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    lines = text[: len(text) * 9 // 10].splitlines(keepends=True)
    per_document = 2_000
    return [
        "".join(lines[first : first + per_document]) for first in range(0, len(lines), per_document)
    ]


def repeat_to_share(
    corpus: NDArray[np.uint16], other: NDArray[np.uint16], share: float
) -> NDArray[np.uint16]:
    """``corpus`` followed by ``other``, repeated until it is ``share`` (0 to 1) of all tokens."""
    return np.concatenate([corpus, np.resize(other, int(len(corpus) * share / (1 - share)))])


def _tokenizer_text(texts: list[str], seed: int) -> Iterator[str]:
    """Needle lines first, then a slice of the sources."""
    characters = min(_TOKENIZER_CHARACTERS, sum(map(len, texts)))
    needles = int(_TOKENIZER_NEEDLES * characters / _TOKENIZER_CHARACTERS)
    rng = random.Random(seed)
    for _ in range(needles // 2):
        yield statement_text(draw_key(rng), draw_value(rng))
        yield question_text(draw_key(rng))
    for text in texts:
        if characters <= 0:
            return
        yield text
        characters -= len(text)


def train_tokenizer(texts: list[str], vocabulary: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit is a token of its own; round trips are exact."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(texts, seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_texts(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], files_per_call: int = 1024
) -> NDArray[np.uint16]:
    """All files' token ids in one row, each file followed by the end-of-text token."""
    parts: list[NDArray[np.uint16]] = []
    end = np.array([tokenizer.eos_token_id], dtype=np.uint16)
    for first in range(0, len(texts), files_per_call):
        # One call runs on all cores; this variant of it keeps no character offsets.
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(
            texts[first : first + files_per_call], add_special_tokens=False
        ):
            parts += [np.array(encoding.ids, dtype=np.uint16), end]
    return np.concatenate(parts)


def line_break_tokens(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.bool_]:
    """For every token id, whether its text holds a line break; shape ``[vocabulary]``."""
    return np.array(["\n" in tokenizer.decode([token]) for token in range(len(tokenizer))])
