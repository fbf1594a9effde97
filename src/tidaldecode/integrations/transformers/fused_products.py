"""A pass over a traced decode step: products of weights become `tidaldecode.kernels.linear`.

Products that share their input run together (query, key and value; gate and up), with the RMS norm
before them (one row), the gate's SiLU and the residual after them where the graph has exactly those.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from tidaldecode.integrations.transformers.fused_norms import STEP_NORM
from tidaldecode.integrations.transformers.graph_forms import (
    bias_of,
    erase,
    example,
    input_of,
    is_product,
    only_user,
    weight_of,
)
from tidaldecode.kernels import linear
from tidaldecode.kernels.linear import MAX_WEIGHTS


@torch.library.custom_op("tidaldecode::linear", mutates_args=())
def step_linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    gain: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """`tidaldecode.kernels.linear` of ``x [..., K]``, opaque to the compiler; returns ``[..., N]``."""
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(rows.shape[0], -1)
    out = linear(rows, weights, gain=gain, eps=eps, gated=gated, residual=added)
    return out.view(*x.shape[:-1], -1)


@step_linear.register_fake
def _result(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    gain: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    outputs = sum(weight.shape[0] for weight in weights)
    return x.new_empty(*x.shape[:-1], outputs // 2 if gated else outputs)


_STEP_LINEAR = torch.ops.tidaldecode.linear.default


@dataclass
class _Product:
    """One call of the kernel, and the nodes that it stands for."""

    x: Node
    nodes: list[Node]
    gain: Node | None = None
    eps: float = 0.0
    gated: bool = False
    residual: Node | None = None
    results: list[Node] = field(default_factory=list)
    """What takes the place of the call's output, in parts if they are the products themselves."""


def fuse_products(graph: Graph) -> None:
    """Rewrite the products in ``graph``, what torch.compile traced of a decode step, in place."""
    groups: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if is_product(node):
            groups.setdefault(input_of(node), []).append(node)
    for group in groups.values():
        for first in range(0, len(group), MAX_WEIGHTS):
            nodes = group[first : first + MAX_WEIGHTS]
            product = _Product(input_of(nodes[0]), nodes)
            _take_norm(product)
            _take_gate(product)
            _take_residual(product)
            _replace(graph, product)


def _replace(graph: Graph, product: _Product) -> None:
    results = product.results or product.nodes
    weights = [weight_of(node) for node in product.nodes]
    with graph.inserting_before(results[0]):
        merged = graph.call_function(
            _STEP_LINEAR,
            (product.x, weights, product.gain, product.eps, product.gated, product.residual),
        )
        begin = 0
        for node in results:
            size = example(node).shape[-1]
            part = merged
            if len(results) > 1:
                part = graph.call_function(torch.narrow, (merged, -1, begin, size))
            bias = bias_of(node) if node in product.nodes else None
            if bias is not None:
                part = graph.call_function(torch.add, (part, bias))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
            begin += size
    for node in results:
        erase(graph, node)


def _take_norm(product: _Product) -> None:
    """The input's norm, for one row."""
    if product.x.target is STEP_NORM and example(product.x).numel() == example(product.x).shape[-1]:
        product.x, product.gain, product.eps = product.x.args  # type: ignore[assignment]


def _take_gate(product: _Product) -> None:
    """``silu(gate) * up``, if nothing else reads the two."""
    if len(product.nodes) != 2 or any(bias_of(node) is not None for node in product.nodes):
        return
    for gate, up in (product.nodes, reversed(product.nodes)):
        silu = only_user(gate)
        result = only_user(up)
        if silu is None or silu.target is not torch.nn.functional.silu:
            continue
        if result is not None and result is only_user(silu) and result.target is operator.mul:
            product.nodes, product.gated, product.results = [gate, up], True, [result]
            return


def _take_residual(product: _Product) -> None:
    """What a lone product is added to."""
    if len(product.nodes) != 1 or bias_of(product.nodes[0]) is not None:
        return
    (node,) = product.nodes
    total = only_user(node)
    if total is None or total.target is not operator.add:
        return
    others = [argument for argument in total.args if argument is not node]
    if len(others) == 1 and isinstance(others[0], Node):
        like, other = example(node), others[0].meta.get("example_value")
        if isinstance(other, torch.Tensor) and (other.shape, other.dtype) == (
            like.shape,
            like.dtype,
        ):
            product.residual, product.results = others[0], [total]
