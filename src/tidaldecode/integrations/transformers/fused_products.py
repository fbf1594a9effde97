"""A pass over a traced decode step: products of weights become `tidaldecode.kernels.linear`.

Products that share their input run together (query, key and value; gate and up), with the RMS norm
before them, the gate's SiLU and the residual after them where the graph has exactly those.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tidaldecode.kernels import linear
from tidaldecode.kernels.linear import MAX_ROWS, MAX_WEIGHTS


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


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
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


def fuse_products(module: GraphModule) -> None:
    """Rewrite ``module``, what torch.compile traced of a decode step, in place."""
    groups: dict[Node, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is torch.nn.functional.linear and _ours(node):
            groups.setdefault(_input(node), []).append(node)
    for group in groups.values():
        for first in range(0, len(group), MAX_WEIGHTS):
            nodes = group[first : first + MAX_WEIGHTS]
            product = _Product(_input(nodes[0]), nodes)
            _take_norm(product)
            _take_gate(product)
            _take_residual(product)
            _replace(module.graph, product)
    module.graph.lint()
    module.recompile()


def _replace(graph: Graph, product: _Product) -> None:
    results = product.results or product.nodes
    weights = [_weight(node) for node in product.nodes]
    with graph.inserting_before(results[0]):
        merged = graph.call_function(
            _STEP_LINEAR,
            (product.x, weights, product.gain, product.eps, product.gated, product.residual),
        )
        begin = 0
        for node in results:
            size = _example(node).shape[-1]
            part = merged
            if len(results) > 1:
                part = graph.call_function(torch.narrow, (merged, -1, begin, size))
            bias = _bias(node) if node in product.nodes else None
            if bias is not None:
                part = graph.call_function(torch.add, (part, bias))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
            begin += size
    for node in results:
        _erase(graph, node)


def _erase(graph: Graph, node: Node) -> None:
    """Erase a node that nothing reads, and what it alone has read."""
    if not node.users and node.op != "placeholder":
        read = node.all_input_nodes
        graph.erase_node(node)
        for source in read:
            _erase(graph, source)


def _take_norm(product: _Product) -> None:
    """The input's RMS norm as transformers' Llama has it, for one row."""
    if _example(product.x).numel() != _example(product.x).shape[-1]:
        return
    try:
        gain, rounded = _arguments(product.x, operator.mul)
        normed, dtype = _arguments(rounded, "to")
        wide, inverse = _arguments(normed, operator.mul)
        (shifted,) = _arguments(inverse, torch.rsqrt)
        mean, eps = _arguments(shifted, operator.add)
        square, axis = _arguments(mean, "mean", keepdim=True)
        base, power = _arguments(square, "pow")
        x, wide_dtype = _arguments(wide, "to")
    except _OtherwiseError:
        return
    form = (base, power, axis, wide_dtype) == (wide, 2, -1, torch.float32)
    if form and dtype == _example(x).dtype == _example(gain).dtype and _example(gain).dim() == 1:
        product.x, product.gain, product.eps = x, gain, eps


def _take_gate(product: _Product) -> None:
    """``silu(gate) * up``, if nothing else reads the two."""
    if len(product.nodes) != 2 or any(_bias(node) is not None for node in product.nodes):
        return
    for gate, up in (product.nodes, reversed(product.nodes)):
        silu = _only_user(gate)
        result = _only_user(up)
        if silu is None or silu.target is not torch.nn.functional.silu:
            continue
        if result is not None and result is _only_user(silu) and result.target is operator.mul:
            product.nodes, product.gated, product.results = [gate, up], True, [result]
            return


def _take_residual(product: _Product) -> None:
    """What a lone product is added to."""
    if len(product.nodes) != 1 or _bias(product.nodes[0]) is not None:
        return
    (node,) = product.nodes
    total = _only_user(node)
    if total is None or total.target is not operator.add:
        return
    others = [argument for argument in total.args if argument is not node]
    if len(others) == 1 and isinstance(others[0], Node):
        like, other = _example(node), others[0].meta.get("example_value")
        if isinstance(other, torch.Tensor) and (other.shape, other.dtype) == (
            like.shape,
            like.dtype,
        ):
            product.residual, product.results = others[0], [total]


class _OtherwiseError(Exception):
    """A graph that does not have the form that was looked for."""


def _arguments(node: Any, target: Any, **keywords: Any) -> tuple[Any, ...]:
    """The arguments of a call of ``target`` (a method by its name). Errors: `_OtherwiseError`."""
    if not isinstance(node, Node) or node.target != target or dict(node.kwargs) != keywords:
        raise _OtherwiseError
    return node.args


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _ours(node: Node) -> bool:
    """Whether reading the weight is what the product costs, and the kernel can do it."""
    x, weight = _example(_input(node)), _example(_weight(node))
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and x.dtype == weight.dtype
        and x.numel() <= MAX_ROWS * x.shape[-1]
        and weight.is_contiguous()
        # A value that is changed in place is another one for a later product.
        and not any(_changes_in_place(user) for user in _input(node).users)
    )


def _changes_in_place(user: Node) -> bool:
    return user.target in _IN_PLACE or (user.op == "call_method" and str(user.target).endswith("_"))


def _input(node: Node) -> Node:
    found = _argument(node, 0, "input")
    assert isinstance(found, Node)
    return found


def _weight(node: Node) -> Node:
    found = _argument(node, 1, "weight")
    assert isinstance(found, Node)
    return found


def _bias(node: Node) -> Node | None:
    found = _argument(node, 2, "bias")
    assert found is None or isinstance(found, Node)
    return found


def _argument(node: Node, index: int, name: str) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def _example(node: Node) -> torch.Tensor:
    value = node.meta["example_value"]
    assert isinstance(value, torch.Tensor)
    return value
