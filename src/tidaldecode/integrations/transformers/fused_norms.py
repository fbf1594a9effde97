"""A pass over a traced decode step: RMS norms before products become `tidaldecode.kernels.rms_norm`.

Its launch overlaps the kernels before and after, which one that the compiler makes does not.
"""

from __future__ import annotations

import torch
from torch.fx import Graph

from tidaldecode.integrations.transformers.graph_forms import erase, is_product, norm_of
from tidaldecode.kernels import rms_norm


@torch.library.custom_op("tidaldecode::rms_norm", mutates_args=())
def step_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """`tidaldecode.kernels.rms_norm` of ``x [..., K]``, opaque to the compiler; returns its like."""
    return rms_norm(x.reshape(-1, x.shape[-1]), gain, eps=eps).view(x.shape)


@step_norm.register_fake
def _result(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


STEP_NORM = torch.ops.tidaldecode.rms_norm.default
"""The operator in a graph; its arguments are the input, the gain and the epsilon."""


def fuse_norms(graph: Graph) -> None:
    """Rewrite the norms in ``graph``, what torch.compile traced of a decode step, in place."""
    for node in list(graph.nodes):
        norm = norm_of(node)
        if norm is None or not any(is_product(user) for user in node.users):
            continue
        with graph.inserting_before(node):
            merged = graph.call_function(STEP_NORM, (norm.x, norm.gain, norm.eps))
        merged.meta = dict(node.meta)
        node.replace_all_uses_with(merged)
        erase(graph, node)
