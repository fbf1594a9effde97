"""What a vLLM engine is asked to time, and what it answers; goes between processes as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tidaldecode.bench.shapes import KEY_SPREAD

STOCK, TIDAL = "FLASH_ATTN", "TidalDecode"
RANDOM_CONTEXT = {"context": "random"}
"""``kv_transfer_params`` of a request whose prompt is not to be computed."""
CONNECTOR = {
    "kv_connector": "RandomContext",
    "kv_connector_module_path": "tidaldecode.bench.vllm_connector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"fill_mean": 0.0, "fill_std": KEY_SPREAD},
}
"""An engine's ``kv_transfer_config`` that serves such requests."""


@dataclass(frozen=True)
class MixedLoad:
    """Rows that decode long contexts while prompts arrive at fixed times, whoever serves them."""

    rows: int
    context: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    """Of each prompt."""
    interval: float
    """Seconds from one arrival to the next."""


@dataclass(frozen=True)
class Job:
    """One engine's work."""

    method: str
    engine: dict[str, Any]
    """Arguments of ``vllm.LLM``."""
    sizes: list[tuple[int, int]]
    """``(cached tokens, rows)`` of the decode steps to time."""
    steps: int
    warmup: int
    seed: int
    computed: bool
    """Whether contexts are computed by a prefill; random keys and values otherwise."""
    mixed: MixedLoad | None = None

    def save(self, path: Path) -> None:
        """Write it for `load`."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Job:
        """The job in ``path``."""
        values = json.loads(path.read_text(encoding="utf-8"))
        sizes = [(context, rows) for context, rows in values.pop("sizes")]
        mixed = values.pop("mixed")
        return cls(**values, sizes=sizes, mixed=None if mixed is None else MixedLoad(**mixed))


@dataclass(frozen=True)
class Started:
    """An engine that is up."""

    seconds: float
    cache_tokens: int
    """Tokens that its KV cache holds."""
    kind: str = field(default="started", init=False)


@dataclass(frozen=True)
class StepTime:
    """Decode steps of one batch; None where the batch does not fit into the KV cache."""

    context: int
    batch: int
    milliseconds: float | None
    """Median of the timed steps."""
    low_ms: float | None = None
    """10th percentile."""
    high_ms: float | None = None
    """90th percentile."""
    kind: str = field(default="step", init=False)


@dataclass(frozen=True)
class MixedTime:
    """Time per output token, of all rows, and throughput, under a mixed load."""

    p50_ms: float
    p99_ms: float
    first_token_ms: float
    """Median over the prompts, from arrival."""
    tokens_per_second: float
    """Output tokens of all rows."""
    seconds: float
    kind: str = field(default="mixed", init=False)


Result = Started | StepTime | MixedTime
_KINDS: dict[str, type[Result]] = {"started": Started, "step": StepTime, "mixed": MixedTime}


def append_result(path: Path, result: Result) -> None:
    """Add a line, as soon as the result exists."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read_results(path: Path) -> Iterator[Result]:
    """All results so far; a line that is being written is left for later."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            values = json.loads(line)
            yield _KINDS[values.pop("kind")](**values)
