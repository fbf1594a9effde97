"""Agreement: the same tokens are fed to all, and only what the method itself changes is counted."""

import pytest
import torch
from eval_cases import random_text, tiny_llama

from tidaldecode import TidalConfig, enable
from tidaldecode.eval.agreement import AgreementTask, kl_nats, summarise_agreement
from tidaldecode.eval.methods import parse_methods
from tidaldecode.eval.passages import PassageSet
from tidaldecode.eval.runner import run_task
from tidaldecode.eval.store import RowStore
from tidaldecode.integrations.transformers.engine import TransformersEngine

CONTEXT, NEW = 40, 14
BASE = TidalConfig(budget=10, select_layers=(2, 4), sink_tokens=1, recent_tokens=3)
PASSAGES = PassageSet(random_text(), CONTEXT, NEW, samples=3, seed=2)
TASK = AgreementTask(PASSAGES)
KEYS = TASK.keys()
METHODS = parse_methods(
    ["dense", "tidal:budget=200", "quest:budget=200", "tidal", "streaming"], BASE
)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def measured(model, methods=METHODS, batch_size: int = 1) -> dict[tuple[str, str], dict]:
    rows = run_task(
        TASK, TransformersEngine(model), methods, RowStore(None, {}), batch_size=batch_size
    )
    assert len(rows) == 3 * len(methods)
    assert all(len(row["equal"]) == len(row["kl"]) == NEW for row in rows)
    return {(row["key"], row["method"]): row for row in rows}


@pytest.fixture(scope="module")
def rows(model):
    return measured(model)


@pytest.mark.parametrize("name", ["dense", "tidal 200", "quest 200"])
def test_what_attends_to_everything_agrees_everywhere(rows, name):
    for key in KEYS:
        assert rows[key, name]["equal"] == [1] * NEW
        assert rows[key, name]["kl"] == pytest.approx([0.0] * NEW, abs=1e-5)


@pytest.mark.parametrize("name", ["tidal 10", "streaming 10"])
def test_what_attends_to_little_differs(rows, name):
    values = [rows[key, name] for key in KEYS]
    assert all(min(row["kl"]) >= 0 and max(row["kl"]) > 0.01 for row in values)
    assert 0 < sum(sum(row["equal"]) for row in values) < 3 * NEW


def test_every_step_compares_with_full_attention_after_its_own_greedy_tokens(model, rows):
    made = PASSAGES.build("40/0")
    prompt = torch.tensor([[*made.context_ids, made.decoded_ids[0]]])
    with torch.no_grad():
        greedy = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )[0]
        full = model(greedy[None]).logits[0, CONTEXT - 1 : -1]
        cache = model(torch.tensor([made.context_ids])).past_key_values
        streaming = METHODS[-1]
        with enable(model, streaming.config):
            other = torch.cat(
                [
                    model(token[None, None], past_key_values=cache).logits[0]
                    for token in greedy[CONTEXT - 1 : -1]
                ]
            )
    row = rows["40/0", streaming.name]
    assert row["equal"] == (full.argmax(-1) == other.argmax(-1)).int().tolist()
    assert row["kl"] == pytest.approx(kl_nats(full, other), abs=1e-3)


def test_a_batch_measures_the_same(model, rows):
    for name, row in measured(model, batch_size=3).items():
        assert row["equal"] == rows[name]["equal"], name
        assert row["kl"] == pytest.approx(rows[name]["kl"], abs=1e-3), name


def test_full_attention_need_not_be_among_the_methods(model, rows):
    alone = measured(model, METHODS[-1:])
    for key in KEYS:
        name = METHODS[-1].name
        assert alone[key, name]["equal"] == rows[key, name]["equal"]
        assert alone[key, name]["kl"] == pytest.approx(rows[key, name]["kl"], abs=1e-5)


def test_the_divergence_is_from_full_attention_in_nats_and_never_negative():
    full = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
    other = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    assert kl_nats(full, other + 3) == pytest.approx([0.368064, 0.0], abs=1e-5)
    assert kl_nats(other, full + 3) == pytest.approx([0.510826, 0.0], abs=1e-5)
    near = torch.randn(64, 96)
    assert min(kl_nats(near, near + 1e-7 * torch.randn(64, 96))) >= 0


def test_the_summary_averages_over_passages_and_by_position():
    method = parse_methods(["streaming"], BASE)
    rows = [
        {"key": "a", "method": "streaming 10", "equal": [1, 0, 1], "kl": [0.0, 3.0, 0.0]},
        {"key": "b", "method": "streaming 10", "equal": [1, 0, 0], "kl": [0.0, 1.0, 2.0]},
        {"key": "b", "method": "other", "equal": [0, 0, 0], "kl": [9.0, 9.0, 9.0]},
    ]
    [line] = summarise_agreement(rows, method)
    assert line["equal"]["mean"] == pytest.approx(0.5) and line["equal"]["n"] == 2
    assert line["kl_nats"]["mean"] == line["kl_nats"]["low"] == pytest.approx(1.0)
    assert line["equal_by_position"] == [1.0, 0.0, 0.5]
    assert line["kl_by_position"] == [0.0, 2.0, 1.0]
