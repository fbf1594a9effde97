"""Needle samples: what is hidden, where, and that the answer is in the text exactly once."""

import random
import re

import pytest
from eval_cases import decode, encode
from hypothesis import given, settings
from hypothesis import strategies as st

from tidaldecode import TidalError
from tidaldecode.eval.haystack import standard_library_files, standard_library_text
from tidaldecode.eval.needle import (
    ANSWER_DIGITS,
    Haystack,
    NeedleShape,
    decode_tail,
    draw_key,
    draw_value,
    make_sample,
    statement_text,
)

TEXT = "".join(f"line {number} of the haystack\n" for number in range(800))
HAYSTACK = Haystack.from_text(TEXT, encode, decode)


def sample(seed: int = 0, **changes):
    options = {"context_tokens": 2000, "depth": 0.5, "distractors": 3} | changes
    shape = NeedleShape(distractors=options.pop("distractors"))
    return make_sample(HAYSTACK, encode, rng=random.Random(seed), shape=shape, **options)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(900, 6000),
    depth=st.floats(0, 1),
    distractors=st.integers(0, 8),
)
def test_a_sample_hides_its_answer_once_and_has_the_asked_length(seed, tokens, depth, distractors):
    made = sample(seed, context_tokens=tokens, depth=depth, distractors=distractors)
    [answer] = made.answers
    asked, free = made.script[: answer.first_step + 1], made.script[answer.first_step + 1 :]
    assert free == [None] * (ANSWER_DIGITS - 1)
    context, question, answer = map(decode, (made.context_ids, asked, answer.ids))
    assert made.total_tokens == tokens == len(context) + len(question) + len(answer)
    assert decode(made.solved) == question + answer
    assert made.values == [answer]
    assert len(answer) == ANSWER_DIGITS
    assert answer.isdigit()
    key = question.removeprefix("# What is the code of ").removesuffix("? ")
    assert context.count(statement_text(key, answer)) == 1
    keys = re.findall(r"# The code of (\w+ \w+) is \d{7}\.\n", context)
    assert len(keys) == len(set(keys)) == distractors + 1


def test_a_decoded_tail_changes_nothing_but_where_it_is_fed():
    made = sample()
    tail = decode_tail(made, 700)
    assert tail.context_ids + tail.script[:700] == made.context_ids
    assert tail.script[700:] == made.script and tail.total_tokens == made.total_tokens
    assert tail.solved[700:] == made.solved
    assert decode_tail(made, 0) == made
    with pytest.raises(TidalError, match="decoded-tokens: expected fewer than the"):
        decode_tail(made, len(made.context_ids))


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_needle_lies_at_its_depth(depth):
    made = sample(depth=depth, distractors=0)
    context = decode(made.context_ids)
    place = context.index("# The code of ") / len(context)
    assert abs(place - depth) < 0.04


def test_needles_stand_on_lines_of_their_own():
    for seed in range(20):
        lines = decode(sample(seed, distractors=8).context_ids).splitlines()
        needles = [line for line in lines if "code of" in line]
        assert len(needles) == 9
        assert all(line.startswith("# The code of ") and line.endswith(".") for line in needles)


def test_the_same_seed_gives_the_same_sample_and_another_seed_another():
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_keys_have_two_words_and_values_seven_digits():
    rng = random.Random(0)
    assert all(len(draw_key(rng).split()) == 2 for _ in range(100))
    assert all(len(draw_value(rng)) == 7 and draw_value(rng).isdigit() for _ in range(100))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 1.5}, r"^depth: expected a number from 0 to 1, got 1.5"),
        ({"depth": -0.1}, r"^depth"),
        ({"context_tokens": 60}, r"^context: expected room for 4 needles"),
        ({"context_tokens": 10**6}, r"^haystack: expected more than"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes, message):
    with pytest.raises(TidalError, match=message):
        sample(**changes)


def test_a_haystack_without_line_breaks_is_refused():
    with pytest.raises(TidalError, match=r"^haystack: expected a text with line breaks"):
        Haystack.from_text("one endless line", encode, decode)


def test_the_standard_library_is_a_haystack_without_its_tests():
    files = standard_library_files()
    assert len(files) > 100
    assert not any("test" in path.parts or "site-packages" in path.parts for path in files)
    text = standard_library_text(50_000, seed=1)
    assert len(text) >= 50_000
    assert text == standard_library_text(50_000, seed=1)
    assert text[:500] != standard_library_text(50_000, seed=2)[:500]


def test_more_text_than_there_is_is_refused():
    with pytest.raises(TidalError, match=r"^haystack: expected at least"):
        standard_library_text(10**10)
