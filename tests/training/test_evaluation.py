"""The recipe measures a trained model the way the package does."""

import sys
from pathlib import Path

import pytest

from tidaldecode.demo import MODEL_DIRECTORY
from tidaldecode.integrations.transformers.loading import load_model

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

from evaluation import held_out_haystack, language_model_loss, needle_accuracy, needle_samples


@pytest.fixture(scope="module")
def embedded():  # type: ignore[no-untyped-def]
    return load_model(MODEL_DIRECTORY)


def test_the_embedded_model_finds_needles_and_reads_code(embedded) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = embedded
    haystack = held_out_haystack(tokenizer, seed=0)
    samples = needle_samples(haystack, tokenizer, context=512, samples=4, distractors=2, seed=1)
    assert [s.total_tokens for s in samples] == [512] * 4
    assert needle_accuracy(model, samples) == 1.0
    assert needle_accuracy(model, [_with_other_answer(s) for s in samples]) == 0.0
    assert 0.5 < language_model_loss(model, haystack, 512, 2, seed=0) < 4


def _with_other_answer(sample):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    answer = sample.answers[0]
    return replace(sample, answers=[replace(answer, ids=answer.ids[1:] + answer.ids[:1])])
