"""A test of the passes over a compiled step: graphs before and after them, and their results."""

from __future__ import annotations

import torch
from runs import SMALL, generate

import tidaldecode
from tidaldecode.integrations.transformers import compiler


def compiled_tokens(monkeypatch, model, ids):
    """Tokens of plain and of compiled decoding, and the graphs before and after the pass."""
    torch._dynamo.reset()
    targets = []

    def backend(graph, _):
        targets.append([node.target for node in graph.graph.nodes])
        compiler.fuse(graph)
        targets.append([node.target for node in graph.graph.nodes])
        return graph.forward

    monkeypatch.setattr(compiler, "COMPILER", {"backend": backend})
    with tidaldecode.enable(model, **SMALL, cuda_graph="compiled"):
        outputs = [
            generate(model, ids, 12, **options).sequences
            for options in ({}, {"custom_generate": tidaldecode.graph_generate})
        ]
    before, after = targets
    return outputs, before, after


def found_and_expected(block, *inputs):
    """Results of a module with and without the passes, and the targets that the passes leave."""
    torch._dynamo.reset()
    targets = []

    def backend(graph, _):
        compiler.fuse(graph)
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        expected = block(*(tensor.clone() for tensor in inputs))
        compiled = torch.compile(block, backend=backend, fullgraph=True)
        found = compiled(*(tensor.clone() for tensor in inputs))
    return (found, expected), targets
