"""The plugin on FlashAttention, with CUDA graphs: what no CPU can show. The embedded model, fp16.

Batches of another size round otherwise, and a token at the edge of a selection may be in or out: where
two runs part, the token that one took must have been all but as likely in the other. What is dense
altogether must be equal.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm.config", reason="needs vLLM")

from engine_process import BUDGET, CHUNK, ENGINES, Job, Told, serve_all

import tidaldecode
from tidaldecode.demo import MODEL_DIRECTORY
from tidaldecode.eval.needle import Haystack
from tidaldecode.eval.needle_task import NeedleGrid, NeedleTask
from tidaldecode.integrations.transformers.loading import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NEW = 48
TIE = 0.25
"""Nats between two tokens that are all but as likely."""


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(MODEL_DIRECTORY, device="cpu", dtype="float32")[1]


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    """Source code of many lengths; the last two end one token after a chunk."""
    source = Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8")
    ids = tokenizer(source, add_special_tokens=False).input_ids
    lengths = (2000, 40, 3000, 700, 1, 1800, 2 * CHUNK + 1, 3 * CHUNK + 1)
    return [ids[600 * row : 600 * row + length] for row, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def needles(tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts that ask for needles, and the answers."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    source = Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8")
    grid = NeedleGrid((1024, 3072), (0.1, 0.5, 0.9), samples=4)
    haystack = Haystack.from_text(source, encode, tokenizer.decode)
    task = NeedleTask(haystack, encode, tokenizer.decode, grid)
    samples = [task.build(key) for key in task.keys()]
    asked = [[*s.context_ids, *(t for t in s.script if t is not None)] for s in samples]
    return asked, [list(s.answers[0].ids) for s in samples]


@pytest.fixture(scope="module")
def said(prompts, needles) -> dict[str, list[list[Told]]]:
    """What engines say: all to all prompts at once, two to each prompt alone, one to needles."""
    asked, answers = needles
    jobs: dict[str, list[Job]] = {name: [(prompts, NEW)] for name in ENGINES}
    for name in ("eager", "graph"):
        jobs[name] += [([prompt], NEW) for prompt in prompts]
    jobs["graph"].append((asked, max(map(len, answers))))
    return serve_all(jobs)


@pytest.fixture
def told(said):
    """What an engine says to all prompts at once."""
    return lambda name: said[name][0]


def parts_at(one: list[int], other: list[int]) -> int | None:
    """Where two rows part, or None."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((index for index, (a, b) in pairs if a != b), None)


def assert_agree(found: list[Told], expected: list[list[int]]) -> None:
    """Equal rows, but for a few that part where both tokens were all but as likely."""
    parted = []
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        at = parts_at(one.tokens, other)
        if at is None:
            continue
        likely = one.likely[at]
        gap = likely[one.tokens[at]] - likely.get(other[at], float("-inf"))
        parted.append((row, at, round(gap, 4)))
    print("parted (row, token, gap):", parted)
    assert all(gap <= TIE for _, _, gap in parted), parted
    assert len(parted) <= len(expected) // 2, parted


def tokens(told: list[Told]) -> list[list[int]]:
    return [one.tokens for one in told]


def test_the_prompts_can_tell_sparse_from_dense(told):
    sparse, dense = tokens(told("eager")), tokens(told("stock"))
    assert sum(a != b for a, b in zip(sparse, dense, strict=True)) >= 3


@pytest.mark.parametrize("name", ["graph", "compiled"])
def test_graphs_agree_with_eager(told, name):
    assert_agree(told(name), tokens(told("eager")))


def test_a_budget_above_every_context_is_flash_attention_itself(told):
    assert tokens(told("large eager")) == tokens(told("stock"))


def test_a_budget_above_every_context_agrees_in_graphs(told):
    assert_agree(told("large graph"), tokens(told("stock")))


def test_rows_that_select_in_parts_agree(told):
    assert_agree(told("parts"), tokens(told("whole")))


def test_rows_below_min_context_are_dense_beside_sparse_ones(told, prompts):
    short = [row for row, prompt in enumerate(prompts) if len(prompt) + NEW < 1500]
    long = [row for row, prompt in enumerate(prompts) if len(prompt) > 1500]
    mixed, dense, sparse = told("mixed"), told("stock"), told("eager")
    assert_agree([mixed[row] for row in short], tokens([dense[row] for row in short]))
    assert_agree([mixed[row] for row in long], tokens([sparse[row] for row in long]))


@pytest.mark.parametrize("name", ["eager", "graph"])
def test_prompts_alone_agree_with_prompts_in_a_batch(said, told, prompts, name):
    """In the batch prompts arrive in chunks while other rows decode; alone nothing is beside them."""
    alone = [rows[0] for rows in said[name][1 : 1 + len(prompts)]]
    assert_agree(told(name), tokens(alone))


def test_needles_are_found_as_in_transformers(said, needles):
    asked, answers = needles
    longest = max(map(len, answers))
    model, _ = load_model(MODEL_DIRECTORY, device="cuda", dtype="float16")
    expected = []
    with tidaldecode.enable(model, budget=BUDGET, cuda_graph=False):
        for prompt in asked:
            out = model.generate(
                torch.tensor([prompt], device="cuda"),
                max_new_tokens=longest,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            expected.append(out[0, len(prompt) :].tolist())
    found = said["graph"][-1]
    right = [
        sum(told[: len(ids)] == ids for told, ids in zip(side, answers, strict=True))
        for side in (tokens(found), expected)
    ]
    print("needles found, vLLM and transformers:", right, "of", len(answers))
    assert_agree(found, expected)
    assert right[0] == right[1] >= len(answers) // 2
