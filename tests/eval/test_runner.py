"""The runner asks every question by every method, prefills once, and scores exactly."""

import pytest

from tidaldecode import TidalConfig
from tidaldecode.eval.needle import ANSWER_DIGITS, Haystack
from tidaldecode.eval.plots import plot_needle
from tidaldecode.eval.runner import Method, NeedleGrid, run_needle


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


HAYSTACK = Haystack.from_text("".join(f"line {n}\n" for n in range(900)), encode, decode)


class ReadingEngine:
    """An engine that reads the context: a sparse method misses the last digit."""

    def __init__(self):
        self.prefills = 0
        self.context = ""

    def prefill(self, ids):
        self.prefills += 1
        self.context = decode(ids)

    def decode(self, forced, new_tokens, config):
        key = decode(forced).removeprefix("# What is the code of ").removesuffix("? ")
        start = self.context.index(f"# The code of {key} is ") + len(f"# The code of {key} is ")
        value = self.context[start : start + new_tokens]
        if config is not None:
            value = value[:-1] + ("0" if value[-1] != "0" else "1")
        return encode(value), [0.002] * (len(forced) + new_tokens - 1)


METHODS = [Method("full", None), Method("sparse", TidalConfig(budget=64, select_layers=(2,)))]
GRID = NeedleGrid(contexts=(1000, 2000), depths=(0.0, 0.5), samples=2, distractors=2, seed=3)


@pytest.fixture
def rows():
    return run_needle(ReadingEngine(), HAYSTACK, encode, METHODS, GRID)


def test_every_cell_is_asked_by_every_method(rows):
    assert len(rows) == 2 * 2 * 2 * 2
    assert {(row.context, row.depth, row.sample) for row in rows} == set(GRID.cells())


def test_each_context_is_prefilled_once_for_all_methods():
    engine = ReadingEngine()
    run_needle(engine, HAYSTACK, encode, METHODS, GRID)
    assert engine.prefills == len(GRID.cells())


def test_scores_are_exact_match_and_share_of_tokens(rows):
    for row in rows:
        assert row.exact is (row.method == "full")
        expected = 1.0 if row.method == "full" else 1 - 1 / ANSWER_DIGITS
        assert row.token_accuracy == pytest.approx(expected)
        assert row.step_ms == pytest.approx(2.0)


def test_rows_are_reported_as_they_come():
    seen = []
    rows = run_needle(ReadingEngine(), HAYSTACK, encode, METHODS, GRID, seen.append)
    assert seen == rows


def test_the_heatmap_is_a_png(rows, tmp_path):
    path = plot_needle(rows, tmp_path / "needle.png", "a title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["needle.png"]
