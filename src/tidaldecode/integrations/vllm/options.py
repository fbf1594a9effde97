"""What a user may say under ``tidaldecode`` in ``--additional-config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError

KEY = "tidaldecode"

OF_CONFIG = (
    "budget",
    "dense_layers",
    "select_layers",
    "granularity",
    "score",
    "sink_tokens",
    "recent_tokens",
    "backend",
)
"""Options of `TidalConfig` that mean something here; the others are the host's business."""

OF_SERVER = ("min_context", "scratch_mib")
"""Options of `ServingOptions` itself."""


@dataclass(frozen=True)
class ServingOptions:
    """The options of one server. Errors: `TidalError` for a value that cannot work."""

    overrides: Mapping[str, Any]
    """Options of `TidalConfig`, over the calibration file beside the model or the defaults."""
    min_context: int = 0
    """Sequences shorter than this, in tokens, are decoded densely; 0: the budget alone decides."""

    scratch_mib: int = 512
    """Memory, in MiB, that a selection layer's scores may take; more rows are taken in parts."""

    def __post_init__(self) -> None:
        for name, least in (("min_context", 0), ("scratch_mib", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise TidalError(f"{name}: expected a whole number from {least} up, got {value!r}")
        TidalConfig().replace(**{**_CONSISTENT, **self.overrides})
        if self.overrides.get("select_layers") in ((), []):
            raise TidalError(
                "select_layers: expected 'auto' or at least one layer, got none; a fixed window of "
                "sinks and recents needs no selection and is not served"
            )


_CONSISTENT: dict[str, Any] = {"budget": 1 << 20, "granularity": "query_head"}
"""Fits every single option, so that each can be checked before the file beside the model is known."""


def read_options(additional_config: Any) -> ServingOptions:
    """The options in vLLM's ``additional_config``; none of them has to be there.

    Errors: `TidalError` for an unknown or bad option, by its name.
    """
    section = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(section, Mapping):
        raise TidalError(
            f"additional-config: expected a JSON object under {KEY!r}, such as "
            f'{{"{KEY}": {{"budget": 1024}}}}, got {section!r}'
        )
    known = (*OF_CONFIG, *OF_SERVER)
    if unknown := [name for name in section if name not in known]:
        raise TidalError(
            f"additional-config: expected options of {KEY} among {', '.join(known)}, got "
            f"{', '.join(map(repr, unknown))}"
        )
    overrides = {name: value for name, value in section.items() if name in OF_CONFIG}
    server = {name: value for name, value in section.items() if name in OF_SERVER}
    return ServingOptions(overrides, **server)
