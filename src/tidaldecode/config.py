"""`TidalConfig`: everything a user can set, and the only place where a default is written."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tidaldecode.errors import TidalError

CONFIG_FILE = "tidal_config.json"

Granularity = Literal["shared", "kv_head", "query_head"]
Score = Literal["softmax", "logits"]
Selector = Literal["attention", "page_bounds"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "granularity": ("shared", "kv_head", "query_head"),
    "score": ("softmax", "logits"),
    "selector": ("attention", "page_bounds"),
    "mode": ("sparse", "lossless"),
    "backend": ("auto", "torch", "numba", "triton"),
    "cuda_graph": ("auto", "compiled", False),
    "draft_selection": ("round", "token"),
}
_NOTES = ("model", "calibration")
"""What a calibration adds to the file: the model it is for, and how it was found."""


@dataclass(frozen=True)
class TidalConfig:
    """How a model decodes. Errors: `TidalError` for a value that cannot work.

    The budget counts everything a sparse layer reads: sinks, recents and the newest token included.
    """

    budget: int = 1024
    """Tokens that a sparse layer attends to, N."""
    dense_layers: int = 2
    """Leading full-attention layers that stay dense (the paper's layers 0 and 1)."""
    select_layers: tuple[int, ...] | Literal["auto"] = "auto"
    """Layers that do full attention and pick the tokens; numbers as in the model. With none, ``()``,
    sparse layers read sinks and recents alone (StreamingLLM, arXiv 2309.17453)."""
    granularity: Granularity = "shared"
    """One set of tokens for all heads, one per KV head, or one per query head."""
    score: Score = "softmax"
    """What ranks tokens: softmax probability summed over the heads that share a set, or, with
    ``query_head`` only, the raw logit."""
    selector: Selector = "attention"
    """Who picks the tokens: selection layers by their exact attention, or, as a baseline, every layer
    for itself by the bounds of its pages (Quest, arXiv 2406.10774); it then has no selection layers."""
    page_tokens: int = 16
    """Tokens of a page, where pages are ranked."""
    sink_tokens: int = 4
    """First tokens of a sequence that are always selected."""
    recent_tokens: int = 15
    """Tokens just before the newest one that are always selected; the newest one is, in any case."""
    backend: Literal["auto", "torch", "numba", "triton"] = "auto"
    """Kernels to run."""
    mode: Literal["sparse", "lossless"] = "sparse"
    """Sparse attention's output, or full attention's own: sparse drafts, verified densely."""
    correct_every: int | None = None
    """Cache correction: decoded tokens between two dense recomputations; None for never."""
    draft_tokens: int | Literal["auto"] = "auto"
    """Tokens drafted between two verifications, in lossless mode; ``"auto"`` follows the measured
    acceptance and costs."""
    draft_selection: Literal["round", "token"] = "round"
    """How often drafts select, in lossless mode: once for all tokens of a draft, which later ones attend
    to in every layer, or for every token."""
    cuda_graph: Literal["auto", "compiled", False] = "auto"
    """Whether a decode step, or a round of lossless decoding, runs as CUDA graphs on a GPU;
    ``"compiled"``: after torch.compile has fused the small operations of each step, which takes a minute
    or so before the first one."""

    def __post_init__(self) -> None:
        if self.select_layers != "auto":
            object.__setattr__(self, "select_layers", _layer_numbers(self.select_layers))
        for name, lowest in (
            ("budget", 1),
            ("dense_layers", 0),
            ("sink_tokens", 0),
            ("recent_tokens", 0),
            ("page_tokens", 1),
        ):
            _check_whole_number(name, getattr(self, name), lowest)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                listed = " or ".join(repr(choice) for choice in choices)
                raise TidalError(f"{name}: expected {listed}, got {value!r}")
        if self.correct_every is not None:
            _check_whole_number("correct_every", self.correct_every, 1)
        if self.draft_tokens != "auto":
            _check_whole_number("draft_tokens", self.draft_tokens, 1, "'auto' or ")
        self._check_mode()
        forced = self.sink_tokens + self.recent_tokens + 1
        if self.budget < forced:
            raise TidalError(
                f"budget: expected at least {forced} tokens (sink_tokens={self.sink_tokens} + "
                f"recent_tokens={self.recent_tokens} + the newest), got {self.budget}; "
                "raise the budget or lower sink_tokens and recent_tokens"
            )
        if self.selector == "page_bounds":
            self._check_page_bounds()
        elif self.select_layers == () and self.budget != forced:
            raise TidalError(
                f"budget: expected sink_tokens + recent_tokens + 1 = {forced} where no layer selects "
                f"(nothing else is read), got {self.budget}; name select_layers or set budget={forced}"
            )
        if self.score == "logits" and self.granularity != "query_head":
            raise TidalError(
                "score: expected 'softmax' where heads share a set (logits of different heads are "
                f"on different scales), got 'logits' with granularity={self.granularity!r}; "
                "use granularity='query_head'"
            )

    def _check_mode(self) -> None:
        lossless = self.mode == "lossless"
        if lossless and self.correct_every is not None:
            raise TidalError(
                "correct_every: expected None in lossless mode, where every verification rewrites the "
                f"cache densely, got {self.correct_every}; leave it out or use mode='sparse'"
            )
        if not lossless and self.draft_tokens != "auto":
            raise TidalError(
                "draft_tokens: expected 'auto' where nothing is drafted, got "
                f"{self.draft_tokens} with mode='sparse'; use mode='lossless'"
            )
        if not lossless and self.draft_selection != "round":
            raise TidalError(
                "draft_selection: expected 'round' where nothing is drafted, got "
                f"{self.draft_selection!r} with mode='sparse'; use mode='lossless'"
            )
        if self.cuda_graph == "compiled" and self.correct_every is not None:
            raise TidalError(
                "cuda_graph: expected 'auto' or False with correct_every, which runs without a graph, "
                "got 'compiled'"
            )

    def _check_page_bounds(self) -> None:
        for name, wanted in (
            ("select_layers", ()),
            ("granularity", "query_head"),
            ("score", "logits"),
        ):
            if getattr(self, name) != wanted:
                raise TidalError(
                    f"{name}: expected {wanted!r} where every layer ranks its own pages, since bounds "
                    f"are logits of one head, got {getattr(self, name)!r}; use preset 'quest'"
                )

    @classmethod
    def preset(cls, name: str, *, budget: int = 1024, **overrides: Any) -> TidalConfig:
        """A published system under our roof: ``paper``, ``lessismore``, ``streaming`` or ``quest``.

        ``paper`` (arXiv 2410.05076): a set per query head, ranked by raw logits, no forced tokens
        but the newest. ``lessismore`` (arXiv 2508.07101): one set for all heads, 4 sinks, and a
        quarter of the budget for the most recent tokens. ``streaming`` (arXiv 2309.17453): every
        layer reads 4 sinks and the most recent tokens, and nothing is selected. ``quest`` (arXiv
        2406.10774): every layer but two ranks pages of 16 tokens by bounds, for each query head.

        Errors: `TidalError` for an unknown name, or values that cannot work.
        """
        _check_whole_number("budget", budget, 1)
        presets: dict[str, dict[str, Any]] = {
            "paper": {
                "granularity": "query_head",
                "score": "logits",
                "sink_tokens": 0,
                "recent_tokens": 0,
            },
            "lessismore": {
                "granularity": "shared",
                "score": "softmax",
                "sink_tokens": 4,
                "recent_tokens": max(budget // 4 - 1, 0),
            },
            "streaming": {
                "dense_layers": 0,
                "select_layers": (),
                "sink_tokens": 4,
                "recent_tokens": budget - 5,
            },
            "quest": {
                "selector": "page_bounds",
                "select_layers": (),
                "granularity": "query_head",
                "score": "logits",
                "sink_tokens": 0,
                "recent_tokens": 0,
            },
        }
        if name not in presets:
            raise TidalError(f"preset: expected one of {', '.join(presets)}, got {name!r}")
        return cls.from_dict({"budget": budget, **presets[name], **overrides})

    def replace(self, **changes: Any) -> TidalConfig:
        """A copy with some values changed. Errors: `TidalError` for an unknown or bad option."""
        self._check_names(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = dataclasses.asdict(self)
        if self.select_layers != "auto":
            values["select_layers"] = list(self.select_layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TidalConfig:
        """Inverse of `to_dict`. Errors: `TidalError` for an unknown or bad option."""
        cls._check_names(values)
        return cls(**values)

    def save(self, directory: str | Path) -> Path:
        """Write ``tidal_config.json`` into ``directory`` and return its path."""
        from tidaldecode.record import write_json

        return write_json(Path(directory) / CONFIG_FILE, self.to_dict())

    @classmethod
    def load(cls, directory: str | Path) -> TidalConfig:
        """Read ``tidal_config.json`` from ``directory``.

        Errors: `TidalError` when it is missing, is not JSON, or holds a bad option.
        """
        values = _read(Path(directory) / CONFIG_FILE)
        settings = {name: value for name, value in values.items() if name not in _NOTES}
        try:
            return cls.from_dict(settings)
        except TidalError as error:
            raise TidalError(f"{Path(directory) / CONFIG_FILE}: {error}") from error

    @classmethod
    def _check_names(cls, values: dict[str, Any]) -> None:
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise TidalError(
                f"option: expected one of {', '.join(known)}, got {', '.join(map(repr, unknown))}"
            )


def calibrated_model(directory: str | Path) -> dict[str, Any]:
    """What the file says of the model it was made for (``model_type``, ``num_layers``), or ``{}``.

    Errors: `TidalError` as in `TidalConfig.load`.
    """
    path = Path(directory) / CONFIG_FILE
    model = _read(path).get("model", {})
    if not isinstance(model, dict):
        raise TidalError(f"{path}: expected model to be a JSON object, got {type(model).__name__}")
    return model


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TidalError(f"{path}: expected a readable JSON file, got: {error}") from error
    if not isinstance(values, dict):
        raise TidalError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _check_whole_number(name: str, value: Any, lowest: int, otherwise: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise TidalError(
            f"{name}: expected {otherwise}a whole number from {lowest} up, got {value!r}"
        )


def _layer_numbers(value: Any) -> tuple[int, ...]:
    """Check and normalise explicit selection layers."""
    items = tuple(value) if isinstance(value, (list, tuple)) else (None,)
    whole = all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items
    )
    if not whole or sorted(set(items)) != list(items):
        raise TidalError(
            "select_layers: expected 'auto' or ascending layer numbers such as (2, 13), "
            f"got {value!r}"
        )
    return items
