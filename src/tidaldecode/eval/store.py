"""Where rows of results are kept: one JSON line each, the run record first; safe to kill and resume."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidaldecode.errors import TidalError
from tidaldecode.record import write_file

_MAY_DIFFER = ("time", "command")
"""What a resumed run need not share with the run that it continues."""

Row = dict[str, Any]
"""A row of results; it has at least ``key`` (the sample) and ``method``."""


class RowStore:
    """An append-only file. Its first line is ``{"record": ...}``; a torn last line is dropped."""

    def __init__(
        self, path: Path | None, record: dict[str, Any], *, overwrite: bool = False
    ) -> None:
        """Open ``path``, or start it with ``record``; without a path, rows stay in memory.

        Errors: `TidalError` when the file holds another run and ``overwrite`` is not set, or cannot
        be read or written.
        """
        self.path = path
        self.rows: list[Row] = []
        self.record: dict[str, Any] = json.loads(json.dumps(record))
        self._done: set[tuple[str, str]] = set()
        if path is None:
            return
        if path.exists() and not overwrite:
            self._resume(path)
        else:
            line = json.dumps({"record": self.record}, allow_nan=False) + "\n"
            write_file(path, lambda temporary: temporary.write_text(line, encoding="utf-8"))

    def _resume(self, path: Path) -> None:
        try:
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            lines = [json.loads(line) for line in whole.splitlines()]
            found, rows = dict(lines[0]["record"]), lines[1:]
            done = {(row["key"], row["method"]) for row in rows}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise TidalError(
                f"{path}: expected rows of an earlier run, got a file that cannot be read "
                f"({type(error).__name__}); pass --overwrite or another --output-dir"
            ) from error
        differs = [
            name
            for name in sorted({*found, *self.record} - set(_MAY_DIFFER))
            if found.get(name) != self.record.get(name)
        ]
        if differs:
            raise TidalError(
                f"{path}: expected rows of this very run, found another run's, which differs in "
                f"{', '.join(differs)}; pass --overwrite or another --output-dir"
            )
        self.record, self.rows, self._done = found, rows, done
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def has(self, key: str, method: str) -> bool:
        """Whether the row of this sample and method is there."""
        return (key, method) in self._done

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows that are not there yet; they are on disk when this returns.

        Errors: `TidalError` when the file cannot be written.
        """
        new = [row for row in rows if not self.has(row["key"], row["method"])]
        try:
            lines = [json.dumps(row, allow_nan=False) + "\n" for row in new]
        except ValueError as error:
            raise TidalError(
                f"rows: expected finite numbers, got an infinite or undefined one ({error}); the "
                "model gives logits that cannot be compared"
            ) from error
        if self.path is not None:
            _append(self.path, "".join(lines))
        self.rows += new
        self._done |= {(row["key"], row["method"]) for row in new}


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise TidalError(
            f"{path}: expected a file to add rows to, got: {error.strerror}"
        ) from error
