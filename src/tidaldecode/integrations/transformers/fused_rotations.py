"""A pass over a traced decode step: its attention rotates queries and keys by itself.

Rotary embedding, the norms of heads before it and the append to the cache are one launch then.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from tidaldecode.integrations.transformers.graph_forms import (
    Norm,
    OtherwiseError,
    arguments,
    changes_in_place,
    erase,
    example,
    norm_of,
)
from tidaldecode.integrations.transformers.step_layers import STEP_ATTENTION

_NEWEST = {operator.getitem: ((slice(None), slice(None), 0),), "transpose": (1, 2)}
"""How attention takes the newest tokens of ``[B, H, T, D]``: one, or all with their heads behind."""

_NO_NORM: tuple[Node | None, Node | None, float] = (None, None, 0.0)


@dataclass(frozen=True)
class _Rotated:
    """Queries or keys ``x [B, H, T, D]`` that are rotated by ``cos, sin [B, T, D]``."""

    x: Node
    cos: Node
    sin: Node
    taken: Node
    """What attention takes of them, in one of the ways of `_NEWEST`."""


def fuse_rotations(graph: Graph) -> None:
    """Rewrite the attention in ``graph``, what torch.compile traced of a decode step, in place."""
    for node in list(graph.nodes):
        if node.target is STEP_ATTENTION:
            q, k = (_rotated(argument) for argument in node.args[:2])
            if q and k and (q.cos, q.sin, q.taken.target) == (k.cos, k.sin, k.taken.target):
                _replace(graph, node, q, k)


def _replace(graph: Graph, node: Node, q: _Rotated, k: _Rotated) -> None:
    sources, norm = [q.x, k.x], _NO_NORM
    q_norm, k_norm = _norm_of_heads(q.x), _norm_of_heads(k.x)
    with graph.inserting_before(node):
        if q_norm and k_norm and q_norm.eps == k_norm.eps:
            sources = [graph.call_method("transpose", (n.x, 1, 2)) for n in (q_norm, k_norm)]
            norm = (q_norm.gain, k_norm.gain, q_norm.eps)
        newest = [
            graph.create_node(q.taken.op, q.taken.target, (source, *q.taken.args[1:]))
            for source in sources
        ]
    node.args = (*newest, *node.args[2:], q.cos, q.sin, *norm)
    for argument in (q.taken, k.taken):
        erase(graph, argument)


def _rotated(argument: Any) -> _Rotated | None:
    """What an argument of attention was, if it has the form of transformers' apply_rotary_pos_emb."""
    try:
        embedded, *part = arguments(argument, argument.target)
        straight, across = arguments(embedded, operator.add)
        x, each_cos = arguments(straight, operator.mul)
        turned, each_sin = arguments(across, operator.mul)
        cos, *cos_dim = arguments(each_cos, "unsqueeze")
        sin, *sin_dim = arguments(each_sin, "unsqueeze")
        (halves,) = arguments(turned, torch.cat, dim=-1)
        minus, lower = halves
        (upper,) = arguments(minus, operator.neg)
        half = example(x).shape[-1] // 2
        same = (
            arguments(lower, operator.getitem) == (x, (..., slice(None, half)))
            and arguments(upper, operator.getitem) == (x, (..., slice(half, None)))
            and cos_dim == sin_dim == [1]
            and tuple(part) == _NEWEST.get(argument.target)
        )
    except (OtherwiseError, ValueError):
        return None
    angles = (cos, sin, each_cos, each_sin)
    chain = (x, *angles, lower, upper, minus, turned, straight, across, embedded)
    if not same or any(map(changes_in_place, chain)) or not _fits(x, cos) or not _fits(x, sin):
        return None
    return _Rotated(x, cos, sin, argument)


def _fits(x: Node, angles: Node) -> bool:
    """Whether the kernel takes them; full precision is the compiler's."""
    states, values = example(x), example(angles)
    if states.dim() != 4 or states.dtype not in (torch.float16, torch.bfloat16):
        return False
    batch, _, tokens, head_dim = states.shape
    shape = (batch, tokens, head_dim)
    return values.dtype == states.dtype and values.shape == shape and head_dim % 2 == 0


def _norm_of_heads(x: Node) -> Norm | None:
    """The norm of ``[B, T, H, D]`` that ``x [B, H, T, D]`` is the transpose of."""
    try:
        normed, *dims = arguments(x, "transpose")
    except OtherwiseError:
        return None
    return norm_of(normed) if dims == [1, 2] else None
