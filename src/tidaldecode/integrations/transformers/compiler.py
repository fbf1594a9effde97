"""How torch.compile builds a decode step: our products of weights, everything else fused by it.

A step of few rows is bound by reading weights. Products that share their input (query, key and value;
gate and up) become one `tidaldecode.kernels.linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tidaldecode.kernels import linear
from tidaldecode.kernels.linear import MAX_ROWS, MAX_WEIGHTS

_OPTIONS = {"coordinate_descent_tuning": True}
"""Of torch.compile's own kernels: search their tiles longer."""


@torch.library.custom_op("tidaldecode::linear", mutates_args=())
def step_linear(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """`tidaldecode.kernels.linear` of ``x [..., K]``, opaque to the compiler; returns ``[..., N]``."""
    return linear(x.reshape(-1, x.shape[-1]), weights).view(*x.shape[:-1], -1)


@step_linear.register_fake
def _side_by_side(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in weights))


_STEP_LINEAR = torch.ops.tidaldecode.linear.default


def compile_step(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend of torch.compile: its own, on a graph whose products are ours."""
    merge_products(graph)
    compiled: Callable[..., Any] = torch._inductor.compile(graph, inputs, options=_OPTIONS)
    return compiled


COMPILER: dict[str, Any] = {"backend": compile_step}
"""Keywords of torch.compile for a decode step."""


def merge_products(module: GraphModule) -> None:
    """Give every product that `step_linear` can do to it, those of one input together."""
    groups: dict[tuple[Node, torch.dtype], list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is torch.nn.functional.linear:
            x = _argument(node, 0, "input")
            if _is_ours(x, _argument(node, 1, "weight")):
                groups.setdefault((x, _example(x).dtype), []).append(node)
    for (x, _), nodes in groups.items():
        for first in range(0, len(nodes), MAX_WEIGHTS):
            _merge(module, x, nodes[first : first + MAX_WEIGHTS])
    module.graph.lint()
    module.recompile()


def _merge(module: GraphModule, x: Node, nodes: list[Node]) -> None:
    """One call in place of ``nodes``, all products of ``x``."""
    graph = module.graph
    weights = [_argument(node, 1, "weight") for node in nodes]
    with graph.inserting_before(nodes[0]):
        merged = graph.call_function(_STEP_LINEAR, (x, weights))
        begin = 0
        for node, weight in zip(nodes, weights, strict=True):
            size = _example(weight).shape[0]
            part = graph.call_function(torch.narrow, (merged, -1, begin, size))
            bias = _argument(node, 2, "bias")
            if bias is not None:
                part = graph.call_function(torch.add, (part, bias))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
            begin += size
    for node in nodes:
        graph.erase_node(node)


def _is_ours(x: Node, weight: Node) -> bool:
    """Whether reading the weight is what the product costs, and the kernel can do it."""
    value, matrix = _example(x), _example(weight)
    return (
        value.dtype in (torch.float16, torch.bfloat16)
        and value.dtype == matrix.dtype
        and value.numel() <= MAX_ROWS * value.shape[-1]
        and matrix.is_contiguous()
        # A value that is changed in place is another one for a later product.
        and not any(user.op == "call_method" and str(user.target).endswith("_") for user in x.users)
    )


def _argument(node: Node, index: int, name: str) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def _example(node: Node) -> torch.Tensor:
    value = node.meta["example_value"]
    assert isinstance(value, torch.Tensor)
    return value
