"""`tidaldecode bench` on a tiny shape: figures that add up, files, and refusals."""

import json

import pytest
import torch

from tidaldecode import TidalConfig
from tidaldecode.bench import decode
from tidaldecode.bench.decode import random_model, time_steps
from tidaldecode.bench.shapes import SHAPES, shape_config
from tidaldecode.cli import run

TINY = [
    "bench",
    "decode",
    "--shape",
    "tiny",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--steps",
    "3",
]


@pytest.fixture(scope="module")
def tiny():
    return random_model(shape_config("tiny"), torch.device("cpu"), torch.float32)


def test_it_prints_a_table_and_writes_figures_and_a_plot(tmp_path, capsys):
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    sizes = ["--context", "256", "--context", "128", "--batch", "2", "--budget", "32"]
    assert run([*TINY, *sizes, "--select-layers", "2", *files]) == 0
    shown = capsys.readouterr().out
    assert "One decode step of tiny (float32)" in shown and "speed-up" in shown
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["record"]["task"] == "bench decode"
    assert [(r["context"], r["method"]) for r in found["results"]] == [
        (128, "full"),
        (128, "tidal 32"),
        (256, "full"),
        (256, "tidal 32"),
    ]
    assert [r["plan"] for r in found["results"][:2]] == ["DDDDDD", "DDS..."]
    assert all(r["low_ms"] <= r["milliseconds"] <= r["high_ms"] for r in found["results"])
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_kernels_are_timed_beside_their_peers(tmp_path, capsys):
    sizes = ["--context", "256", "--batch", "2", "--budget", "32", "--repetitions", "3"]
    options = ["--shape", "tiny", "--dtype", "float32", "--device", "cpu"]
    assert run(["bench", "kernels", *options, *sizes, "--json", str(tmp_path / "k.json")]) == 0
    assert "One layer of tiny (float32)" in capsys.readouterr().out
    results = json.loads((tmp_path / "k.json").read_text())["results"]
    names = [
        "plain sum of K and V",
        "torch SDPA",
        "dense_decode",
        "dense_select 32",
        "sparse_decode 32",
    ]
    assert [r["kernel"] for r in results] == names
    cached = 2 * 256 * 2 * 2 * 16 * 4  # rows, tokens, K and V, heads, channels, fp32
    assert [r["kv_bytes"] for r in results] == [cached] * 4 + [cached // 8]


def test_a_budget_beyond_the_context_is_refused(capsys):
    assert run(["bench", "kernels", "--shape", "tiny", "--context", "64", "--budget", "64"]) == 2
    assert "budget: expected fewer tokens than every context" in capsys.readouterr().err


def test_bytes_are_those_of_weights_and_of_what_each_layer_reads(tiny):
    methods = {"full": None, "tidal": TidalConfig(budget=32, select_layers=(2,))}
    full, tidal = time_steps(tiny, methods, sizes=[(128, 3)], steps=3, bandwidth=1e9)
    token = 2 * 2 * 16 * 4  # K and V of two heads of 16 in fp32
    assert full.kv_bytes == 3 * 6 * 128 * token
    assert tidal.kv_bytes == 3 * (3 * 128 + 3 * 32) * token
    assert full.selected_kv_bytes == 0 and tidal.selected_kv_bytes == 3 * 3 * 32 * token
    parameters = sum(p.numel() for p in tiny.parameters())
    assert full.weight_bytes == tidal.weight_bytes == 4 * (parameters - 512 * 64)
    assert full.floor_ms == pytest.approx(1e3 * (full.weight_bytes + full.kv_bytes) / 1e9)


def test_nothing_is_timed_after_a_profile(tiny, monkeypatch):
    methods = {"full": None, "tidal": TidalConfig(budget=20, select_layers=(2,))}
    events, lengths = [], []
    monkeypatch.setattr(decode, "is_profiled", lambda _: True)
    timed = decode.step_times

    def note_times(step, steps):
        events.append("time" if steps == 4 else "warm")
        return timed(step, steps)

    def note_parts(step, milliseconds):
        events.append("profile")
        lengths.append((step.batch, step.length))
        return {"took": milliseconds, "dense": str(step.plan).count("D")}

    monkeypatch.setattr(decode, "step_times", note_times)
    monkeypatch.setattr(decode, "step_parts", note_parts)
    sizes = [(16, 1), (20, 2)]
    results = time_steps(
        tiny, methods, sizes=sizes, steps=4, bandwidth=1e9, on_method=lambda: events.append("told")
    )
    assert events == ["time", "told"] * 4 + ["warm", "profile", "told"] * 4
    assert lengths == [(1, 20), (1, 20), (2, 24), (2, 24)]  # a step is warmed up and run once
    assert [r.parts_ms["took"] for r in results] == [r.milliseconds for r in results]
    assert [r.parts_ms["dense"] for r in results] == [6, 2, 6, 2]


def test_the_model_is_left_as_it_was(tiny):
    time_steps(tiny, {"full": None}, sizes=[(16, 1)], steps=3, bandwidth=1e9)
    assert tiny.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_configuration_of_transformers(name):
    config = shape_config(name)
    assert config.num_attention_heads % config.num_key_value_heads == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--shape", "gpt-5"], "shape: expected one of llama-2-7b, llama-3.1-8b,"),
        (["--dtype", "int4"], "dtype: expected one of"),
        (["--context", "2000000"], "context: expected at most 1,048,576 tokens for this model"),
        (["--select-layers", "a,b"], "select-layers: expected auto or layer numbers"),
        (["--select-layers", "77"], "select_layers: expected layer numbers from 0 to 5"),
        (["--budget", "3"], "budget: expected"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(options, message, capsys):
    assert run([*TINY, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith(f"tidaldecode: error: {message}")


def test_vllm_that_is_not_there_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("tidaldecode.bench.vllm.package_version", lambda _: None)
    assert run(["bench", "vllm"]) == 2
    assert "vllm: expected it to be installed, found none; pip install" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_vllm_without_a_gpu_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("tidaldecode.bench.vllm.package_version", lambda _: "0.26.0")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert run(["bench", "vllm"]) == 2
    assert "device: expected an NVIDIA GPU, found none" in capsys.readouterr().err
