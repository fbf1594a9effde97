"""Calibrates a model: prompts are prefilled once, and every candidate plan decodes them anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidaldecode.algorithm.calibration import (
    Layers,
    LayerSearch,
    predicted_share,
    rank_correlation,
)
from tidaldecode.calibrate import MOST_LAYERS
from tidaldecode.config import Granularity, TidalConfig
from tidaldecode.errors import TidalError
from tidaldecode.eval.divergence import Divergence, make_prompts
from tidaldecode.eval.haystack import source_text
from tidaldecode.eval.needle import Haystack
from tidaldecode.integrations.shape import ModelShape
from tidaldecode.integrations.transformers.engine import TransformersEngine
from tidaldecode.integrations.transformers.settings import fallback_layers
from tidaldecode.integrations.transformers.support import inspect_model

ENOUGH_KL = 0.005
"""KL in nats a token below which no further selection layer is tried unless asked for."""
_CHARACTERS_PER_TOKEN = 32
"""Of text that is read for one token of a prompt: several prompts from different places."""


@dataclass(frozen=True)
class Request:
    """What is asked of a calibration."""

    budget: int
    count: int | None
    """Selection layers; None: as few as suffice."""
    context: int
    needles: int
    passages: int
    granularity: Granularity
    seed: int
    text: str | None = None
    """Path of the text; None: the standard library."""


@dataclass(frozen=True)
class Outcome:
    """What a calibration found; losses are KL to full attention in nats a token."""

    request: Request
    config: TidalConfig
    search: LayerSearch
    default: Layers
    default_reason: str
    """The layers that would have been used without a calibration, and why."""
    shared_mass: list[list[float]]
    signal_correlation: float
    """Rank correlation of the cheap signal with the KL, over sets of two layers."""
    signal_best: Layers
    """The two layers that the cheap signal would have chosen."""
    shape: ModelShape
    model_type: str
    seconds: float

    @property
    def passes(self) -> int:
        """Decode passes in all, the one for full attention and the one for the signal included."""
        return len(self.search.losses) + 2


def calibrate_model(
    model: Any,
    tokenizer: Any,
    request: Request,
    on_pass: Callable[[int], None] = lambda passes: None,
) -> Outcome:
    """Search the selection layers of ``model``; ``on_pass`` learns how many passes are done.

    Errors: `TidalError` for a model that cannot be planned, or a text that is too short.
    """
    begin = time.perf_counter()
    _, shape = inspect_model(model)
    base = TidalConfig(budget=request.budget, granularity=request.granularity)
    candidates = _candidates(shape, base.dense_layers)
    limit = getattr(model.config, "max_position_embeddings", request.context)
    if request.needles + request.passages < 1 or not 64 <= request.context <= limit:
        raise TidalError(
            f"context: expected 64 to {limit:,} tokens and at least one prompt, got "
            f"{request.context:,} tokens and {request.needles + request.passages} prompts"
        )
    if request.count is not None and request.count > len(candidates):
        raise TidalError(
            f"count: expected at most {len(candidates)} selection layers for this model, got "
            f"{request.count}"
        )
    if request.budget >= request.context:
        raise TidalError(
            f"budget: expected fewer tokens than the context's {request.context:,}, got "
            f"{request.budget:,}; there would be nothing to choose"
        )

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    path = Path(request.text) if request.text else None
    text = source_text(path, request.context * _CHARACTERS_PER_TOKEN, request.seed)
    prompts = make_prompts(
        Haystack.from_text(text, encode, tokenizer.decode),
        encode,
        context=request.context,
        needles=request.needles,
        passages=request.passages,
        seed=request.seed,
    )
    study = Divergence(TransformersEngine(model), prompts)

    def measure(layers: Layers) -> float:
        loss = study.measure(base.replace(select_layers=layers))
        on_pass(len(search.losses) + 1)
        return loss

    search = LayerSearch(measure, candidates)
    if request.count:
        search.run(request.count)
        best = search.best[request.count]
    else:
        best = search.run(min(MOST_LAYERS, len(candidates)), ENOUGH_KL)
    default, reason = fallback_layers(model, shape, base.dense_layers)
    search.loss(default)
    every = base.replace(select_layers=candidates)
    mass = study.shared_mass(every.replace(granularity="shared"), shape.num_layers)
    pairs: list[Layers] = [(candidates[0], layer) for layer in candidates[1:]]
    predicted = {pair: predicted_share(mass, pair) for pair in pairs}
    measured = [pair for pair in pairs if pair in search.losses]
    return Outcome(
        request=request,
        config=base.replace(select_layers=best),
        search=search,
        default=default,
        default_reason=reason,
        shared_mass=mass,
        signal_correlation=rank_correlation(
            [predicted[pair] for pair in measured], [-search.losses[pair] for pair in measured]
        ),
        signal_best=max(pairs, key=lambda pair: predicted[pair]),
        shape=shape,
        model_type=model.config.model_type,
        seconds=time.perf_counter() - begin,
    )


def most_passes(model: Any, count: int | None) -> int:
    """An upper bound of the decode passes of a calibration, for a progress bar."""
    _, shape = inspect_model(model)
    candidates = len(_candidates(shape, TidalConfig().dense_layers))
    sizes = range(1, (count or MOST_LAYERS) + 1)
    per_size = [1 if n == 1 else (candidates - n + 1) * max(1, n - 1) for n in sizes]
    return sum(per_size) + 1


def _candidates(shape: ModelShape, dense_layers: int) -> tuple[int, ...]:
    """Layers that can select: full attention, after the dense ones, and with a layer to serve."""
    full = [layer for layer, is_full in enumerate(shape.full_attention) if is_full]
    candidates = tuple(full[dense_layers:-1])
    if len(candidates) < 2:
        raise TidalError(
            f"model: expected at least {dense_layers + 3} layers with full attention, found "
            f"{len(full)}; there is nothing to choose"
        )
    return candidates
