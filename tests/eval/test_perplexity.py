"""Loss of decoded text: full attention's is the model's own, and every other method's is compared."""

import math
import statistics

import pytest
import torch
from eval_cases import random_text, tiny_llama

from tidaldecode import TidalConfig, TidalError
from tidaldecode.eval.methods import parse_methods
from tidaldecode.eval.passages import PassageSet
from tidaldecode.eval.perplexity import DRIFT_BINS, PerplexityTask, summarise_perplexity
from tidaldecode.eval.runner import run_task
from tidaldecode.eval.store import RowStore
from tidaldecode.integrations.transformers.engine import TransformersEngine

CONTEXT, NEW = 48, 20
BASE = TidalConfig(budget=12, select_layers=(2, 4), sink_tokens=1, recent_tokens=3)
PASSAGES = PassageSet(random_text(), CONTEXT, NEW, samples=3, seed=2)
TASK = PerplexityTask(PASSAGES)
KEYS = TASK.keys()
METHODS = parse_methods(
    ["dense", "tidal", "tidal:budget=200", "quest:budget=200", "paper:budget=200", "streaming",
     "quest"],
    BASE,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def losses(model, batch_size: int) -> dict[tuple[str, str], list[float]]:
    rows = run_task(
        TASK, TransformersEngine(model), METHODS, RowStore(None, {}), batch_size=batch_size
    )
    assert len(rows) == 3 * len(METHODS)
    assert all(row["step_ms"] > 0 and row["mean_ms"] > 0 for row in rows)
    return {(row["key"], row["method"]): row["nll"] for row in rows}


@pytest.fixture(scope="module")
def nll(model):
    return losses(model, 1)


def test_a_passage_is_a_window_of_the_text_cut_before_the_contexts_last_token():
    text = "".join(map(chr, PASSAGES.text.ids))
    for key in KEYS:
        made = PASSAGES.build(key)
        assert len(made.context_ids) == CONTEXT - 1
        assert len(made.decoded_ids) == NEW + 1
        place = text.index("".join(map(chr, made.context_ids + made.decoded_ids)))
        assert place % 7 == 0  # after a line end
        assert PASSAGES.build(key) == made
    assert len({str(PASSAGES.build(key)) for key in KEYS}) == 3


def test_passages_that_cannot_be_are_refused():
    for changes in ({"context": 1}, {"new_tokens": 0}):
        options = {"context": 8, "new_tokens": 2, "samples": 1, **changes}
        with pytest.raises(
            TidalError, match=r"^context: expected 2 tokens or more and 1 to decode"
        ):
            PassageSet(PASSAGES.text, **options).build("8/0")
    with pytest.raises(TidalError, match=r"^haystack: expected more than 9,008 tokens"):
        PassageSet(PASSAGES.text, 9000, 8, 1).build("9000/0")


def test_full_attentions_loss_is_that_of_one_plain_forward_pass(model, nll):
    for key in KEYS:
        made = PASSAGES.build(key)
        ids = torch.tensor([made.context_ids + made.decoded_ids])
        with torch.no_grad():
            logits = model(ids).logits[0]
        expected = torch.nn.functional.cross_entropy(
            logits[CONTEXT - 1 : -1], ids[0, CONTEXT:], reduction="none"
        )
        assert len(nll[key, "dense"]) == NEW
        assert nll[key, "dense"] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["tidal 200", "quest 200", "paper 200"])
def test_a_budget_of_the_whole_length_loses_nothing(nll, name):
    for key in KEYS:
        assert nll[key, name] == pytest.approx(nll[key, "dense"], abs=5e-5)


@pytest.mark.parametrize("name", ["tidal 12", "streaming 12", "quest 12"])
def test_a_small_budget_shows_in_the_loss_from_the_first_token_on(nll, name):
    for key in KEYS:
        apart = [abs(a - b) for a, b in zip(nll[key, name], nll[key, "dense"], strict=True)]
        assert apart[0] > 1e-3 and statistics.fmean(apart) > 0.01
    assert nll["48/0", "tidal 12"] != nll["48/0", "streaming 12"] != nll["48/0", "quest 12"]


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_batch_measures_the_same(model, nll, batch_size):
    batched = losses(model, batch_size)
    assert batched.keys() == nll.keys()
    for name, values in batched.items():
        assert values == pytest.approx(nll[name], abs=1e-3), name


def rows_of(values: dict[str, dict[str, list[float]]]) -> list[dict]:
    return [
        {"key": key, "method": method, "nll": nll, "step_ms": 2.0, "mean_ms": 3.0}
        for method, samples in values.items()
        for key, nll in samples.items()
    ]


def test_the_summary_has_loss_perplexity_and_the_difference_passage_by_passage():
    methods = parse_methods(["dense", "streaming"], BASE)
    full = {"a": [1.0, 3.0], "b": [5.0, 7.0]}
    other = {"b": [5.5, 7.5], "a": [1.0, 4.0]}  # in another order: passages are matched by name
    dense, streaming = summarise_perplexity(
        rows_of({"dense": full, "streaming 12": other}), methods
    )
    assert dense["nll"]["mean"] == 4.0 and dense["perplexity"] == pytest.approx(math.exp(4))
    assert dense["extra_percent"]["mean"] == 0 and dense["drift_nats"] == [0, 0]
    assert streaming["nll"]["mean"] == 4.5 and streaming["nll"]["n"] == 2
    # 0.5 nats more in each passage, of a mean of 4: no spread, although the passages differ.
    extra = streaming["extra_percent"]
    assert extra["mean"] == extra["low"] == extra["high"] == pytest.approx(12.5)
    assert streaming["drift_nats"] == pytest.approx([0.25, 0.75])


def test_drift_has_equal_bins_that_cover_every_token_once():
    methods = parse_methods(["dense", "streaming"], BASE)
    for length in (1, 5, 8, 20, 128):
        full = {"a": [1.0] * length}
        other = {"a": [1.0 + index for index in range(length)]}
        _, line = summarise_perplexity(rows_of({"dense": full, "streaming 12": other}), methods)
        bins = min(DRIFT_BINS, length)
        assert len(line["drift_nats"]) == bins
        assert line["drift_nats"][0] == statistics.fmean(range(length // bins or 1))
        assert line["drift_nats"][-1] == statistics.fmean(
            range(length - -(-length // bins), length)
        )
        assert line["drift_nats"] == sorted(line["drift_nats"])
        if length % bins == 0:
            assert statistics.fmean(line["drift_nats"]) == pytest.approx((length - 1) / 2)


def test_without_full_attention_there_is_no_difference():
    [line] = summarise_perplexity(
        rows_of({"streaming 12": {"a": [1.0]}}), parse_methods(["streaming"], BASE)
    )
    assert "extra_percent" not in line and "drift_nats" not in line
    assert line["nll"] == {"mean": 1.0, "low": None, "high": None, "n": 1}
