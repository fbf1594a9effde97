"""Haystacks: long real texts that every machine has, or that the user names.

The default is the source of the running Python's own standard library: no download, real code, and
never part of the embedded model's training text.
"""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

from tidaldecode.errors import TidalError

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def source_text(path: Path | None, min_characters: int, seed: int = 0) -> str:
    """The text in ``path``, or at least ``min_characters`` of the standard library's source.

    Errors: `TidalError` for a file that cannot be read as UTF-8 text, or a library that is too short.
    """
    if path is None:
        return standard_library_text(min_characters, seed)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TidalError(f"{path}: expected a readable UTF-8 text file, got: {error}") from error


def standard_library_files() -> list[Path]:
    """Paths of the standard library's Python sources, sorted, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    if not files:
        raise TidalError(
            f"haystack: expected Python sources under {root}, found none; name a text with --haystack"
        )
    return files


def standard_library_text(min_characters: int, seed: int = 0) -> str:
    """At least ``min_characters`` of standard-library source, files in an order drawn from ``seed``.

    Errors: `TidalError` when the whole library is shorter than that.
    """
    files = standard_library_files()
    random.Random(seed).shuffle(files)
    parts: list[str] = []
    length = 0
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        parts.append(text)
        length += len(text)
        if length >= min_characters:
            return "".join(parts)
    raise TidalError(
        f"haystack: expected at least {min_characters:,} characters of standard-library source, "
        f"found {length:,}; ask for a shorter context"
    )
