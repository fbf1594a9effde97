"""Which implementation of a kernel runs: argument > TIDALDECODE_BACKEND > what the device can do.

A backend that was asked for and cannot run raises; nothing falls back in silence.
"""

from __future__ import annotations

import os

from tidaldecode.errors import TidalError

BACKENDS = ("auto", "torch", "triton")
ENVIRONMENT_VARIABLE = "TIDALDECODE_BACKEND"


def resolve_backend(requested: str = "auto") -> str:
    """The backend to run: ``"torch"``.

    Errors: `TidalError` for an unknown name and for ``"triton"``, which this version does not have.
    """
    source = "backend"
    if requested == "auto":
        requested = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        source = ENVIRONMENT_VARIABLE
    if requested not in BACKENDS:
        raise TidalError(f"{source}: expected one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "triton":
        raise TidalError(
            f"{source}: the Triton kernels are not part of this version; use 'torch' or 'auto'"
        )
    return "torch"
