"""Which configuration and which layer plan a model gets, and the reason to show for it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidaldecode.algorithm.plan import LayerPlan, default_select_layers
from tidaldecode.config import CONFIG_FILE, TidalConfig, calibrated_model
from tidaldecode.errors import TidalError, UncalibratedWarning
from tidaldecode.integrations.transformers.support import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# (model_type, layers, hidden size, vocabulary) -> selection layers, and who found them.
_PUBLISHED: dict[tuple[str, int, int, int], tuple[tuple[int, ...], str]] = {
    ("llama", 32, 4096, 32000): ((2, 7), "Llama-2-7B, arXiv 2410.05076"),
    ("llama", 32, 4096, 128256): ((2, 13), "Llama-3-8B, arXiv 2410.05076"),
    ("qwen3", 36, 4096, 151936): ((2, 12), "Qwen3-8B, arXiv 2508.07101"),
    ("qwen3", 36, 2560, 151936): ((2, 20), "Qwen3-4B, arXiv 2508.07101"),
}


def resolve_settings(
    model: PreTrainedModel, shape: ModelShape, config: TidalConfig | None, overrides: dict[str, Any]
) -> tuple[TidalConfig, LayerPlan, str]:
    """The configuration with explicit selection layers, the plan, and why these layers.

    Without ``config``, ``tidal_config.json`` beside the model is the base if there is one, else the
    defaults. ``select_layers="auto"``: that file > published for this model > a rule of thumb.

    Errors: `TidalError` for options that cannot work on this model.
    """
    folder = Path(model.name_or_path) if model.name_or_path else None
    has_file = folder is not None and (folder / CONFIG_FILE).is_file()
    beside = _load_beside(folder, model, shape) if folder is not None and has_file else None
    base = config or beside or TidalConfig()
    settings = base.replace(**overrides)
    reason = "given"
    if beside is not None and config is None and "select_layers" not in overrides:
        reason = f"calibrated: {folder / CONFIG_FILE}" if folder else reason
    if settings.select_layers == "auto":
        chosen, reason = _choose_layers(model, shape, settings, beside, folder)
        settings = settings.replace(select_layers=chosen)
    assert settings.select_layers != "auto"
    plan = LayerPlan.build(
        shape.num_layers,
        dense_layers=settings.dense_layers,
        select_layers=settings.select_layers,
        full_attention=shape.full_attention,
        estimate=settings.selector == "page_bounds",
    )
    return settings, plan, reason


def _load_beside(folder: Path, model: PreTrainedModel, shape: ModelShape) -> TidalConfig:
    """The configuration in ``folder``. Errors: `TidalError` when it was made for another model."""
    found = calibrated_model(folder)
    own = {"model_type": model.config.model_type, "num_layers": shape.num_layers}
    differs = [name for name in own if name in found and found[name] != own[name]]
    if differs:
        listed = ", ".join(f"{name} {found[name]!r} for {own[name]!r}" for name in differs)
        raise TidalError(
            f"{folder / CONFIG_FILE}: expected a calibration of this model, got another's ({listed}); "
            "run tidaldecode calibrate anew or remove the file"
        )
    return TidalConfig.load(folder)


def _choose_layers(
    model: PreTrainedModel,
    shape: ModelShape,
    settings: TidalConfig,
    beside: TidalConfig | None,
    folder: Path | None,
) -> tuple[tuple[int, ...], str]:
    if beside is not None and folder is not None and beside.select_layers != "auto":
        return beside.select_layers, f"calibrated: {folder / CONFIG_FILE}"
    layers, reason = fallback_layers(model, shape, settings.dense_layers)
    place = f"--model {folder}" if folder is not None and folder.is_dir() else "--model DIR"
    warnings.warn(
        f"{type(model).__name__}: selection layers are not calibrated; using {layers} ({reason}). "
        f"The wrong layers can lose most of the quality: run tidaldecode calibrate {place}",
        UncalibratedWarning,
        stacklevel=2,
    )
    return layers, reason


def fallback_layers(
    model: PreTrainedModel, shape: ModelShape, dense_layers: int
) -> tuple[tuple[int, ...], str]:
    """The selection layers of a model that nobody calibrated, and where they come from."""
    config = model.get_decoder().config
    key = (
        config.model_type,
        shape.num_layers,
        getattr(config, "hidden_size", 0),
        getattr(config, "vocab_size", 0),
    )
    if key in _PUBLISHED:
        layers, source = _PUBLISHED[key]
        return layers, f"published: {source}"
    layers = default_select_layers(shape.full_attention, dense_layers)
    return layers, "rule of thumb: the first layer after the dense ones, and one near 0.4 x depth"
