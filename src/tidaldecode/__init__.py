"""TidalDecode: position persistent sparse attention for fast long-context decoding.

Public names load on first use; importing the package loads no torch, transformers, triton or vllm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidaldecode.algorithm.plan import LayerPlan, Role
    from tidaldecode.config import TidalConfig
    from tidaldecode.errors import TidalError
    from tidaldecode.integrations.transformers import (
        TidalHandle,
        disable,
        enable,
        graph_generate,
    )

__version__ = "0.1.0"

_HOMES = {
    "TidalConfig": "tidaldecode.config",
    "TidalError": "tidaldecode.errors",
    "LayerPlan": "tidaldecode.algorithm.plan",
    "Role": "tidaldecode.algorithm.plan",
    "TidalHandle": "tidaldecode.integrations.transformers",
    "enable": "tidaldecode.integrations.transformers",
    "disable": "tidaldecode.integrations.transformers",
    "graph_generate": "tidaldecode.integrations.transformers",
}

__all__ = [
    "LayerPlan",
    "Role",
    "TidalConfig",
    "TidalError",
    "TidalHandle",
    "__version__",
    "disable",
    "enable",
    "graph_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
