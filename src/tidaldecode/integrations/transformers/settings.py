"""Which configuration and which layer plan a transformers model gets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidaldecode.algorithm.plan import LayerPlan
from tidaldecode.config import TidalConfig
from tidaldecode.integrations import settings
from tidaldecode.integrations.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve_settings(
    model: PreTrainedModel, shape: ModelShape, config: TidalConfig | None, overrides: dict[str, Any]
) -> tuple[TidalConfig, LayerPlan, str]:
    """`tidaldecode.integrations.settings.resolve` for a transformers model."""
    return settings.resolve(_facts(model, shape), config, overrides)


def fallback_layers(
    model: PreTrainedModel, shape: ModelShape, dense_layers: int
) -> tuple[tuple[int, ...], str]:
    """The selection layers of a model that nobody calibrated, and where they come from."""
    return settings.fallback_layers(_facts(model, shape), dense_layers)


def _facts(model: PreTrainedModel, shape: ModelShape) -> settings.ModelFacts:
    return settings.ModelFacts(
        name=type(model).__name__,
        folder=Path(model.name_or_path) if model.name_or_path else None,
        model_type=model.config.model_type,
        decoder=model.get_decoder().config,
        full_attention=shape.full_attention,
    )
