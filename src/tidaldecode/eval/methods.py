"""Methods by name: ``dense``, ``tidal``, ``tidal:granularity=kv_head,select_layers=2+6``, ..."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError

DENSE = "dense"
NAMES = (DENSE, "tidal", "paper", "lessismore", "streaming", "recent", "quest")
"""Full attention; the model's configuration; published systems; the most recent tokens alone."""


@dataclass(frozen=True)
class Method:
    """A way to decode, as results name it. ``config`` None is full attention."""

    name: str
    config: TidalConfig | None


def parse_methods(
    texts: Sequence[str], base: TidalConfig, budgets: Sequence[int] = ()
) -> list[Method]:
    """Methods from ``name`` or ``name:option=value,...``; sparse ones once for every budget.

    Args:
        base: the model's configuration, with explicit selection layers; its budget is the default.
        budgets: tokens; a method that names its own budget keeps to it.

    Errors: `TidalError` for an unknown name or option, a bad value, or a method named twice.
    """
    methods: list[Method] = []
    for text in texts:
        name, _, rest = text.partition(":")
        if name not in NAMES:
            raise TidalError(f"method: expected one of {', '.join(NAMES)}, got {name!r}")
        options = _options(text, rest)
        if name == DENSE:
            if options:
                raise TidalError(f"method: expected no options after dense, got {text!r}")
            methods.append(Method(DENSE, None))
            continue
        own = options.pop("budget", None)
        label = name + (
            f":{rest_without_budget}" if (rest_without_budget := _label(options)) else ""
        )
        for budget in [own] if own is not None else budgets or [base.budget]:
            config = _config(name, base, budget, options)
            methods.append(Method(f"{label} {config.budget}", config))
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TidalError(f"method: expected every method once, got {', '.join(twice)} again")
    if not methods:
        raise TidalError("method: expected at least one, got none")
    return methods


def _config(name: str, base: TidalConfig, budget: Any, options: dict[str, Any]) -> TidalConfig:
    if name == "tidal":
        return base.replace(**{"budget": budget, **options})
    if name == "recent":
        given = {"sink_tokens": 0, "recent_tokens": budget - 1 if isinstance(budget, int) else 0}
        return TidalConfig.preset("streaming", budget=budget, **{**given, **options})
    layers = {} if name in ("streaming", "quest") else {"select_layers": base.select_layers}
    return TidalConfig.preset(name, budget=budget, **{**layers, **options})


def _options(method: str, text: str) -> dict[str, Any]:
    """``"a=1,b=x,c=2+6"`` to ``{"a": 1, "b": "x", "c": (2, 6)}``."""
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise TidalError(f"method: expected option=value after the colon, got {method!r}")
        name = name.replace("-", "_")
        if name in options:
            raise TidalError(f"method: expected every option once, got {name} again in {method!r}")
        options[name] = _value(name, value)
    return options


def _value(name: str, text: str) -> Any:
    if name == "select_layers" and text != "auto":
        parts = text.split("+")
        return tuple(int(part) for part in parts) if all(map(str.isdecimal, parts)) else text
    return int(text) if text.isdecimal() else text


def _label(options: dict[str, Any]) -> str:
    return ",".join(
        f"{name}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in options.items()
    )
