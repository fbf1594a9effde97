"""How torch.compile builds a decode step: what our passes leave of it, fused as it likes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from tidaldecode.integrations.transformers.fused_norms import fuse_norms
from tidaldecode.integrations.transformers.fused_products import fuse_products
from tidaldecode.integrations.transformers.fused_rotations import fuse_rotations
from tidaldecode.integrations.transformers.graph_forms import drop_whole_slices

_OPTIONS = {"coordinate_descent_tuning": True}
"""Of torch.compile's own kernels: search their tiles longer."""


def compile_step(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend of torch.compile: its own, after our passes."""
    fuse(graph)
    compiled: Callable[..., Any] = torch._inductor.compile(graph, inputs, options=_OPTIONS)
    return compiled


def fuse(module: GraphModule) -> None:
    """Rewrite ``module``, what torch.compile traced of a decode step, in place."""
    drop_whole_slices(module.graph)
    for fuse_form in (fuse_norms, fuse_rotations, fuse_products):
        fuse_form(module.graph)
    module.graph.lint()
    module.recompile()


COMPILER: dict[str, Any] = {"backend": compile_step}
"""Keywords of torch.compile for a decode step."""
