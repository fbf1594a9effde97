"""The proof sees a difference where there is one."""

from __future__ import annotations

import functools

import pytest
import torch

from tidaldecode import TidalConfig, TidalError
from tidaldecode.algorithm import chooser
from tidaldecode.algorithm.speculation import Verdict
from tidaldecode.demo import MODEL_DIRECTORY
from tidaldecode.eval.haystack import standard_library_text
from tidaldecode.eval.needle import Haystack
from tidaldecode.integrations.transformers import verify_step
from tidaldecode.integrations.transformers.loading import load_model
from tidaldecode.kernels import dense_decode
from tidaldecode.kernels.partition import other_partition
from tidaldecode.proof.captured import ITSELF, compare_captured
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

    monkeypatch.setattr(chooser, "accept_greedy", keep_all)
    rows = list(compare_batch(model, prompts, [Draft(3, 20, random=True)], config, new_tokens=8))
    [line] = summarise(rows)
    assert line["equal"] == 0 and line["prompts"] == 2
    assert [one["token"] for one in line["differences"]] == [1, 1]
    assert all(one["gap"] > 0 for one in line["differences"])


def keep_all(drafted, choices):
    tokens = torch.cat([drafted, choices[:, -1:]], dim=1)
    return Verdict(tokens, torch.full((len(drafted),), tokens.shape[1]))


@pytest.mark.parametrize("broken", [False, True])
def test_captured_rounds_are_held_against_the_dense_step(trained, broken, monkeypatch):
    model, haystack, encode = trained
    prompts = PromptSet(3, 300, 340).build(haystack, encode)
    drafts = [Draft(3, 32), Draft(2, 20, random=True)]
    if broken:
        monkeypatch.setattr(verify_step, "accept_greedy", keep_all)
    config = TidalConfig.load(MODEL_DIRECTORY)
    batches = [prompts[:2], prompts[2:]]
    found = compare_captured(model, batches, drafts, config, new_tokens=8)
    itself, sparse, random = summarise([row for rows in found for row in rows])
    assert (itself["draft"], itself["equal"]) == (ITSELF, 3)
    assert sparse["tokens_per_verify"] > random["tokens_per_verify"] or broken
    assert random["equal"] == (0 if broken else 3)
    assert random["gaps"] is None or min(random["gaps"]) > 0
    if not broken:
        assert sparse["equal"] == 3


def test_another_partition_rounds_otherwise():
    pytest.importorskip("triton")
    q, k, v = (torch.randn(1, heads, 600, 32) for heads in (4, 2, 2))
    lengths = torch.tensor([600], dtype=torch.int32)
    for backend in ("torch", "triton"):
        call = functools.partial(
            dense_decode, q[:, :, 0], k, v, lengths, scale=0.2, backend=backend
        )
        usual = call()[0]
        with other_partition():
            other = call()[0]
        assert torch.equal(call()[0], usual) and not torch.equal(other, usual)
        torch.testing.assert_close(other, usual, atol=1e-5, rtol=1e-5)


def test_prompts_are_of_both_kinds_and_of_all_lengths(trained):
    _, haystack, encode = trained
    prompts = PromptSet(20, 300, 2000, seed=1).build(haystack, encode)
    lengths = sorted(map(len, prompts))
    assert lengths[0] < 500 and lengths[-1] > 1200 and lengths[-1] <= 2000
    _, tokenizer = load_model(MODEL_DIRECTORY, device="cpu", dtype="float32")
    asks = ["# What is the code of" in tokenizer.decode(prompt[-40:]) for prompt in prompts]
    assert asks == [True, False] * 10
    assert prompts == PromptSet(20, 300, 2000, seed=1).build(haystack, encode)
    assert prompts[7:10] == PromptSet(3, 300, 2000, seed=1, first=7).build(haystack, encode)
    with pytest.raises(TidalError, match="lengths: expected 1 <= shortest <= longest"):
        PromptSet(1, 9, 8).build(haystack, encode)
