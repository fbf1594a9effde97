"""Results of a long proof, written after every batch, so that it can be stopped and taken up again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidaldecode.errors import TidalError
from tidaldecode.proof.equality import summarise
from tidaldecode.record import write_json


class Progress:
    """Rows found so far.

    Args:
        path: where they are written, whole or not at all, or None.
        record: what the run is (`tidaldecode.record.run_record`).
        settings: what has to be the same for two runs to belong together.
    """

    def __init__(self, path: Path | None, record: dict[str, Any], settings: dict[str, Any]) -> None:
        self.path, self.record, self.settings = path, record, settings
        self.rows: list[dict[str, Any]] = []
        self.batches = 0
        """Batches that are done."""

    def resume(self) -> None:
        """Go on from what ``path`` holds; from nothing where there is no such file.

        Errors: `TidalError` without a path, or for a file of another run.
        """
        if self.path is None:
            raise TidalError("resume: expected --json FILE with earlier results, got no file")
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            earlier = found["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TidalError(f"{self.path}: expected results of prove, got: {error!r}") from error
        wanted = json.loads(json.dumps(self.settings))
        other = sorted(key for key in wanted if earlier.get(key) != wanted[key])
        if other:
            raise TidalError(
                f"{self.path}: expected results of the same run, found another "
                f"{', '.join(other)} ({earlier.get(other[0])!r}, not {wanted[other[0]]!r}); name "
                "another --json file"
            )
        self.rows, self.batches = found["rows"], found["batches"]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Note a batch, and write all."""
        self.rows += rows
        self.batches += 1
        if self.path is not None:
            write_json(
                self.path,
                {
                    "record": self.record,
                    "settings": self.settings,
                    "batches": self.batches,
                    "summary": summarise(self.rows),
                    "rows": self.rows,
                },
            )
