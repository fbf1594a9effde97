"""The embedded model is a real test: with the right tokens it answers, without them it cannot."""

import io
import json

import pytest
from PIL import Image
from rich.console import Console

from tidaldecode import TidalConfig, TidalError, enable
from tidaldecode.demo import MODEL_DIRECTORY
from tidaldecode.demo.report import save_results, show_table
from tidaldecode.demo.run import FULL, Demo
from tidaldecode.integrations.transformers.loading import load_model


@pytest.fixture(scope="module")
def loaded():
    return load_model(MODEL_DIRECTORY, device="cpu")


@pytest.fixture(scope="module")
def finished(loaded):
    demo = Demo.prepare(*loaded, context=2048, budgets=[32, 64], samples=1, distractors=8, seed=1)
    counts = []
    rows = demo.run(counts.append)
    assert sum(counts) == len(rows) == demo.questions * len(demo.methods)
    return demo, rows


def test_sparse_attention_finds_what_full_attention_finds(finished):
    demo, rows = finished
    full, *sparse, recent = demo.summarise(rows)
    assert full.method == FULL
    assert full.exact >= full.questions - 1
    assert all(line.exact >= full.exact - 1 for line in sparse)
    assert recent.exact == 0


def test_a_wrong_selection_layer_finds_nothing(loaded):
    demo = Demo.prepare(*loaded, context=2048, budgets=[64], samples=1, distractors=8, seed=1)
    wrong = demo.methods[1].config.replace(select_layers=(2, 10))
    methods = (type(demo.methods[1])("wrong", wrong),)
    rows = type(demo)(**{**vars(demo), "methods": methods}).run(lambda count: None)
    assert len(rows) == 10 and sum(row["exact"] for row in rows) <= 3


def test_the_figures_of_the_table_are_those_of_the_plan(finished):
    demo, rows = finished
    full, small, large, recent = demo.summarise(rows)
    layers, kv_heads, head_dim, context = 12, 2, 32, 2048
    row_bytes = kv_heads * head_dim * 2 * 4
    assert str(demo.plan) == "DDSS..S.S..."
    assert full.kv_bytes == layers * context * row_bytes
    assert small.kv_bytes == (6 * context + 6 * 32) * row_bytes
    assert large.kv_bytes == (6 * context + 6 * 64) * row_bytes
    assert recent.kv_bytes == 12 * 68 * row_bytes
    assert small.kv_ratio == pytest.approx(full.kv_bytes / small.kv_bytes)
    assert [line.attended_tokens for line in (full, small, large, recent)] == [2048, 32, 64, 68]


def test_the_table_fits_a_narrow_terminal(finished):
    demo, rows = finished
    console = Console(width=80, record=True, file=io.StringIO())
    show_table(console, demo, demo.summarise(rows))
    text = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "DDSS..S.S..." in text
    for unit in ("(tokens)", "(MB/step)", "(times)", "(ms/token)"):
        assert unit in text


def test_results_carry_their_record_and_a_heatmap(finished, tmp_path):
    demo, rows = finished
    paths = save_results(tmp_path, demo, rows, demo.summarise(rows), plot=True)
    assert [path.name for path in paths] == ["demo.json", "needle.png"]
    result = json.loads(paths[0].read_text())
    assert result["record"]["seed"] == 1
    assert result["record"]["versions"]["torch"]
    assert result["rows"] == rows
    assert json.loads(Image.open(paths[1]).info["Description"]) == result["record"]
    assert result["record"]["methods"][FULL] is None


@pytest.mark.parametrize("context", [0, 512, 16385])
def test_a_context_that_the_model_does_not_have_is_refused(loaded, context):
    with pytest.raises(TidalError, match=r"^context: expected 1,024 to 16,384 tokens"):
        Demo.prepare(*loaded, context=context, budgets=[64], samples=1, distractors=8, seed=0)


def test_the_plan_beside_the_model_is_used(loaded):
    with enable(loaded[0]) as handle:
        assert handle.config == TidalConfig.load(MODEL_DIRECTORY)
        assert handle.reason.startswith("calibrated")


def test_the_embedded_model_is_small_and_safe():
    names = {path.name for path in MODEL_DIRECTORY.iterdir()}
    assert (MODEL_DIRECTORY / "model.safetensors").stat().st_size <= 16_000_000
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".py")) for name in names)
    assert {"README.md", "training_log.txt", "tidal_config.json"} <= names
