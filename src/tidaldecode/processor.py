"""The processor that this runs on, as far as the system tells."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


@functools.cache
def processor_name() -> str:
    """Its model name, or the kind of machine."""
    return _told("model name") or platform.processor() or platform.machine()


@functools.cache
def is_intel() -> bool:
    """Whether Intel made it, for which MKL has kernels that it keeps from others."""
    return "GenuineIntel" in (_told("vendor_id") or platform.processor())


def _told(field: str) -> str:
    """What Linux says of the first processor, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    values = [line.split(":", 1)[1].strip() for line in lines if line.startswith(field)]
    return values[0] if values else ""
