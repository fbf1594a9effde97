"""The runner asks every question by every method, prefills once, and scores exactly."""

import json

import pytest
from eval_cases import LINES, ReadingEngine, decode, encode
from PIL import Image

from tidaldecode import TidalConfig
from tidaldecode.eval.methods import Method
from tidaldecode.eval.needle import ANSWER_DIGITS
from tidaldecode.eval.needle_task import NeedleGrid, NeedleTask, summarise_needle
from tidaldecode.eval.plots import plot_needle
from tidaldecode.eval.runner import run_task
from tidaldecode.eval.store import RowStore

METHODS = [Method("full", None), Method("sparse", TidalConfig(budget=64, select_layers=(2,)))]
GRID = NeedleGrid(contexts=(1000, 2000), depths=(0.0, 0.5), samples=2, distractors=2, seed=3)
TASK = NeedleTask(LINES, encode, decode, GRID)
KEYS = TASK.keys()


def ask(engine=None, store=None, methods=METHODS, **options):
    return run_task(
        TASK, engine or ReadingEngine(), methods, store or RowStore(None, {}), **options
    )


@pytest.fixture
def rows():
    return ask()


def test_every_cell_is_asked_by_every_method_once(rows):
    asked = [(row["key"], row["method"]) for row in rows]
    assert len(set(asked)) == len(asked) == 2 * 2 * 2 * 2
    assert set(asked) == {(key, method.name) for key in KEYS for method in METHODS}
    for row in rows:
        assert row["key"].split("/")[:-1] == [
            row["kind"], str(row["context"]), str(row["depth"])
        ]  # fmt: skip
    cells = {(row["kind"], row["context"], row["depth"]) for row in rows}
    assert cells == {("multi-key", c, d) for c in GRID.contexts for d in GRID.depths}


def test_each_context_is_prefilled_once_for_all_methods():
    engine = ReadingEngine()
    ask(engine)
    assert engine.prefilled == [1] * len(KEYS)
    assert engine.runs == len(KEYS) * len(METHODS)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 99])
def test_a_batch_changes_no_row_and_is_prefilled_once(rows, batch_size):
    engine = ReadingEngine()
    batched = ask(engine, batch_size=batch_size)
    assert sum(engine.prefilled) == 8
    assert len(engine.prefilled) == -(-8 // batch_size)

    def by_name(found):
        return sorted(found, key=lambda row: (row["key"], row["method"]))

    assert by_name(batched) == by_name(rows)


def test_scores_are_exact_match_and_share_of_tokens(rows):
    for row in rows:
        assert row["exact"] is (row["method"] == "full")
        expected = 1.0 if row["method"] == "full" else 1 - 1 / ANSWER_DIGITS
        assert row["token_accuracy"] == pytest.approx(expected)
        assert row["step_ms"] == pytest.approx(2.0)


def test_the_summary_counts_each_method_and_context_for_itself(rows):
    lines = summarise_needle(rows, METHODS)
    assert [(line["context"], line["method"]) for line in lines] == [
        (1000, "full"), (1000, "sparse"), (2000, "full"), (2000, "sparse")
    ]  # fmt: skip
    for line in lines:
        right = line["method"] == "full"
        assert line["exact"]["mean"] == float(right) and line["exact"]["n"] == 4
        assert line["token_accuracy"]["mean"] == pytest.approx(1 if right else 6 / 7)
        assert line["step_ms"] == pytest.approx(2.0)


def test_rows_are_reported_as_they_come():
    seen = []
    rows = ask(on_rows=seen.append, batch_size=3)
    assert seen == [0, 3, 3, 3, 3, 2, 2] and sum(seen) == len(rows)


def test_what_is_there_is_not_run_again():
    store = RowStore(None, {})
    ask(store=store, methods=METHODS[:1])
    engine, seen = ReadingEngine(), []
    rows = ask(engine, store, on_rows=seen.append)
    assert engine.runs == 8 and sum(engine.prefilled) == 8
    assert seen == [8] + [1] * 8
    assert len({(row["key"], row["method"]) for row in rows}) == len(rows) == 16
    again = ReadingEngine()
    assert ask(again, store) == rows
    assert again.prefilled == [] and again.runs == 0


def test_a_batch_of_which_a_part_is_there_loses_and_doubles_nothing():
    whole = ask(batch_size=4)
    store = RowStore(None, {})
    store.append(whole[:2])
    rows = ask(store=store, batch_size=4)
    assert len(rows) == len(whole) and all(row in rows for row in whole)
    assert rows[:2] == whole[:2]


def test_the_heatmap_is_a_png_that_carries_its_record(rows, tmp_path):
    record = {"seed": 3, "versions": {"torch": "x"}, "note": "50 % \N{MULTIPLICATION SIGN} 2"}
    path = plot_needle(rows, tmp_path / "needle.png", "a title", record)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert json.loads(Image.open(path).info["Description"]) == record
    assert [entry.name for entry in tmp_path.iterdir()] == ["needle.png"]
