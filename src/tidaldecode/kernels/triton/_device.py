"""What a GPU has, and how much of a kernel's work one program should therefore take."""

from __future__ import annotations

import torch
from triton.compiler.compiler import max_shared_mem


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a handful where the kernels are interpreted."""
    if device.type != "cuda":
        return 12
    return torch.cuda.get_device_properties(device).multi_processor_count


def cache_bytes(device: torch.device) -> int:
    """Bytes of the cache that a GPU's multiprocessors share."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def fitting_stages(stages: int, tile_bytes: int, device: torch.device) -> int:
    """Pipeline stages of a loop over tiles: ``stages``, or fewer where shared memory is short.

    All tiles on the way but one lie in shared memory, beside what the rest of a program needs of it.
    """
    if device.type != "cuda":
        return stages
    room = shared_memory(device) - _OTHER_SHARED_BYTES
    return max(1, min(stages, 1 + room // tile_bytes))


_OTHER_SHARED_BYTES = 16 << 10
"""For queries, weights of a tile and sums over warps."""


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program on a GPU may have."""
    properties = torch.cuda.get_device_properties(device)
    told = getattr(properties, "shared_memory_per_block_optin", None)
    # Older versions of torch do not tell, nor do those for AMD's GPUs; Triton asks the driver.
    return int(told or max_shared_mem(_number(device)))


def _number(device: torch.device) -> int:
    """The number of a GPU."""
    return torch.cuda.current_device() if device.index is None else device.index


def heads_at_once(heads: int, elements: int, most: int, device: torch.device) -> int:
    """Heads, a power of two, that a program takes where there are many: launching one costs time too.

    Args:
        elements: what a program holds of one head.
        most: what a program may hold.
    """
    spare = heads // processors(device)
    fitting = most // elements
    return 1 << (max(1, min(spare, fitting)).bit_length() - 1)
