"""Captured lossless rounds on a GPU: full attention's tokens, one look of the host a round, no leaks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers.generation import (
    EpsilonLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import tidaldecode
from tidaldecode import graph_generate
from tidaldecode.algorithm.chooser import Chooser
from tidaldecode.algorithm.parting import differences
from tidaldecode.algorithm.speculation import PlaceNoise
from tidaldecode.demo import MODEL_DIRECTORY
from tidaldecode.integrations.transformers.captured_rounds import CapturedRounds, Round
from tidaldecode.integrations.transformers.decode_step import DecodeStep, dense_plan
from tidaldecode.integrations.transformers.loading import load_model
from tidaldecode.integrations.transformers.lossless_graph import RoundLoop, plain_rows
from tidaldecode.integrations.transformers.processing import Processing
from tidaldecode.integrations.transformers.round_choice import RoundChoice
from tidaldecode.integrations.transformers.step_text import watched_text
from tidaldecode.kernels import append_token, dense_decode
from tidaldecode.proof.rounds import RandomRounds

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

from lossless_runs import LOSSLESS
from runs import left_padded
from tiny import build, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
OPTIONS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def embedded():
    return load_model(MODEL_DIRECTORY, device="cuda", dtype="float32")


def text(tokenizer, tokens: int, skip: int = 0) -> torch.Tensor:
    source = Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8")
    ids = tokenizer(source, add_special_tokens=False, return_tensors="pt").input_ids
    return ids[:, skip : skip + tokens]


def mixed(tokenizer):
    rows = [text(tokenizer, n, 400 * i) for i, n in enumerate((900, 130, 511))]
    ids, mask = left_padded(rows)
    return ids.cuda(), mask.cuda()


@pytest.mark.parametrize(("budget", "k"), [(20, 4), (64, 1), (64, 8), (64, "auto"), (4096, 4)])
def test_mixed_lengths_get_full_attentions_tokens(embedded, budget, k):
    model, tokenizer = embedded
    ids, mask = mixed(tokenizer)
    options = {"attention_mask": mask, "max_new_tokens": 40, **OPTIONS}
    expected = model.generate(ids, **options)
    with tidaldecode.enable(model, mode="lossless", budget=budget, draft_tokens=k) as handle:
        for _ in range(2):
            assert torch.equal(model.generate(ids, **options), expected)
        with handle.rounds.borrow(3, 1) as steps:
            assert isinstance(steps, CapturedRounds)
        assert (handle.stats().drafted > 0) == (budget < 900)
    assert torch.equal(model.generate(ids, **options), expected)


def test_random_drafts_change_nothing(embedded):
    model, tokenizer = embedded
    ids, mask = mixed(tokenizer)
    options = {"attention_mask": mask, "max_new_tokens": 30, **OPTIONS}
    expected = model.generate(ids, **options)
    with tidaldecode.enable(model, mode="lossless", budget=64, draft_tokens=3) as handle:
        handle.captured_rounds = RandomRounds
        assert torch.equal(model.generate(ids, **options), expected)
        assert handle.stats().acceptance < 0.1


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_compiled_rounds_agree(family):
    model = build(family).cuda()
    ids = torch.cat([prompt(40), prompt(40, seed=2)]).cuda()
    expected = model.generate(ids, max_new_tokens=20, **OPTIONS)
    with tidaldecode.enable(model, **LOSSLESS, draft_tokens=3, cuda_graph="compiled"):
        found = model.generate(ids, max_new_tokens=20, **OPTIONS)
    assert torch.equal(found, expected)


def test_processors_with_history_take_the_eager_loop(embedded):
    model, tokenizer = embedded
    ids = text(tokenizer, 300).cuda()
    options = {**OPTIONS, "max_new_tokens": 12, "repetition_penalty": 1.2}
    expected = model.generate(ids, **options)
    with tidaldecode.enable(model, mode="lossless", budget=64, draft_tokens=3) as handle:
        assert torch.equal(model.generate(ids, **options), expected)
        torch.manual_seed(1)
        sampled = model.generate(ids, **{**options, "do_sample": True})
        assert sampled.shape == (1, 312) and not handle.rounds.clear()


@pytest.mark.parametrize("selection", ["round", "token"])
@pytest.mark.parametrize("k", [1, 4])
def test_sampled_rounds_give_the_eager_loops_text(embedded, k, selection):
    model, tokenizer = embedded
    ids, mask = mixed(tokenizer)
    options = {**OPTIONS, "attention_mask": mask, "max_new_tokens": 40, "do_sample": True}
    options |= {"temperature": 0.9, "top_k": 50, "top_p": 0.95}
    settings = {"mode": "lossless", "budget": 64, "draft_tokens": k, "draft_selection": selection}
    texts, states = [], []
    for graph in (False, "auto", "auto"):
        with tidaldecode.enable(model, **settings, cuda_graph=graph) as handle:
            torch.manual_seed(7)
            texts.append(model.generate(ids, **options))
            states.append(torch.get_rng_state())
            assert 0 < handle.stats().accepted < handle.stats().drafted
            assert handle.rounds.clear() == (graph == "auto")
    assert torch.equal(texts[1], texts[0]) and torch.equal(texts[2], texts[1])
    assert torch.equal(states[1], states[0])


def test_greedy_and_sampled_calls_share_the_steps(embedded):
    model, tokenizer = embedded
    ids, mask = mixed(tokenizer)
    greedy = {**OPTIONS, "attention_mask": mask, "max_new_tokens": 20}
    expected = model.generate(ids, **greedy)
    sampled = []
    with tidaldecode.enable(model, mode="lossless", budget=64, draft_tokens="auto"):
        for _ in range(2):
            assert torch.equal(model.generate(ids, **greedy), expected)
            sampled.append(model.generate(ids, **{**greedy, "do_sample": True}))
    assert all(each.shape == expected.shape for each in sampled)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_round_asks_nothing_of_the_host_until_it_is_read(embedded, sampled):
    model, tokenizer = embedded
    ids, mask = mixed(tokenizer)
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(50), TopPLogitsWarper(0.9)]
    warpers += [MinPLogitsWarper(0.01), TypicalLogitsWarper(0.95), EpsilonLogitsWarper(1e-4)]
    with tidaldecode.enable(model, mode="lossless", budget=64, draft_tokens=4) as handle:
        rounds = CapturedRounds(model, handle.config, handle.plan, batch=3, capacity=1024)
        newest = rounds.prefill(ids, mask).argmax(-1, keepdim=True)
        choice = None
        if sampled:
            chooser = Chooser(PlaceNoise(3, model.device), 60)
            processing = Processing(LogitsProcessorList(warpers))
            choice = RoundChoice(chooser, processing, rounds.ends, 900)
        rounds.begin(newest, 901, 960, choice)
        rounds.prepare(4)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            launched = [rounds.launch(4) for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts = [done.read()[1] for done in launched]
        assert all(1 <= count <= 5 for row in counts for count in row)
        assert all(min(done.seconds()) > 0 for done in launched)
        assert isinstance(launched[0], Round)


def test_bf16_parts_from_the_dense_step_no_more_than_ties_do():
    model, tokenizer = load_model(MODEL_DIRECTORY, device="cuda", dtype="bfloat16")
    ids = torch.cat([text(tokenizer, 1500, 900 * row) for row in range(8)]).cuda()
    with tidaldecode.enable(model, mode="lossless", budget=64, draft_tokens=4) as handle:
        sizes = {"batch": 8, "capacity": 1700}
        dense = DecodeStep(model, handle.config, dense_plan(handle.plan), **sizes)
        first = dense.prefill(ids)
        wanted, gaps = watched_text(dense, first, 32)
        rounds = CapturedRounds(model, handle.config, handle.plan, **sizes)
        rounds.draft.use_cache(dense.cache)
        rounds.draft.resume(1500)
        rows = plain_rows(ids, 1532)
        for _ in RoundLoop(rows, rounds).run(first.argmax(-1, keepdim=True)):
            pass
        parted = differences(wanted, rows.sequences()[:, 1500:], gaps)
    # Units in the last place of bf16 logits of 16 to 32 are 1/8.
    assert len(parted) <= 4 and all(one["gap"] <= 0.5 for one in parted)


def test_loop_named_by_the_user(embedded):
    model, tokenizer = embedded
    ids = text(tokenizer, 200).cuda()
    expected = model.generate(ids, max_new_tokens=9, **OPTIONS)
    with tidaldecode.enable(model, mode="lossless", budget=64, draft_tokens=2):
        found = model.generate(ids, max_new_tokens=9, custom_generate=graph_generate, **OPTIONS)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "group", "head_dim"), [(2, 4, 32), (8, 4, 128), (32, 1, 128), (1, 16, 256)]
)
def test_several_queries_equal_one_at_a_time_at_real_sizes(dtype, heads, group, head_dim):
    tokens, count = 5000, 9
    q = torch.randn(2, heads * group, count, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(2, heads, tokens, head_dim, device="cuda", dtype=dtype) for _ in "kv")
    lengths = torch.tensor([tokens, 3001], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 77], dtype=torch.int32, device="cuda")
    scale = head_dim**-0.5
    out, lse, _ = dense_decode(q, k, v, lengths, scale=scale, starts=starts)
    for index in range(count):
        shorter = lengths - (count - 1 - index)
        alone, alone_lse, _ = dense_decode(q[:, index], k, v, shorter, scale=scale, starts=starts)
        unit = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(out[:, index], alone, atol=max(unit, 1e-5), rtol=max(unit, 1e-5))
        torch.testing.assert_close(lse[:, index], alone_lse, atol=1e-4, rtol=1e-5)


def test_several_tokens_are_appended():
    cache = torch.zeros(2, 3, 2, 64, 32, device="cuda")
    new = torch.randn(2, 3, 4, 2, 32, device="cuda")
    lengths = torch.tensor([4, 30, 64], dtype=torch.int32, device="cuda")
    append_token(cache[0], cache[1], new[0], new[1], lengths)
    for row, end in enumerate(lengths.tolist()):
        assert torch.equal(cache[:, row, :, end - 4 : end], new[:, row].transpose(1, 2))
    assert int(cache.count_nonzero()) == int(new.count_nonzero())
