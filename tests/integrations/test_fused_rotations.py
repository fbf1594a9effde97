"""The rotation in a compiled step: attention's own where a model has exactly that form."""

from __future__ import annotations

import operator

import pytest
import torch
from passes import compiled_tokens
from runs import SMALL, generate
from tiny import build, prompt

import tidaldecode
from tidaldecode import TidalConfig
from tidaldecode.algorithm import LayerPlan, Role
from tidaldecode.integrations.transformers import compiler
from tidaldecode.integrations.transformers.static_cache import FixedCache
from tidaldecode.integrations.transformers.step_layers import (
    STEP_ATTENTION,
    StepLayers,
    step_attention,
)

# Layers that are left as they are: of another form, and one in four of SmolLM3 has no rotation.
LEFT = {"Llama": 0, "Qwen3": 0, "Gemma3": 0, "SmolLM3": 0, "Glm4": 8, "GPTNeoX": 8}


@pytest.mark.parametrize("family", LEFT)
def test_attention_rotates_and_gives_the_same_tokens(family, monkeypatch):
    model = build(family).half()
    ids = torch.cat([prompt(24, seed=row) for row in range(2)])
    (plain, fused), before, after = compiled_tokens(monkeypatch, model, ids)
    # A bias is added after rounding: in half precision later tokens may differ.
    same = 30 if family == "GPTNeoX" else None
    assert torch.equal(plain[:, :same], fused[:, :same])
    layers = model.config.num_hidden_layers
    rotating = layers - layers // 4 if family == "SmolLM3" else layers
    assert before.count(STEP_ATTENTION) == after.count(STEP_ATTENTION) == layers
    negations = before.count(operator.neg)
    assert negations == 2 * rotating
    assert after.count(operator.neg) == 2 * LEFT[family]


def test_several_tokens_of_a_row_are_rotated_too(monkeypatch):
    torch._dynamo.reset()
    model, left = build("Qwen3").half(), []

    def backend(graph, _):
        compiler.fuse(graph)
        left.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    monkeypatch.setattr(compiler, "COMPILER", {"backend": backend})
    ids, length = prompt(24), 12
    plain = generate(model, ids, length).sequences
    settings = {**SMALL, "mode": "lossless", "draft_tokens": 3, "cuda_graph": "compiled"}
    with tidaldecode.enable(model, **settings):
        options = {"output_logits": False, "custom_generate": tidaldecode.graph_generate}
        found = generate(model, ids, length, **options).sequences
    assert torch.equal(plain, found)
    assert left.count(STEP_ATTENTION) >= 2 * model.config.num_hidden_layers
    assert operator.neg not in left and torch.rsqrt not in left


BATCH, HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 2, 4, 2, 16, 6


class Block(torch.nn.Module):
    """Attention after a rotation, and head norms, of transformers' form, or nearly."""

    def __init__(self, variant):
        super().__init__()
        self.variant = variant
        self.gains = torch.nn.ParameterList(torch.rand(HEAD_DIM) + 0.5 for _ in "qk")

    def forward(self, q, k, v, cos, sin):
        variant, several = self.variant, q.shape[1] > 1
        if variant == "one row's angles":
            cos, sin = cos[:1], sin[:1]
        if "norm" in variant:
            q = self.norm(q, self.gains[0], 1e-3)
            if variant != "norm of queries only":
                k = self.norm(k, self.gains[1], 1e-2 if variant == "norms unalike" else 1e-3)
        q, k, v = (states.transpose(1, 2) for states in (q, k, v))
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        turned_q = self.rotate(q, cos, sin)
        if variant == "states changed in place":
            q.mul_(2)
        if variant == "cosine changed in place":
            cos.mul_(0.5)
        turned_k = k if variant == "queries only" else self.rotate(k, cos, sin)
        if variant == "other angles of keys":
            turned_k = self.rotate(k, cos * 1, sin)
        if variant == "rounded to fp32 between":
            turned_q = turned_q.to(torch.float32).to(turned_q.dtype)
        given = (turned_q, turned_k, v)
        if several:
            given = (states.transpose(1, 2) for states in given)
        elif variant == "last token":
            given = (states[:, :, -1] for states in given)
        else:
            given = (states[:, :, 0] for states in given)
        out = step_attention(*given, 0, None, 0.5)
        return out + turned_q.sum() if variant == "read elsewhere" else out

    def norm(self, x, gain, eps):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return gain * wide.to(x.dtype)

    def rotate(self, x, cos, sin):
        half = 4 if self.variant == "quarters" else x.shape[-1] // 2
        lower, upper = x[..., :half], x[..., half:]
        turned = torch.cat((-upper, lower), dim=-1)
        if self.variant == "turned the other way":
            turned = torch.cat((upper, -lower), dim=-1)
        if self.variant == "interleaved":
            turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        if self.variant == "difference":
            return (x * cos) - (turned * sin)
        return (x * cos) + (turned * sin)


ROTATED = {
    "as in a Llama": False,
    "normed heads": True,
    "norm of queries only": False,
    "norms unalike": False,
    "read elsewhere": False,
}
LEFT_ALONE = [
    "quarters", "turned the other way", "interleaved", "difference", "queries only",
    "one row's angles", "states changed in place", "cosine changed in place",
    "other angles of keys", "rounded to fp32 between", "last token",
]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("variant", [*ROTATED, *LEFT_ALONE])
def test_only_the_exact_form_is_taken(variant, tokens):
    if variant == "last token" and tokens > 1:
        pytest.skip("one of several is not what attention takes")
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        compiler.fuse(graph)
        graphs.append(graph.graph)
        return graph.forward

    inputs = [torch.randn(BATCH, tokens, heads, HEAD_DIM).half() for heads in (HEADS, 2, 2)]
    inputs += [torch.randn(BATCH, tokens, HEAD_DIM).half() for _ in "cs"]
    block = Block(variant).half()
    expected = attend(block, inputs)
    found = attend(torch.compile(block, backend=backend, fullgraph=True), inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    (call,) = (node for node in graphs[0].nodes if node.target is STEP_ATTENTION)
    assert (len(call.args) > 6) == (variant in ROTATED)
    assert (len(call.args) > 8 and call.args[8] is not None) == ROTATED.get(variant, False)


@torch.no_grad()
def attend(call, inputs):
    """What a layer returns, and the keys and values that it has cached."""
    cache = FixedCache(1, CAPACITY)
    empty = torch.zeros(BATCH, KV_HEADS, CAPACITY, HEAD_DIM).half()
    cache.layers[0].lazy_initialization(empty, empty)
    ends = torch.tensor([CAPACITY, 3], dtype=torch.int32)
    starts = torch.zeros(BATCH, dtype=torch.int32)
    layers = StepLayers(TidalConfig(), LayerPlan((Role.DENSE,)), cache, ends, starts)
    with layers.running():
        out = call(*(tensor.clone() for tensor in inputs))
    return out, cache.layers[0].keys, cache.layers[0].values


def test_full_precision_is_left_to_the_compiler(monkeypatch):
    (plain, fused), before, after = compiled_tokens(monkeypatch, build("Llama"), prompt(24))
    assert torch.equal(plain, fused) and before.count(operator.neg) == after.count(operator.neg)
