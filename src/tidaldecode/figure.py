"""Figures, written as PNG files that carry their run record. Needs matplotlib (the ``eval`` extra)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from tidaldecode.errors import TidalError
from tidaldecode.record import write_file


def require_matplotlib() -> None:
    """Raise `TidalError` where plots cannot be drawn, before any long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TidalError(
            "plot: expected matplotlib, found none; run pip install 'tidaldecode[eval]' or leave "
            "plots out with --no-plot"
        )


def save_figure(figure: Any, path: Path, record: dict[str, Any]) -> Path:
    """Write the PNG; its ``Description`` field is the run record as JSON."""
    notes = {"Software": "tidaldecode", "Description": json.dumps(record)}
    return write_file(
        path,
        lambda temporary: figure.savefig(temporary, dpi=130, format="png", metadata=notes),
    )
