"""`tidaldecode bench lossless`: both tables, figures that add up, files, and refusals."""

import json

import pytest
import torch

from tidaldecode.bench.lossless import prefill_rows
from tidaldecode.cli import run
from tidaldecode.integrations.transformers import enable
from tidaldecode.integrations.transformers.decode_step import DecodeStep, dense_plan

COMMAND = ["bench", "lossless", "--device", "cpu", "--dtype", "float32", "--repetitions", "1"]


def test_real_text_is_timed_and_compared(tmp_path, capsys):
    file = tmp_path / "l.json"
    options = ["--context", "300", "--batch", "2", "--new-tokens", "10", "--budget", "32"]
    assert run([*COMMAND, *options, "--draft-tokens", "3", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "real acceptance" in shown and "2/2" in shown
    found = json.loads(file.read_text())
    [row] = found["results"]
    assert row["equal"] == 2 and row["differences"] == []
    assert row["plan"] == "DDSS..S.S..." and row["draft_tokens"] == 3
    assert 1 <= row["slowest_tokens_per_verify"] <= row["tokens_per_verify"] + 1e-9 <= 4.1
    assert row["last_speedup"] == pytest.approx(row["full_ms"] / row["last_ms"])
    assert found["record"]["task"] == "bench lossless"


def test_sampled_texts_are_timed_and_not_compared(tmp_path, capsys):
    file = tmp_path / "l.json"
    options = ["--context", "300", "--batch", "2", "--new-tokens", "10", "--budget", "32"]
    drafts = ["--draft-tokens", "3", "--temperature", "0.7"]
    assert run([*COMMAND, *options, *drafts, "--json", str(file)]) == 0
    assert "sampled at 0.7" in capsys.readouterr().out
    found = json.loads(file.read_text())
    [row] = found["results"]
    assert row["temperature"] == found["record"]["temperature"] == 0.7
    assert row["equal"] is None and row["differences"] == []
    assert 0 < row["acceptance"] <= 1


@pytest.mark.parametrize("temperature, same", [(1e-4, True), (50.0, False)])
def test_a_sampled_text_follows_the_processed_logits(temperature, same):
    from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper

    from tidaldecode.bench.decode import random_model
    from tidaldecode.bench.shapes import shape_config
    from tidaldecode.integrations.transformers.processing import Processing
    from tidaldecode.integrations.transformers.step_text import greedy_text, sampled_text

    model = random_model(shape_config("tiny"), torch.device("cpu"), torch.float32)
    processing = Processing(LogitsProcessorList([TemperatureLogitsWarper(temperature)]))
    with enable(model, select_layers=(2,), budget=32) as handle:
        full = dense_plan(handle.plan)
        step = DecodeStep(model, handle.config, full, batch=2, capacity=64)
        newest = step.prefill(torch.randint(512, (2, 40))).argmax(-1, keepdim=True)
        greedy = greedy_text(step, newest, 6)
        step.resume(40)
        assert torch.equal(sampled_text(step, newest, 6, processing), greedy) is same


def test_an_imposed_acceptance_says_so(tmp_path, capsys):
    file = tmp_path / "l.json"
    options = ["--shape", "tiny", "--select-layers", "2", "--context", "200", "--batch", "2"]
    chances = ["--accept", "0.5", "--accept", "1"]
    lengths = ["--draft-tokens", "1", "--draft-tokens", "3"]
    assert run([*COMMAND, *options, *chances, *lengths, "--json", str(file)]) == 0
    assert "Acceptance IMPOSED, not measured" in capsys.readouterr().out
    one, three = json.loads(file.read_text())["results"]
    assert [one["draft_tokens"], three["draft_tokens"]] == [1, 3]
    assert one["imposed"]["0.5"]["tokens_per_round"] == 1.5
    assert three["imposed"]["0.5"]["tokens_per_round"] == 1.875
    assert three["imposed"]["1.0"]["tokens_per_round"] == 4
    speedup = three["full_ms"] * 1.875 / three["round_ms"]
    assert three["imposed"]["0.5"]["speedup"] == pytest.approx(speedup)


@torch.inference_mode()
def test_rows_prefilled_in_pieces_are_those_of_one_prefill(monkeypatch):
    from tidaldecode.bench import lossless
    from tidaldecode.bench.decode import random_model
    from tidaldecode.bench.shapes import shape_config

    monkeypatch.setattr(lossless, "_PREFILLED", 80)
    model = random_model(shape_config("tiny"), torch.device("cpu"), torch.float32)
    prompts = torch.randint(512, (5, 40))
    with enable(model, select_layers=(2,), budget=32) as handle:
        steps = [
            DecodeStep(model, handle.config, dense_plan(handle.plan), batch=5, capacity=64)
            for _ in range(2)
        ]
        first = prefill_rows(steps[0], prompts)
        torch.testing.assert_close(first, steps[1].prefill(prompts))
        for step in steps:
            step.tokens.copy_(first.argmax(-1, keepdim=True))
        for _ in range(4):
            torch.testing.assert_close(steps[0].run(), steps[1].run())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--shape", "tiny", "--model", "x"], "shape: expected --shape or --model, got both"),
        (["--accept", "0.9"], "accept: expected --shape beside it"),
        (["--shape", "tiny", "--draft-tokens", "auto"], "draft-tokens: expected numbers where"),
        (["--shape", "tiny", "--temperature", "1"], "temperature: expected a trained model"),
        (["--draft-tokens", "few"], "draft-tokens: expected auto or a number"),
        (["--shape", "gpt-5"], "shape: expected one of llama-2-7b"),
        (["--context", "16300"], "context: expected at most 16,384 tokens for this model"),
        (["--budget", "3"], "budget: expected at least"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(options, message, capsys):
    assert run([*COMMAND, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith(f"tidaldecode: error: {message}")
