"""Kinds of needles: what each asks, in which order it is fed, and when an answer counts."""

import random
import re

import pytest
from eval_cases import LINES, ReadingEngine, decode, encode
from hypothesis import given, settings
from hypothesis import strategies as st

from tidaldecode import TidalError
from tidaldecode.eval.methods import Method
from tidaldecode.eval.needle import (
    ANSWER_DIGITS,
    KINDS,
    NeedleShape,
    make_sample,
    score_answer,
    statement_text,
)
from tidaldecode.eval.needle_task import NeedleGrid, NeedleTask

QUERIES = {"single": 1, "multi-key": 1, "multi-query": 4, "multi-value": 1}
VALUES = {"single": 1, "multi-key": 1, "multi-query": 1, "multi-value": 3}


def sample(kind: str, seed: int = 0, tokens: int = 3000, depth: float = 0.5, distractors: int = 3):
    shape = NeedleShape.of_kind(kind, distractors)
    rng = random.Random(seed)
    return make_sample(
        LINES, encode, context_tokens=tokens, depth=depth, rng=rng, shape=shape
    )  # fmt: skip


def told_by(made, answers: list[str]) -> list[int]:
    """The likeliest token after every step, if the model gives these answers and else nonsense."""
    tokens = [ord("?")] * len(made.script)
    for answer, text in zip(made.answers, answers, strict=True):
        for offset, character in enumerate(text):
            tokens[answer.first_step + offset] = ord(character)
    return tokens


def one_digit_wrong(value: str) -> str:
    return ("1" if value[0] == "0" else "0") + value[1:]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10_000),
    tokens=st.integers(1200, 6000),
    depth=st.floats(0, 1),
    distractors=st.integers(0, 8),
)
def test_every_kind_takes_the_tokens_asked_for_and_hides_each_value_once(
    kind, seed, tokens, depth, distractors
):
    made = sample(kind, seed, tokens, depth, distractors)
    context, solved = decode(made.context_ids), decode(made.solved)
    assert made.total_tokens == tokens == len(context) + len(solved)
    found = re.findall(r"^# The code of (\w+ \w+) is (\d{7})\.\n", context, re.MULTILINE)
    others = 0 if kind == "single" else distractors
    assert len(found) == QUERIES[kind] * VALUES[kind] + others
    assert len({key for key, _ in found}) == QUERIES[kind] + others
    asked = re.findall(r"of (\w+ \w+)\? ([\d, ]+)", solved)
    assert len(asked) == QUERIES[kind]
    told = [(key, value) for key, values in asked for value in values.split(", ")]
    assert [value for _, value in told] == made.values
    assert all(context.count(statement_text(key, value)) == 1 for key, value in told)


def test_several_needles_are_asked_for_one_after_another():
    made = sample("multi-query")
    text = decode([ord("_") if token is None else token for token in made.script])
    question = r"# What is the code of \w+ \w+\? "
    # The model's own answer is fed, all of it where something follows and but its last digit else.
    assert re.fullmatch(rf"(?:{question}_{{7}}\n){{3}}{question}_{{6}}", text)
    assert re.fullmatch(rf"(?:{question}\d{{7}}\n){{3}}{question}\d{{7}}", decode(made.solved))
    assert not made.any_order


def test_several_values_are_asked_for_by_one_question():
    made = sample("multi-value")
    text = decode([ord("_") if token is None else token for token in made.script])
    question = r"# What are the 3 codes of \w+ \w+\? "
    assert re.fullmatch(rf"{question}_{{7}}, _{{7}}, _{{6}}", text)
    assert re.fullmatch(rf"{question}\d{{7}}, \d{{7}}, \d{{7}}", decode(made.solved))
    assert made.any_order


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_begins_at_the_step_that_is_fed_the_last_token_of_its_question(kind):
    made = sample(kind)
    assert len(made.answers) == len(made.values) == QUERIES[kind] * VALUES[kind]
    for answer, value in zip(made.answers, made.values, strict=True):
        assert decode(answer.ids) == value and len(value) == ANSWER_DIGITS
        assert made.script[answer.first_step] == ord(" ")
        # Fed from the next step on, unless nothing follows the last token of all.
        fed = made.script[answer.first_step + 1 :][:ANSWER_DIGITS]
        assert fed in ([None] * ANSWER_DIGITS, [None] * (ANSWER_DIGITS - 1))
        first = answer.first_step + 1
        assert decode(made.solved[first : first + ANSWER_DIGITS]) == value


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_answers_count_in_full_and_one_wrong_digit_is_not_exact(kind):
    made = sample(kind)
    assert score_answer(made, told_by(made, made.values), decode) == (True, 1.0)
    for index in range(len(made.values)):
        values = list(made.values)
        values[index] = one_digit_wrong(values[index])
        units = len(values) if made.any_order else len(values) * ANSWER_DIGITS
        expected = (False, pytest.approx(1 - 1 / units))
        assert score_answer(made, told_by(made, values), decode) == expected


def test_values_of_one_key_count_in_any_order_but_each_once():
    made = sample("multi-value")
    first, second, third = made.values
    assert score_answer(made, told_by(made, [third, first, second]), decode) == (True, 1.0)
    repeated = score_answer(made, told_by(made, [first, first, second]), decode)
    assert repeated == (False, pytest.approx(2 / 3))
    shifted = told_by(made, [" " + first[:-1], second, third])
    assert score_answer(made, shifted, decode) == (False, pytest.approx(2 / 3))


def test_values_of_different_keys_do_not_count_in_another_order():
    made = sample("multi-query", seed=3)
    swapped = [made.values[1], made.values[0], *made.values[2:]]
    exact, share = score_answer(made, told_by(made, swapped), decode)
    assert not exact and 0.5 <= share < 1


def test_nothing_but_the_answers_is_scored():
    made = sample("multi-query")
    tokens = told_by(made, made.values)
    places = {a.first_step + offset for a in made.answers for offset in range(ANSWER_DIGITS)}
    others = [step for step in range(len(tokens)) if step not in places]
    assert len(others) > 50
    for step in others:
        tokens[step] = ord("7")
    assert score_answer(made, tokens, decode) == (True, 1.0)
    assert max(places) == len(made.script) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_of_the_context_solves_every_kind(kind):
    grid = NeedleGrid((2000,), (0.0, 0.9), samples=2, distractors=4, kinds=(kind,))
    task, engine = NeedleTask(LINES, encode, decode, grid), ReadingEngine()
    keys = task.keys()
    samples = {key: task.build(key) for key in keys}
    engine.prefill([made.context_ids for made in samples.values()])
    [rows] = task.measure(engine, samples, [Method("dense", None)])
    assert [row["key"] for row in rows] == keys
    assert all(row["exact"] and row["token_accuracy"] == 1.0 for row in rows)
    assert {row["kind"] for row in rows} == {kind}


def test_the_first_needle_lies_at_its_depth_in_every_kind():
    for kind in KINDS:
        made = sample(kind, depth=0.8, tokens=5000)
        assert made.depth == 0.8
        place = decode(made.context_ids).index(made.values[0]) / len(made.context_ids)
        assert abs(place - 0.8) < 0.1


def test_a_task_builds_the_same_sample_each_time_and_another_for_another_seed():
    grid = NeedleGrid((2000,), (0.5,), samples=2, kinds=KINDS)
    task = NeedleTask(LINES, encode, decode, grid)
    keys = task.keys()
    assert len(set(keys)) == len(keys) == 8
    assert [task.build(key) for key in keys] == [task.build(key) for key in keys]
    assert task.build(keys[0]) != task.build(keys[1])
    other = NeedleTask(LINES, encode, decode, NeedleGrid((2000,), (0.5,), 2, kinds=KINDS, seed=1))
    assert task.build(keys[0]) != other.build(keys[0])


def test_an_unknown_kind_and_too_short_a_context_are_refused():
    with pytest.raises(TidalError, match=r"^kind: expected one of single, .*, got 'double'"):
        NeedleShape.of_kind("double")
    with pytest.raises(TidalError, match=r"^context: expected room for 7 needles .* at least"):
        sample("multi-query", tokens=300)


def test_the_refusal_of_a_short_context_names_one_that_fits():
    with pytest.raises(TidalError, match=r"at least (\d+)") as refusal:
        sample("multi-value", tokens=200)
    least = int(re.search(r"at least (\d+)", str(refusal.value))[1])
    assert sample("multi-value", tokens=least).total_tokens == least
    with pytest.raises(TidalError, match=r"^context"):
        sample("multi-value", tokens=least - 1)
