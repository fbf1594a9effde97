"""Where two greedy texts part, and how close the choice was."""

from __future__ import annotations

from typing import Any

import torch


def differences(
    wanted: torch.Tensor, found: torch.Tensor, gaps: torch.Tensor
) -> list[dict[str, Any]]:
    """Where new tokens ``found [B, n]`` first differ, row by row, from full attention's ``wanted``.

    ``gaps [B, n]``: by how much full attention preferred its own token. Each difference has its ``row``,
    ``token`` (from 0) and ``gap``; None where a text just ends.
    """
    width = min(wanted.shape[1], found.shape[1])
    out: list[dict[str, Any]] = []
    for row in range(len(wanted)):
        differs = (wanted[row, :width] != found[row, :width]).nonzero()
        if len(differs):
            at = int(differs[0])
            out.append({"row": row, "token": at, "gap": float(gaps[row, at])})
        elif wanted.shape[1] != found.shape[1]:
            out.append({"row": row, "token": width, "gap": None})
    return out
