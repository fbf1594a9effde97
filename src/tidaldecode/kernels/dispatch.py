"""Which implementation of a kernel runs: argument > TIDALDECODE_BACKEND > what the device can do.

A backend that was asked for and cannot run raises; nothing falls back in silence.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

from tidaldecode.errors import TidalError

BACKENDS = ("auto", "torch", "numba", "triton")
ENVIRONMENT_VARIABLE = "TIDALDECODE_BACKEND"
_INTERPRET = "TRITON_INTERPRET"
MAX_HEAD_DIM = 256
MAX_GROUP = 64


def resolve_backend(
    requested: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 0,
    group: int = 1,
    twin: bool = True,
    in_rows: bool | None = None,
) -> str:
    """The backend to run on ``device``: ``"torch"``, ``"numba"`` or ``"triton"``.

    ``"auto"`` is Triton on a GPU that has it, for head dimensions and group sizes that its kernels
    hold (256 and 64); on a CPU that has Numba its loops, where they can run; PyTorch elsewhere, and for
    a kernel that has no ``twin`` in Triton. Numba has twins of the attention kernels alone: where it is
    asked for, all others are PyTorch's.

    Args:
        in_rows: of an attention kernel: one query a row, whose keys and values are rows of adjacent
            channels and not paged; None: another kernel.

    Errors: `TidalError` for an unknown name, and for one that cannot run.
    """
    source = "backend"
    if requested == "auto":
        requested = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        source = ENVIRONMENT_VARIABLE
    if requested not in BACKENDS:
        raise TidalError(f"{source}: expected one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "numba" or (requested == "auto" and device.type != "cuda"):
        return _numba_or_torch(requested == "numba", source, device, dtype, in_rows)
    if requested == "torch":
        return "torch"
    obstacle = (
        _triton_obstacle(device, dtype, head_dim, group)
        if twin
        else "the Triton kernels have no twin of this one"
    )
    if requested == "triton" and obstacle:
        raise TidalError(f"{source}: {obstacle}; use 'torch' or 'auto'")
    return "torch" if obstacle else "triton"


def _numba_or_torch(
    wanted: bool, source: str, device: torch.device, dtype: torch.dtype, in_rows: bool | None
) -> str:
    if in_rows is None:
        return "torch"
    obstacle = _numba_obstacle(device, dtype, in_rows)
    if wanted and obstacle:
        raise TidalError(f"{source}: {obstacle}; use 'torch' or 'auto'")
    return "torch" if obstacle else "numba"


def _numba_obstacle(device: torch.device, dtype: torch.dtype, in_rows: bool) -> str | None:
    """Why Numba's loops cannot run, or None."""
    if device.type != "cpu":
        return f"Numba's loops expect tensors on a CPU, got {device}"
    if dtype is not torch.float32:
        return f"Numba's loops expect torch.float32, got {dtype}"
    if not in_rows:
        return "Numba's loops expect one query a row, and a cache of adjacent channels, not paged"
    return _numba_missing()


@functools.cache
def _numba_missing() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "Numba's loops expect the numba package, which is not installed"
    # Its other threads may not be used by several threads of a program.
    if not (_is_there("numba.np.ufunc.omppool") or _is_there("numba.np.ufunc.tbbpool")):
        return "Numba's loops expect its OpenMP or TBB threads, which it does not have here"
    return None


def _is_there(module: str) -> bool:
    """Whether a module, and the libraries that it is linked to, can be loaded."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _triton_obstacle(
    device: torch.device, dtype: torch.dtype, head_dim: int, group: int
) -> str | None:
    """Why the Triton kernels cannot run, or None."""
    if device.type != "cuda" and os.environ.get(_INTERPRET) != "1":
        return f"the Triton kernels expect tensors on a GPU, got {device} (or set {_INTERPRET}=1)"
    if device.type != "cuda" and dtype is torch.bfloat16:
        return "Triton's interpreter cannot multiply bfloat16"
    if not _has_triton():
        return "the Triton kernels expect the triton package, which is not installed"
    if head_dim > MAX_HEAD_DIM:
        return f"the Triton kernels expect a head dimension up to {MAX_HEAD_DIM}, got {head_dim}"
    if group > MAX_GROUP:
        return f"the Triton kernels expect up to {MAX_GROUP} query heads per KV head, got {group}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
