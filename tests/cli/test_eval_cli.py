"""``tidaldecode eval`` as a user meets it: rows, summary and plots; refusals; kill and go on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tidaldecode.cli import run

METHODS = ["--method", "dense", "--method", "tidal", "--method", "streaming"]
PASSAGES = {"--context": 96, "--new-tokens": 10, "--samples": 2, "--batch-size": 2}
TASKS = {
    "needle": {"--context": 512, "--depth": 0.5, "--samples": 1, "--distractors": 2},
    "perplexity": PASSAGES,
    "agreement": PASSAGES,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    lines = (
        f"def step_{n}(value, other={n % 7}):\n    return value + {n * n}\n" for n in range(400)
    )
    path.write_text("".join(lines))
    return path


@pytest.fixture
def evaluate(text):
    """Run one evaluation of ``text``, small unless ``options`` say otherwise."""

    def call(task: str, *options: object) -> int:
        usual = {"--haystack" if task == "needle" else "--text": text, **TASKS[task]}
        added = [part for name in usual if name not in options for part in (name, usual[name])]
        return run(["eval", task, *map(str, [*added, *options])])

    return call


def refused(capsys, code: int) -> str:
    """The one line of complaint of a command that failed."""
    captured = capsys.readouterr()
    assert code == 2, captured
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("tidaldecode: error: ")
    return lines[0].removeprefix("tidaldecode: error: ")


def rows_of(folder, task: str) -> list[dict]:
    head, *rows = map(json.loads, (folder / f"{task}.jsonl").read_text().splitlines())
    assert set(head) == {"record"}
    return rows


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


PLOTS = {
    "needle": {
        "needle-multi-key.png", "needle-multi-key-dense.png", "needle-multi-key-tidal-24.png",
        "needle-multi-key-tidal-48.png", "needle-multi-key-budget.png",
    },
    "perplexity": {"perplexity-budget.png", "perplexity-drift.png"},
    "agreement": {"agreement-equal.png", "agreement-kl.png"},
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_leaves_rows_a_summary_and_plots_with_their_record(
    capsys, evaluate, tmp_path, task
):
    folder, copy = tmp_path / "out", tmp_path / "elsewhere" / "copy.json"
    options = [*METHODS[:4], "--budget", "24", "--budget", "48"]
    assert evaluate(task, *options, "--output-dir", folder, "--json", copy) == 0
    shown = capsys.readouterr().out
    names = ["dense", "tidal 24", "tidal 48"]
    rows = rows_of(folder, task)
    keys = ["multi-key/512/0.5/0"] if task == "needle" else ["96/0", "96/1"]
    asked = [(row["key"], row["method"]) for row in rows]
    assert sorted(asked) == sorted((key, name) for key in keys for name in names)
    result = json.loads((folder / f"{task}.json").read_text())
    assert json.loads(copy.read_text()) == result
    record, summary = result["record"], result["summary"]
    assert record["task"] == task and record["versions"]["torch"] and record["model"]["parameters"]
    assert list(record["methods"]) == names and record["methods"]["dense"] is None
    assert record["methods"]["tidal 24"]["budget"] == 24
    assert json.loads((folder / f"{task}.jsonl").read_text().splitlines()[0])["record"] == record
    assert [line["method"] for line in summary] == names
    longest = 512 if task == "needle" else 96
    assert [line["attended_tokens"] for line in summary] == [longest, 24, 48]
    assert [line["plan"] for line in summary] == ["", "DDSS..S.S...", "DDSS..S.S..."]
    assert all(line["kv_bytes"] <= line["full_bytes"] for line in summary)
    assert PLOTS[task] == {path.name for path in folder.glob("*.png")}
    for path in folder.glob("*.png"):
        assert json.loads(Image.open(path).info["Description"]) == record
    assert {path.name for path in folder.iterdir()} == {
        f"{task}.jsonl", f"{task}.json", *PLOTS[task]
    }  # fmt: skip
    for name in ("dense", "tidal 24", "tidal 48", "tokens"):
        assert name in shown
    assert f"wrote {folder / f'{task}.json'}" in shown


def test_the_summaries_hold_what_the_rows_say(evaluate, tmp_path):
    options = [*METHODS, "--no-plot", "--output-dir", tmp_path]
    for task in TASKS:
        assert evaluate(task, *options) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".jsonl"}
    read = {task: json.loads((tmp_path / f"{task}.json").read_text())["summary"] for task in TASKS}
    dense, tidal, streaming = read["needle"]
    assert dense["exact"]["mean"] == tidal["exact"]["mean"] == 1.0
    assert streaming["exact"]["mean"] == 0.0 and dense["exact"]["low"] < 0.5
    dense, tidal, streaming = read["perplexity"]
    nll = [row["nll"] for row in rows_of(tmp_path, "perplexity") if row["method"] == "dense"]
    assert len(nll) == 2 and {len(values) for values in nll} == {10}
    assert dense["nll"]["mean"] == pytest.approx(sum(map(sum, nll)) / 20)
    assert dense["extra_percent"]["mean"] == 0
    assert len(streaming["drift_nats"]) == 8
    dense, tidal, streaming = read["agreement"]
    assert dense["equal"]["mean"] == 1.0 and dense["kl_nats"]["mean"] == 0.0
    assert 0 <= tidal["equal"]["mean"] <= 1 and streaming["kl_nats"]["mean"] > 0


def test_a_finished_run_is_read_again_and_not_run_again(capsys, evaluate, tmp_path):
    options = [*METHODS, "--no-plot", "--output-dir", tmp_path]
    assert evaluate("agreement", *options) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert evaluate("agreement", *options) == 0
    assert "continuing" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_all_kinds_of_needles_can_be_asked_at_once(evaluate, tmp_path):
    kinds = ["single", "multi-key", "multi-query", "multi-value"]
    options = [part for kind in kinds for part in ("--kind", kind)]
    code = evaluate(
        "needle", *options, "--method", "tidal", "--batch-size", 4, "--no-plot",
        "--output-dir", tmp_path,
    )  # fmt: skip
    assert code == 0
    rows = rows_of(tmp_path, "needle")
    assert [row["kind"] for row in rows] == kinds
    summary = json.loads((tmp_path / "needle.json").read_text())["summary"]
    assert [(line["kind"], line["method"]) for line in summary] == [
        (kind, "tidal 64") for kind in kinds
    ]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("perplexity", ["--context", "15000"], "text: expected more than 15,010 tokens, found"),
        ("needle", ["--context", "16000"], "text: expected more than 16,000 tokens, found"),
        (
            "needle",
            ["--context", "16385"],
            "context: expected at most 16,384 tokens for this model",
        ),
        ("perplexity", ["--context", "16380"], "context: expected at most 16,384 tokens"),
        ("needle", ["--method", "fast"], "method: expected one of dense, tidal"),
        ("perplexity", ["--method", "tidal:bugdet=3"], "option: expected one of budget"),
        (
            "agreement",
            ["--method", "tidal:select_layers=2+99"],
            "select_layers: expected layer num",
        ),
        ("agreement", ["--method", "tidal:select_layers=6"], "plan DD....S.....: expected a sel"),
        ("needle", ["--budget", "5"], "budget: expected at least 20 tokens"),
        ("needle", ["--kind", "double"], "kind: expected one of single, multi-key"),
        ("needle", ["--depth", "1.5"], "depth: expected a number from 0 to 1, got 1.5"),
        ("needle", ["--context", "40"], "context: expected room for 3 needles"),
        ("perplexity", ["--context", "1"], "context: expected 2 tokens or more"),
        ("needle", ["--samples", "0"], "Invalid value for '--samples'"),
        ("agreement", ["--batch-size", "0"], "Invalid value for '--batch-size'"),
        ("perplexity", ["--new-tokens", "0"], "Invalid value for '--new-tokens'"),
        ("needle", ["--haystack", "/no/such/file"], "/no/such/file: expected a readable UTF-8"),
        ("agreement", ["--model", "/no/such/model"], "model: expected a local model directory"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_touches_no_earlier_result(
    capsys, evaluate, tmp_path, task, options, message
):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / f"{task}.jsonl").write_text('{"record": {}}\n{"key": "a", "method": "b"}\n')
    (folder / f"{task}.json").write_text("precious")
    before = contents(folder)
    overwriting = [*options, "--no-plot", "--overwrite", "--output-dir", folder]
    line = refused(capsys, evaluate(task, *overwriting))
    assert line.startswith(message)
    assert contents(folder) == before


def test_another_runs_folder_is_refused_and_left_alone(capsys, evaluate, tmp_path):
    options = ["--method", "streaming", "--no-plot", "--output-dir", tmp_path]
    assert evaluate("agreement", *options) == 0
    before = contents(tmp_path)
    for changes, named in [
        (["--seed", 5], "passages"),
        (["--batch-size", 1], "batch_size"),
        (["--budget", 24], "methods"),
        (["--dtype", "bfloat16"], "model"),
    ]:
        capsys.readouterr()
        line = refused(capsys, evaluate("agreement", *options, *changes))
        assert f"found another run's, which differs in {named};" in line
        assert "pass --overwrite" in line
        assert contents(tmp_path) == before
    assert evaluate("agreement", *options, "--seed", 5, "--overwrite") == 0
    assert contents(tmp_path) != before
    assert len(rows_of(tmp_path, "agreement")) == 2


def test_a_file_that_holds_no_rows_is_refused_and_left_alone(capsys, evaluate, tmp_path):
    (tmp_path / "perplexity.jsonl").write_text("my notes")
    line = refused(capsys, evaluate("perplexity", "--no-plot", "--output-dir", tmp_path))
    assert "perplexity.jsonl: expected rows of an earlier run" in line
    assert contents(tmp_path) == {"perplexity.jsonl": b"my notes"}


def test_a_place_that_cannot_be_written_is_one_line(capsys, evaluate, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = refused(
        capsys, evaluate("agreement", "--no-plot", "--output-dir", tmp_path / "file" / "out")
    )
    assert "expected a place to write results to" in line


def test_a_text_without_line_breaks_is_one_line(capsys, evaluate, tmp_path):
    path = tmp_path / "flat.txt"
    path.write_text("word " * 5000)
    line = refused(
        capsys, evaluate("agreement", "--text", path, "--output-dir", tmp_path / "out", "--no-plot")
    )
    assert line.startswith("haystack: expected a text with line breaks")
    assert not (tmp_path / "out").exists()


def whole_lines(path) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_run_goes_on_and_ends_with_every_row_exactly_once(capsys, text, tmp_path):
    options = [
        "eval", "needle", "--haystack", str(text), "--context", "1024", "--depth", "0.5",
        "--samples", "3", "--distractors", "2", "--method", "dense", "--method", "tidal", "--no-plot",
        "--output-dir", str(tmp_path),
    ]  # fmt: skip
    path = tmp_path / "needle.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", "from tidaldecode.cli import main; main()", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process: it is in the record
    )
    deadline = time.monotonic() + 60
    while whole_lines(path).count(b"\n") < 3 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    first = whole_lines(path)
    assert 3 <= first.count(b"\n") < 7
    assert not (tmp_path / "needle.json").exists()
    with path.open("ab") as file:
        file.write(b'{"key": "multi-key/1024/0.5/2", "method": "de')  # what a kill may tear
    assert run(options) == 0
    assert "continuing" in capsys.readouterr().out
    assert path.read_bytes().startswith(first)
    found = [(row["key"], row["method"]) for row in rows_of(tmp_path, "needle")]
    keys = [f"multi-key/1024/0.5/{number}" for number in range(3)]
    assert len(found) == 6
    assert set(found) == {(key, name) for key in keys for name in ("dense", "tidal 64")}
    summary = json.loads((tmp_path / "needle.json").read_text())["summary"]
    assert [line["exact"]["n"] for line in summary] == [3, 3]


def test_a_text_that_changed_is_another_run(tmp_path, capsys):
    text = tmp_path / "text.txt"
    command = ["eval", "perplexity", "--text", str(text), "--context", "64", "--new-tokens", "2",
               "--samples", "1", "--method", "dense", "--no-plot",
               "--output-dir", str(tmp_path / "out")]  # fmt: skip
    text.write_text("one line of text\n" * 200)
    assert run(command) == 0
    before = (tmp_path / "out" / "perplexity.jsonl").read_bytes()
    text.write_text("another line of text\n" * 200)
    assert run(command) == 2
    assert "differs in text_sha256" in capsys.readouterr().err
    assert (tmp_path / "out" / "perplexity.jsonl").read_bytes() == before
