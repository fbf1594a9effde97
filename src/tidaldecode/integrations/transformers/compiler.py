"""How torch.compile builds a decode step: our products of weights, everything else fused by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from tidaldecode.integrations.transformers.fused_products import fuse_products

_OPTIONS = {"coordinate_descent_tuning": True}
"""Of torch.compile's own kernels: search their tiles longer."""


def compile_step(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend of torch.compile: its own, after our pass."""
    fuse_products(graph)
    compiled: Callable[..., Any] = torch._inductor.compile(graph, inputs, options=_OPTIONS)
    return compiled


COMPILER: dict[str, Any] = {"backend": compile_step}
"""Keywords of torch.compile for a decode step."""
