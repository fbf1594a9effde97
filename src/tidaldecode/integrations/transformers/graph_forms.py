"""What the passes over a traced decode step look for: products of weights, norms, and who reads what."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from tidaldecode.kernels.linear import MAX_ROWS

_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
_WHOLE = (slice(None), slice(0, None))


class OtherwiseError(Exception):
    """A graph that does not have the form that was looked for."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm of ``x [..., K]`` with ``gain [K]``."""

    x: Node
    gain: Node
    eps: float


def norm_of(node: Node) -> Norm | None:
    """The norm whose result ``node`` is, if it has exactly the form of transformers' LlamaRMSNorm."""
    try:
        gain, rounded = arguments(node, operator.mul)
        normed, dtype = arguments(rounded, "to")
        wide, inverse = arguments(normed, operator.mul)
        (shifted,) = arguments(inverse, torch.rsqrt)
        mean, eps = arguments(shifted, operator.add)
        square, axis = arguments(mean, "mean", keepdim=True)
        base, power = arguments(square, "pow")
        x, wide_dtype = arguments(wide, "to")
    except OtherwiseError:
        return None
    if (base, power, axis, wide_dtype) != (wide, 2, -1, torch.float32) or not is_weight(gain):
        return None
    chain = (x, gain, wide, square, mean, shifted, inverse, normed, rounded)
    alike = dtype == example(x).dtype == example(gain).dtype and example(gain).dim() == 1
    if not alike or not isinstance(eps, float) or any(map(changes_in_place, chain)):
        return None
    return Norm(x, gain, eps)


def is_product(node: Node) -> bool:
    """Whether ``node`` multiplies few rows with a weight, which the kernel can do.

    Reading the weight is then nearly all that it costs.
    """
    if node.op != "call_function" or node.target is not torch.nn.functional.linear:
        return False
    x, weight = example(input_of(node)), example(weight_of(node))
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and x.dtype == weight.dtype
        and x.numel() <= MAX_ROWS * x.shape[-1]
        and is_weight(weight_of(node))
        and weight.is_contiguous()
        # A value that is changed in place is another one for a later product.
        and not changes_in_place(input_of(node))
    )


def is_weight(node: Any) -> bool:
    """Whether the step does not compute it: kernels read weights ahead of everything else."""
    return isinstance(node, Node) and node.op in ("placeholder", "get_attr")


def changes_in_place(node: Node) -> bool:
    """Whether some reader of ``node`` writes to it."""
    return any(
        user.target in _IN_PLACE or (user.op == "call_method" and str(user.target).endswith("_"))
        for user in node.users
    )


def input_of(product: Node) -> Node:
    """What a product of weights multiplies."""
    found = _argument(product, 0, "input")
    assert isinstance(found, Node)
    return found


def weight_of(product: Node) -> Node:
    """The weight of a product."""
    found = _argument(product, 1, "weight")
    assert isinstance(found, Node)
    return found


def bias_of(product: Node) -> Node | None:
    """The bias of a product, if it has one."""
    found = _argument(product, 2, "bias")
    assert found is None or isinstance(found, Node)
    return found


def arguments(node: Any, target: Any, **keywords: Any) -> tuple[Any, ...]:
    """The arguments of a call of ``target`` (a method by its name). Errors: `OtherwiseError`."""
    if not isinstance(node, Node) or node.target != target or dict(node.kwargs) != keywords:
        raise OtherwiseError
    return node.args


def only_user(node: Node) -> Node | None:
    """The reader of a value that is read once."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def example(node: Node) -> torch.Tensor:
    """A tensor of a node's shape, dtype and device."""
    value = node.meta["example_value"]
    assert isinstance(value, torch.Tensor)
    return value


def drop_whole_slices(graph: Graph) -> None:
    """Read ``x`` instead of ``x[:, 0:]``: so models cut their last states to what they keep of them."""
    for node in list(graph.nodes):
        parts = node.args[1] if node.target is operator.getitem else None
        if isinstance(parts, tuple) and all(part in _WHOLE for part in parts):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def erase(graph: Graph, node: Node) -> None:
    """Erase a node that nothing reads, and what it alone has read."""
    if not node.users and node.op != "placeholder":
        read = node.all_input_nodes
        graph.erase_node(node)
        for source in read:
            erase(graph, source)


def _argument(node: Node, index: int, name: str) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)
