"""What a GPU has, and how much of a kernel's work one program should therefore take."""

from __future__ import annotations

import torch


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a handful where the kernels are interpreted."""
    if device.type != "cuda":
        return 12
    return torch.cuda.get_device_properties(device).multi_processor_count


def heads_at_once(heads: int, elements: int, most: int, device: torch.device) -> int:
    """Heads, a power of two, that a program takes where there are many: launching one costs time too.

    Args:
        elements: what a program holds of one head.
        most: what a program may hold.
    """
    spare = heads // processors(device)
    fitting = most // elements
    return 1 << (max(1, min(spare, fitting)).bit_length() - 1)
