"""The benchmark runs what it says it runs. Its timings are nobody's business here."""

import json

import pytest
import torch

from tidaldecode import Role, TidalConfig, TidalError
from tidaldecode.bench.attention_step import AttentionStep, Shape, main, measure, ratios
from tidaldecode.bench.timing import time_interleaved

SMALL = Shape(layers=6, query_heads=4, kv_heads=2, head_dim=16, context=300)
CONFIG = TidalConfig(budget=64, select_layers=(2, 4))


def test_a_dense_layer_computes_what_the_baseline_computes():
    step = AttentionStep(SMALL, CONFIG)
    dense = step.layer(Role.DENSE)(3)
    torch.testing.assert_close(dense, step.sdpa_layer(3)[:, :, 0], rtol=1e-4, atol=1e-5)


def test_a_sparse_layer_reads_a_real_selection():
    step = AttentionStep(SMALL, CONFIG)
    step.layer(Role.SELECT)(0)
    assert step.state.selection.counts.tolist() == [[64]]
    assert not torch.allclose(step.layer(Role.SPARSE)(1), step.layer(Role.DENSE)(1))


def test_candidates_of_a_round_read_layers_of_their_own(monkeypatch):
    step = AttentionStep(SMALL, CONFIG)
    read = []
    sdpa, attend = step.sdpa_layer, step._attend
    monkeypatch.setattr(step, "sdpa_layer", lambda i: (read.append(i % SMALL.layers), sdpa(i))[1])
    monkeypatch.setattr(step, "_attend", lambda i, plan: (read.append(i), attend(i, plan))[1])
    monkeypatch.setattr(step, "step", lambda plan: None)
    monkeypatch.setattr(step, "sdpa_step", lambda: None)
    measure(step, repetitions=2)
    # The first call is the selection that sparse layers need.
    rounds = [read[first : first + 4] for first in range(1, len(read), 4)]
    assert len(rounds) > 2 and all(len(set(layers)) == 4 for layers in rounds)


def test_every_figure_is_there():
    timings = measure(AttentionStep(SMALL, CONFIG), repetitions=2)
    assert len(timings) == 7
    assert all(timing.low_ms <= timing.median_ms <= timing.high_ms for timing in timings.values())
    assert all(value > 0 for value in ratios(timings).values())


def test_candidates_take_turns():
    calls = []
    time_interleaved(
        {"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))},
        repetitions=2,
        warmup=1,
    )
    assert calls == [(name, index) for index in range(3) for name in "ab"]


def test_a_context_within_the_budget_is_refused():
    with pytest.raises(TidalError, match=r"^context: expected more tokens than the budget"):
        AttentionStep(Shape(context=64), CONFIG)


def test_the_figures_are_written_with_their_record(tmp_path, capsys):
    path = tmp_path / "figures.json"
    main(context=1100, budget=64, batch=1, threads=1, repetitions=1, json=path)
    result = json.loads(path.read_text())
    assert result["record"]["n"] == 1
    assert set(result) == {"record", "timings", "ratios"}
    assert "times faster than SDPA" in capsys.readouterr().out
