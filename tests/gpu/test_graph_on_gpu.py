"""What a CPU cannot show: captured graphs, their memory, long offsets, and kernels at real sizes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import tidaldecode
from tidaldecode import TidalConfig
from tidaldecode.demo import MODEL_DIRECTORY
from tidaldecode.errors import ShortOfMemoryError
from tidaldecode.integrations.transformers.decode_step import DecodeStep, dense_plan
from tidaldecode.integrations.transformers.loading import load_model
from tidaldecode.kernels import Selection, dense_decode, dense_select, sparse_decode

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

from runs import SMALL, generate, left_padded, logits_of
from tiny import build, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9},
    "repetition penalty": {"repetition_penalty": 1.2},
}


@pytest.fixture(scope="module")
def embedded():
    return load_model(MODEL_DIRECTORY, device="cuda", dtype="float32")


def run(model, ids, tokens=60, **options):
    torch.manual_seed(3)
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **{**settings, "eos_token_id": None, **options})


def text(tokenizer, tokens: int, skip: int = 0) -> torch.Tensor:
    source = Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8")
    ids = tokenizer(source, add_special_tokens=False, return_tensors="pt").input_ids
    return ids[:, skip : skip + tokens].cuda()


def both(model, ids, **options):
    settings = {key: options.pop(key) for key in list(options) if key in ("budget", "granularity")}
    outputs = []
    for graph in (False, "auto"):
        with tidaldecode.enable(model, cuda_graph=graph, **settings):
            outputs.append(run(model, ids, **options))
    return outputs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("budget", [64, 4096])
def test_a_graph_gives_the_tokens_of_the_eager_path(embedded, way, budget):
    model, tokenizer = embedded
    eager, graphed = both(model, text(tokenizer, 2000), budget=budget, **WAYS[way])
    assert torch.equal(eager, graphed)


def test_padded_rows_agree(embedded):
    model, tokenizer = embedded
    rows = [text(tokenizer, n, 400 * i).cpu() for i, n in enumerate((900, 30, 511))]
    ids, mask = left_padded(rows)
    eager, graphed = both(model, ids.cuda(), budget=48, attention_mask=mask.cuda())
    assert torch.equal(eager, graphed)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3"])
@pytest.mark.parametrize("mode", ["auto", "compiled"])
def test_families_agree_captured_and_compiled(family, mode):
    model = build(family).cuda()
    ids = torch.cat([prompt(40), prompt(40, seed=2)]).cuda()
    outputs = []
    for graph in (False, mode):
        with tidaldecode.enable(model, **SMALL, cuda_graph=graph):
            outputs.append(run(model, ids, tokens=20))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_the_passes_fuse_in_half_precision_decodes_alike(family, rows):
    model = build(family).cuda().bfloat16()
    ids = torch.cat([prompt(24, seed=row) for row in range(rows)]).cuda()
    logits = []
    for graph in (False, "compiled"):
        with tidaldecode.enable(model, budget=64, cuda_graph=graph):
            # The second token is the first that a step decodes.
            logits.append(logits_of(generate(model, ids, 2))[:, 1].float())
    eager, compiled = logits
    assert (compiled - eager).std() < 0.1 * eager.std()


def test_one_graph_serves_every_length_and_a_longer_call_gets_a_larger_one(embedded):
    model, tokenizer = embedded
    prompts = [text(tokenizer, tokens) for tokens in (2000, 100, 1500)]
    with tidaldecode.enable(model, budget=64, cuda_graph=False):
        expected = [run(model, ids) for ids in prompts]
    with tidaldecode.enable(model, budget=64) as handle:
        with handle.steps.borrow(1, 3000) as first:
            pass
        for ids, eager in zip(prompts, expected, strict=True):
            assert torch.equal(run(model, ids), eager)
            with handle.steps.borrow(1, 1) as step:
                assert step is first
        run(model, text(tokenizer, 4000))
        with handle.steps.borrow(1, 1) as larger:
            assert larger.capacity > first.capacity


def test_the_dense_plan_decodes_what_the_host_decodes(embedded):
    model, tokenizer = embedded
    ids = text(tokenizer, 1500)
    expected = run(model, ids, tokens=40)[0, 1500:].tolist()
    with tidaldecode.enable(model, budget=64) as handle:
        step = DecodeStep(model, handle.config, dense_plan(handle.plan), batch=1, capacity=1600)
        step.tokens.copy_(step.prefill(ids).argmax(-1, keepdim=True))
        found = [int(step.tokens)]
        while len(found) < 40:
            step.run()
            found.append(int(step.tokens))
    assert found == expected


def test_too_little_memory_is_an_error_and_the_model_goes_on(embedded):
    model, tokenizer = embedded
    ids = text(tokenizer, 64)
    with tidaldecode.enable(model, budget=32):
        before = run(model, ids)
        with pytest.raises(ShortOfMemoryError, match=r"^memory: expected room for a cache of 1 x"):
            run(model, ids, tokens=1 << 27)
        assert torch.equal(run(model, ids), before)


def test_a_cache_beyond_32_bits_of_elements_is_read_where_it_is():
    tokens = (1 << 31) // (2 * 64) + 4096
    k = torch.zeros(1, 2, tokens, 64, dtype=torch.float16, device="cuda")
    v = torch.zeros_like(k)
    q = torch.ones(1, 2, 64, dtype=torch.float16, device="cuda")
    place = tokens - 2
    k[:, :, place], v[:, :, place] = 4.0, 7.0
    lengths = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    out, _, _ = dense_decode(q, k, v, lengths, scale=1.0)
    torch.testing.assert_close(out, torch.full_like(out, 7.0))
    short = torch.tensor([1 << 20], dtype=torch.int32, device="cuda")
    view = (tensor[:, :, tokens - (1 << 20) :] for tensor in (k, v))
    _, _, chosen = dense_select(q, *view, short, scale=1.0, scores="shared", budget=8)
    assert (1 << 20) - 2 in chosen.positions.tolist()[0][0]
    positions = torch.tensor([[[5, place]]], dtype=torch.int32, device="cuda")
    counts = torch.tensor([[2]], dtype=torch.int32, device="cuda")
    out, _ = sparse_decode(q, k, v, Selection(positions, counts), scale=1.0)
    torch.testing.assert_close(out, torch.full_like(out, 7.0))


def test_a_streaming_plan_is_captured_too(embedded):
    model, tokenizer = embedded
    ids, outputs = text(tokenizer, 700), []
    for graph in (False, "auto"):
        config = TidalConfig.preset("streaming", budget=40).replace(cuda_graph=graph)
        with tidaldecode.enable(model, config):
            outputs.append(run(model, ids))
    assert torch.equal(*outputs)
