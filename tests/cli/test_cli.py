"""The command line as a user meets it: one clear line for every fault, no traceback, no debris."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tidaldecode.cli import run
from tidaldecode.demo import MODEL_DIRECTORY


def refused(capsys, *arguments: str) -> str:
    """Run a command that must fail; return its one line of complaint."""
    assert run(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("tidaldecode: error: ")
    assert captured.out == ""
    return lines[0].removeprefix("tidaldecode: error: ")


@pytest.fixture
def broken_models(tmp_path):
    """Model directories, each with one thing wrong."""
    config = json.loads((MODEL_DIRECTORY / "config.json").read_text())
    made = {}
    for name in ("empty", "no-json", "truncated", "pickle", "encoder", "no-weights"):
        made[name] = tmp_path / name
        made[name].mkdir()
    (made["no-json"] / "config.json").write_text("{")
    for name in ("truncated", "pickle", "no-weights"):
        for part in ("tokenizer.json", "tokenizer_config.json"):
            (made[name] / part).write_bytes((MODEL_DIRECTORY / part).read_bytes())
        (made[name] / "config.json").write_text(json.dumps(config))
    (made["truncated"] / "model.safetensors").write_bytes(b"\0" * 100)
    # Whole and loadable, were pickles allowed.
    torch.save(
        load_file(MODEL_DIRECTORY / "model.safetensors"), made["pickle"] / "pytorch_model.bin"
    )
    encoder = {"model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2}
    encoder |= {"num_attention_heads": 2, "intermediate_size": 8}
    (made["encoder"] / "config.json").write_text(json.dumps(encoder))
    return made


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "model: expected a config.json"),
        ("no-json", "model: expected a decoder that transformers can load"),
        ("truncated", "model: expected a decoder that transformers can load"),
        ("pickle", "model: expected a decoder that transformers can load"),
        ("encoder", "model: expected a decoder"),
        ("no-weights", "model: expected a decoder that transformers can load"),
    ],
)
def test_a_bad_model_directory_is_one_line(capsys, broken_models, name, message):
    line = refused(capsys, "generate", "--prompt", "x", "--model", str(broken_models[name]))
    assert line.startswith(message)


def test_a_missing_model_directory_is_one_line(capsys, tmp_path):
    line = refused(capsys, "generate", "--prompt", "x", "--model", str(tmp_path / "none"))
    assert line.startswith("model: expected a local model directory")
    assert "model: expected" in refused(capsys, "info", "--model", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "budget: expected a whole number from 1 up, got 0"),
        (["--budget", "-5"], "budget: expected a whole number from 1 up, got -5"),
        (["--budget", "many"], "Invalid value for '--budget'"),
        (["--budget", "10"], "budget: expected at least 20 tokens"),
        (["--select-layers", "2,99"], "select_layers: expected layer numbers from 0 to 11, got 99"),
        (["--select-layers", "one"], "select-layers: expected auto or layer numbers"),
        (["--select-layers", "0,6"], "select_layers: expected layers after the 2 dense ones"),
        (["--select-layers", "6,2"], "select_layers: expected 'auto' or ascending"),
        (["--select-layers", "6"], "plan DD....S.....: expected a selection layer before"),
        (["--granularity", "page"], "granularity: expected 'shared' or 'kv_head' or 'query_head'"),
        (["--preset", "unheard-of"], "preset: expected one of paper, lessismore, streaming"),
        (["--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["--max-new-tokens", "20000"], "prompt: expected at most 16,384 tokens"),
        (["--temperature", "-1"], "Invalid value for '--temperature'"),
        (["--mode", "fast"], "mode: expected 'sparse' or 'lossless', got 'fast'"),
        (
            ["--mode", "lossless", "--draft-tokens", "few"],
            "draft-tokens: expected auto or a number",
        ),
        (["--mode", "lossless", "--draft-tokens", "0"], "draft_tokens: expected 'auto' or a whole"),
        (["--draft-tokens", "4"], "draft_tokens: expected 'auto' where nothing is drafted"),
        (["--correct-every", "0"], "correct_every: expected a whole number from 1 up, got 0"),
        (
            ["--mode", "lossless", "--correct-every", "8"],
            "correct_every: expected None in lossless",
        ),
        (["--no-such-option"], "No such option: --no-such-option"),
        (["--device", "abacus"], "device: expected auto, cpu or cuda, got 'abacus'"),
        (["--dtype", "int3"], "dtype: expected auto or one of float32, bfloat16, float16"),
        (["--prompt-file", "p.txt"], "prompt: expected one of --prompt and --prompt-file"),
    ],
)
def test_a_bad_option_is_one_line(capsys, options, message):
    assert refused(capsys, "generate", "--prompt", "x", *options).startswith(message)


def test_a_bad_prompt_file_is_one_line(capsys, tmp_path):
    missing = refused(capsys, "generate", "--prompt-file", str(tmp_path / "none.txt"))
    assert missing.startswith("prompt-file: expected a readable text file")
    binary = tmp_path / "binary"
    binary.write_bytes(b"ELF\xff\xfe\x00")
    assert "expected UTF-8 text" in refused(capsys, "generate", "--prompt-file", str(binary))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "empty prompt" in refused(capsys, "generate", "--prompt-file", str(empty))
    folder = refused(capsys, "generate", "--prompt-file", str(tmp_path))
    assert folder.startswith("prompt-file: expected a readable text file")


def test_a_prompt_beyond_the_models_context_is_one_line(capsys, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("import os\n" * 20_000)
    line = refused(capsys, "generate", "--prompt-file", str(path))
    assert line.startswith("prompt: expected at most 16,384 tokens (the model's context)")


def test_an_unknown_command_is_one_line(capsys):
    assert refused(capsys, "frobnicate").startswith("No such command 'frobnicate'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "100000"], "context: expected 1,024 to 16,384 tokens"),
        (["--budget", "5"], "budget: expected at least 20 tokens"),
        (["--samples", "0"], "Invalid value for '--samples'"),
    ],
)
def test_a_bad_demo_option_leaves_nothing_behind(capsys, tmp_path, options, message):
    line = refused(capsys, "demo", "--output-dir", str(tmp_path / "out"), *options)
    assert line.startswith(message)
    assert not list(tmp_path.rglob("*.*"))


def test_a_place_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = refused(capsys, "demo", "--output-dir", str(tmp_path / "file" / "out"))
    assert line.startswith("output-dir: expected a folder to write to")


def test_earlier_results_are_not_overwritten(capsys, tmp_path):
    (tmp_path / "demo.json").write_text("precious")
    line = refused(capsys, "demo", "--output-dir", str(tmp_path))
    assert "demo.json; pass --overwrite" in line
    assert (tmp_path / "demo.json").read_text() == "precious"


def test_generate_streams_the_answer_of_the_embedded_model(capsys, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(
        "# The code of amber falcon is 1234567.\n"
        + "import os\nimport sys\n" * 40
        + "# What is the code of amber falcon? "
    )
    code = run(
        ["generate", "--prompt-file", str(prompt), "--max-new-tokens", "7", "--budget", "32",
         "--compare"]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0
    assert captured.out.strip() == "1234567"
    assert "texts: equal, all 7 tokens" in captured.err
    assert "tokens/s" in captured.err


def test_compare_shows_where_the_texts_part(capsys):
    prompt = "# The code of amber falcon is 1234567.\n" + "import os\nimport sys\n" * 40
    prompt += "# What is the code of amber falcon? "
    code = run(
        ["generate", "--prompt", prompt, "--max-new-tokens", "7", "--preset", "streaming",
         "--budget", "24", "--compare"]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0
    assert "texts: part at token" in captured.err
    # The first token comes from the dense prefill, so the texts part later.
    assert "full : '234567'" in captured.err


def test_lossless_text_is_full_attentions_and_its_statistics_are_shown(capsys):
    prompt = "def f(x):\n"
    options = ["--budget", "20", "--max-new-tokens", "24", "--compare"]
    command = ["generate", "--prompt", prompt, *options]
    assert run([*command, "--mode", "lossless", "--draft-tokens", "3"]) == 0
    err = capsys.readouterr().err
    assert "texts: equal, all 24 tokens" in err
    assert re.search(r"lossless: \d+ tokens drafted, \d+ kept \(.* tokens per verification", err)
    assert run([*command, "--correct-every", "4"]) == 0
    assert "lossless" not in capsys.readouterr().err


def test_prove_compares_with_full_attention(capsys, tmp_path):
    file = tmp_path / "proof.json"
    small = ["--prompts", "3", "--shortest", "300", "--longest", "400", "--new-tokens", "6"]
    drafts = ["--draft", "2:32", "--draft", "2:20:random"]
    assert run(["prove", *small, *drafts, "--batch-size", "2", "--json", str(file)]) == 0
    assert "3/3" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert [line["draft"] for line in result["summary"]] == ["k=2 N=32", "k=2 N=20 random"]
    assert all(line["equal"] == line["prompts"] == 3 for line in result["summary"])
    assert result["record"]["n"] == 3 and result["record"]["commit"]


def test_prove_can_be_stopped_and_taken_up_again(capsys, tmp_path, monkeypatch):
    from tidaldecode.proof import captured

    file = tmp_path / "proof.json"
    small = ["--prompts", "3", "--shortest", "300", "--longest", "320", "--new-tokens", "5"]
    command = ["prove", *small, "--draft", "2:32", "--batch-size", "1", "--captured"]
    command += ["--json", str(file)]
    compare, done = captured.CapturedProof.compare, []

    def interrupted(self, prompts, count):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(prompts)
        return compare(self, prompts, count)

    monkeypatch.setattr(captured.CapturedProof, "compare", interrupted)
    assert run(command) == 130
    assert json.loads(file.read_text())["batches"] == 2
    done.clear()
    assert run([*command, "--resume"]) == 0
    assert len(done) == 1 and "3/3" in capsys.readouterr().out
    result = json.loads(file.read_text())
    names = [captured.ITSELF, "k=2 N=32"]
    assert [line["draft"] for line in result["summary"]] == names
    assert [line["prompts"] for line in result["summary"]] == [3, 3]
    assert run([*command, "--first", "3", "--resume"]) == 2
    assert "expected results of the same run, found another prompts" in capsys.readouterr().err
    assert refused(capsys, *command[:-2], "--resume").startswith("resume: expected --json FILE")


@pytest.mark.parametrize("draft", ["4", "4:x", "few:64", "4:64:wild", ":64"])
def test_a_bad_draft_is_one_line(capsys, draft):
    assert refused(capsys, "prove", "--draft", draft).startswith("draft: expected TOKENS:BUDGET")


def test_info_names_versions_and_the_plan_with_its_reason(capsys):
    assert run(["info", "--model", str(MODEL_DIRECTORY)]) == 0
    out = capsys.readouterr().out
    assert "transformers" in out
    assert "DDSS..S.S..." in out
    assert "calibrated" in out


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupted_demo_ends_with_130_and_writes_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", "from tidaldecode.cli import main; main()", "demo",
         "--output-dir", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore the signal, and so would the tests' children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "interrupted; nothing was left half-written" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "out").iterdir())
