"""Which configuration and which layer plan a model gets, and the reason to show for it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidaldecode.algorithm.plan import LayerPlan, default_select_layers
from tidaldecode.config import CONFIG_FILE, TidalConfig, calibrated_model
from tidaldecode.errors import TidalError, UncalibratedWarning

# (model_type, layers, hidden size, vocabulary) -> selection layers, and who found them.
_PUBLISHED: dict[tuple[str, int, int, int], tuple[tuple[int, ...], str]] = {
    ("llama", 32, 4096, 32000): ((2, 7), "Llama-2-7B, arXiv 2410.05076"),
    ("llama", 32, 4096, 128256): ((2, 13), "Llama-3-8B, arXiv 2410.05076"),
    ("qwen3", 36, 4096, 151936): ((2, 12), "Qwen3-8B, arXiv 2508.07101"),
    ("qwen3", 36, 2560, 151936): ((2, 20), "Qwen3-4B, arXiv 2508.07101"),
}


@dataclass(frozen=True)
class ModelFacts:
    """What the choice depends on, whoever the host is."""

    name: str
    """The class of the model, for messages."""
    folder: Path | None
    """Where its files are, if that is known."""
    model_type: str
    """Of the whole model."""
    decoder: Any
    """The transformers configuration of its decoder."""
    full_attention: tuple[bool, ...]
    """For every layer, whether it has full attention."""


def resolve(
    model: ModelFacts, config: TidalConfig | None, overrides: dict[str, Any]
) -> tuple[TidalConfig, LayerPlan, str]:
    """The configuration with explicit selection layers, the plan, and why these layers.

    Without ``config``, ``tidal_config.json`` beside the model is the base if there is one, else the
    defaults. ``select_layers="auto"``: that file > published for this model > a rule of thumb.

    Errors: `TidalError` for options that cannot work on this model.
    """
    folder = model.folder
    has_file = folder is not None and (folder / CONFIG_FILE).is_file()
    beside = _load_beside(folder, model) if folder is not None and has_file else None
    base = config or beside or TidalConfig()
    settings = base.replace(**overrides)
    reason = "given"
    if beside is not None and config is None and "select_layers" not in overrides:
        reason = f"calibrated: {folder / CONFIG_FILE}" if folder else reason
    if settings.select_layers == "auto":
        chosen, reason = _choose_layers(model, settings, beside)
        settings = settings.replace(select_layers=chosen)
    assert settings.select_layers != "auto"
    plan = LayerPlan.build(
        len(model.full_attention),
        dense_layers=settings.dense_layers,
        select_layers=settings.select_layers,
        full_attention=model.full_attention,
        estimate=settings.selector == "page_bounds",
    )
    return settings, plan, reason


def _load_beside(folder: Path, model: ModelFacts) -> TidalConfig:
    """The configuration in ``folder``. Errors: `TidalError` when it was made for another model."""
    found = calibrated_model(folder)
    own = {"model_type": model.model_type, "num_layers": len(model.full_attention)}
    differs = [name for name in own if name in found and found[name] != own[name]]
    if differs:
        listed = ", ".join(f"{name} {found[name]!r} for {own[name]!r}" for name in differs)
        raise TidalError(
            f"{folder / CONFIG_FILE}: expected a calibration of this model, got another's ({listed}); "
            "run tidaldecode calibrate anew or remove the file"
        )
    return TidalConfig.load(folder)


def _choose_layers(
    model: ModelFacts, settings: TidalConfig, beside: TidalConfig | None
) -> tuple[tuple[int, ...], str]:
    folder = model.folder
    if beside is not None and folder is not None and beside.select_layers != "auto":
        return beside.select_layers, f"calibrated: {folder / CONFIG_FILE}"
    layers, reason = fallback_layers(model, settings.dense_layers)
    place = f"--model {folder}" if folder is not None and folder.is_dir() else "--model DIR"
    warnings.warn(
        f"{model.name}: selection layers are not calibrated; using {layers} ({reason}). "
        f"The wrong layers can lose most of the quality: run tidaldecode calibrate {place}",
        UncalibratedWarning,
        stacklevel=2,
    )
    return layers, reason


def fallback_layers(model: ModelFacts, dense_layers: int) -> tuple[tuple[int, ...], str]:
    """The selection layers of a model that nobody calibrated, and where they come from."""
    key = (
        model.decoder.model_type,
        len(model.full_attention),
        getattr(model.decoder, "hidden_size", 0),
        getattr(model.decoder, "vocab_size", 0),
    )
    if key in _PUBLISHED:
        layers, source = _PUBLISHED[key]
        return layers, f"published: {source}"
    layers = default_select_layers(model.full_attention, dense_layers)
    return layers, "rule of thumb: the first layer after the dense ones, and one near 0.4 x depth"
