"""Rows on disk: a run may be killed at any byte and goes on without losing or doubling a row."""

import json
import os

import pytest
from eval_cases import LINES, ReadingEngine, decode, encode

from tidaldecode import TidalConfig, TidalError
from tidaldecode.eval.methods import Method
from tidaldecode.eval.needle_task import NeedleGrid, NeedleTask
from tidaldecode.eval.runner import run_task
from tidaldecode.eval.store import RowStore

RECORD = {"time": "now", "command": ["a"], "seed": 1, "grid": {"contexts": (1, 2)}, "commit": None}
ROWS = [{"key": f"k{n}", "method": m, "value": n} for n in range(3) for m in ("dense", "tidal 8")]


def started(path, rows=ROWS, record=RECORD) -> bytes:
    """Write a file of these rows; return what it holds."""
    RowStore(path, record).append(rows)
    return path.read_bytes()


def test_the_first_line_is_the_record_and_every_row_is_a_line(tmp_path):
    lines = started(tmp_path / "rows.jsonl").decode().splitlines()
    assert json.loads(lines[0]) == {"record": json.loads(json.dumps(RECORD))}
    assert [json.loads(line) for line in lines[1:]] == ROWS


def test_rows_are_on_disk_when_append_returns(tmp_path):
    path = tmp_path / "deep" / "er" / "rows.jsonl"
    store = RowStore(path, RECORD)
    for count, row in enumerate(ROWS, start=1):
        store.append([row])
        assert len(path.read_bytes().splitlines()) == count + 1
    assert os.listdir(path.parent) == ["rows.jsonl"]


def test_a_run_goes_on_where_it_stopped_and_keeps_the_first_ones_record(tmp_path):
    path = tmp_path / "rows.jsonl"
    before = started(path, ROWS[:3])
    again = RowStore(path, {**RECORD, "time": "later", "command": ["b"]})
    assert path.read_bytes() == before
    assert again.rows == ROWS[:3]
    assert again.record["time"] == "now" and again.record["command"] == ["a"]
    assert [again.has(row["key"], row["method"]) for row in ROWS] == [True] * 3 + [False] * 3
    again.append(ROWS[3:])
    assert path.read_bytes().startswith(before)
    assert RowStore(path, RECORD).rows == again.rows == ROWS


def test_rows_that_are_there_are_not_added_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = started(path)
    store = RowStore(path, RECORD)
    store.append([{**row, "value": "other"} for row in ROWS])
    store.append([])
    assert path.read_bytes() == whole and store.rows == ROWS
    store.append([ROWS[0], {"key": "new", "method": "dense"}])
    assert store.rows == [*ROWS, {"key": "new", "method": "dense"}]
    assert RowStore(path, RECORD).rows == store.rows


@pytest.mark.parametrize("cut", [1, 2, 10, len(json.dumps(ROWS[-1]))])
def test_a_torn_last_line_is_dropped_and_lost_only_once(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    whole = started(path)
    path.write_bytes(whole[:-cut])
    store = RowStore(path, RECORD)
    assert store.rows == ROWS[:-1]
    assert path.read_bytes().endswith(b"\n") and whole.startswith(path.read_bytes())
    store.append(ROWS[-1:])
    assert path.read_bytes() == whole
    assert RowStore(path, RECORD).rows == ROWS


def test_bytes_of_a_torn_character_are_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = started(path)
    path.write_bytes(whole + b'{"key": "\xe2\x82')
    assert RowStore(path, RECORD).rows == ROWS
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 2}, "seed"),
        ({"seed": 2, "commit": "abc"}, "commit, seed"),
        ({"extra": 1}, "extra"),
        ({"grid": {"contexts": [1, 3]}}, "grid"),
    ],
)
def test_another_runs_rows_are_refused_naming_what_differs(tmp_path, changes, named):
    path = tmp_path / "rows.jsonl"
    whole = started(path) + b'{"torn'
    path.write_bytes(whole)
    with pytest.raises(
        TidalError,
        match=rf"expected rows of this very run, .* differs in {named}; pass --overwrite",
    ):
        RowStore(path, {**RECORD, **changes})
    assert path.read_bytes() == whole


def test_what_the_earlier_run_had_and_this_one_lacks_is_named_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    started(path, record={**RECORD, "kind": "x"})
    with pytest.raises(TidalError, match=r"differs in kind;"):
        RowStore(path, RECORD)


def test_overwriting_starts_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    started(path)
    store = RowStore(path, {**RECORD, "seed": 2}, overwrite=True)
    assert store.rows == [] and not store.has("k0", "dense")
    [line] = path.read_text().splitlines()
    assert json.loads(line)["record"]["seed"] == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"precious notes\n",
        b"precious notes",
        b'{"record": {}}',  # without an end of line: the head is written whole, so it is not ours
        b"[1, 2]\n",
        b"5\n",
        b'{"key": "a", "method": "b"}\n',
        b"\xff\xfe\x00\n",
        b"null\n",
    ],
)
def test_a_file_that_holds_no_rows_is_refused_and_left_untouched(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(
        TidalError, match=r"rows\.jsonl: expected rows of an earlier run, got a file"
    ):
        RowStore(path, RECORD)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("line", [b"notes", b"[1]", b"7", b'{"key": "k"}', b'{"method": "m"}'])
def test_a_broken_line_between_rows_is_refused_and_left_untouched(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    content = started(path, ROWS[:2]) + line + b"\n" + json.dumps(ROWS[2]).encode() + b"\n"
    path.write_bytes(content)
    with pytest.raises(TidalError, match=r"rows\.jsonl: expected rows of an earlier run"):
        RowStore(path, RECORD)
    assert path.read_bytes() == content


@pytest.mark.parametrize("record", [b"5", b'"text"', b"null", b"[1]"])
def test_a_record_that_is_none_is_refused(tmp_path, record):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"record": ' + record + b"}\n")
    with pytest.raises(TidalError, match=r"rows\.jsonl: expected rows of "):
        RowStore(path, RECORD)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TidalError, match=r"expected a place to write results to"):
        RowStore(tmp_path / "file" / "rows.jsonl", RECORD)
    with pytest.raises(TidalError, match=r"expected rows of an earlier run"):
        RowStore(tmp_path, RECORD)
    store = RowStore(tmp_path / "rows.jsonl", RECORD)
    store.path = tmp_path
    with pytest.raises(TidalError, match=r"expected a file to add rows to"):
        store.append(ROWS)
    assert store.rows == []


def test_without_a_path_rows_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = RowStore(None, RECORD)
    store.append(ROWS)
    store.append(ROWS)
    assert store.rows == ROWS and store.has("k0", "dense") and not store.has("k0", "other")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_run_killed_at_any_byte_ends_as_the_uninterrupted_one(tmp_path, monkeypatch, batch_size):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a slow disk would make this minutes
    methods = [Method("dense", None), Method("tidal 64", TidalConfig(budget=64))]
    task = NeedleTask(LINES, encode, decode, NeedleGrid((500,), (0.0, 1.0), 1, distractors=1))
    whole_path = tmp_path / "whole.jsonl"

    def run(path) -> ReadingEngine:
        engine = ReadingEngine()
        run_task(task, engine, methods, RowStore(path, RECORD), batch_size=batch_size)
        return engine

    run(whole_path)
    whole = whole_path.read_bytes()
    head = whole.index(b"\n") + 1
    assert len(whole.splitlines()) == 1 + 2 * 2
    path = tmp_path / "killed.jsonl"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        if length < head:  # written whole or not at all: never of our making
            with pytest.raises(TidalError, match=r"expected rows of an earlier run"):
                run(path)
            assert path.read_bytes() == whole[:length]
            continue
        engine = run(path)
        assert path.read_bytes() == whole, f"after a kill at byte {length}"
        lost = 4 - whole[:length].count(b"\n") + 1
        assert engine.runs <= lost
        assert not run(path).prefilled
