"""The proof sees a difference where there is one."""

from __future__ import annotations

import pytest
import torch

from tidaldecode import TidalConfig, TidalError
from tidaldecode.algorithm.speculation import Verdict
from tidaldecode.demo import MODEL_DIRECTORY
from tidaldecode.eval.haystack import standard_library_text
from tidaldecode.eval.needle import Haystack
from tidaldecode.integrations.transformers import lossless
from tidaldecode.integrations.transformers.loading import load_model
from tidaldecode.proof.equality import Draft, compare_batch, summarise
from tidaldecode.proof.prompts import PromptSet


@pytest.fixture(scope="module")
def trained():
    model, tokenizer = load_model(MODEL_DIRECTORY, device="cpu", dtype="float32")

    def encode(text):
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    text = standard_library_text(40_000)
    return model, Haystack.from_text(text, encode, tokenizer.decode), encode


def test_a_draft_that_is_kept_unseen_is_found(trained, monkeypatch):
    model, haystack, encode = trained
    prompts = PromptSet(2, 300, 400).build(haystack, encode)
    config = TidalConfig.load(MODEL_DIRECTORY)

    def keep_all(drafted, choices):
        tokens = torch.cat([drafted, choices[:, -1:]], dim=1)
        return Verdict(tokens, torch.full((len(drafted),), tokens.shape[1]))

    monkeypatch.setattr(lossless, "accept_greedy", keep_all)
    rows = list(compare_batch(model, prompts, [Draft(3, 20, random=True)], config, new_tokens=8))
    [line] = summarise(rows)
    assert line["equal"] == 0 and line["prompts"] == 2
    assert [one["token"] for one in line["differences"]] == [1, 1]
    assert all(one["gap"] > 0 for one in line["differences"])


def test_prompts_are_of_both_kinds_and_of_all_lengths(trained):
    _, haystack, encode = trained
    prompts = PromptSet(20, 300, 2000, seed=1).build(haystack, encode)
    lengths = sorted(map(len, prompts))
    assert lengths[0] < 500 and lengths[-1] > 1200 and lengths[-1] <= 2000
    _, tokenizer = load_model(MODEL_DIRECTORY, device="cpu", dtype="float32")
    asks = ["# What is the code of" in tokenizer.decode(prompt[-40:]) for prompt in prompts]
    assert asks == [True, False] * 10
    assert prompts == PromptSet(20, 300, 2000, seed=1).build(haystack, encode)
    with pytest.raises(TidalError, match="lengths: expected 1 <= shortest <= longest"):
        PromptSet(1, 9, 8).build(haystack, encode)
