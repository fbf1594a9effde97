"""What every result file carries, and how result files are written: whole or not at all."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tidaldecode.errors import TidalError
from tidaldecode.processor import processor_name

_PACKAGES = ("tidaldecode", "torch", "transformers", "safetensors")
_KERNEL_PACKAGES = ("numba", "triton")
"""What kernels are compiled with, where it is installed."""


def run_record(**details: Any) -> dict[str, Any]:
    """Versions, device, commit, time and command line, with ``details`` (config, seed, n) added."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU {processor_name()}, {torch.get_num_threads()} threads"
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {
            **{name: package_version(name) for name in _PACKAGES},
            **{name: found for name in _KERNEL_PACKAGES if (found := package_version(name))},
        },
        "device": device,
        **details,
    }


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_json(path: Path, value: Any) -> Path:
    """Write ``value`` as JSON to ``path``, whole or not at all. Errors: `TidalError`."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    return write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it; return ``path``.

    Errors: `TidalError` when the folder cannot be made or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise TidalError(f"{path}: expected a place to write results to, got: {reason}") from error
    return path


def _commit() -> str | None:
    """Commit of the checkout that this package runs from, or None when it is installed elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()
