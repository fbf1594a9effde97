"""The demo: needles in the source of the running Python's standard library.

Every question is answered by full attention, by TidalDecode at several budgets, and by sinks and
recent tokens alone, on the same prefilled context.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tidaldecode.algorithm.plan import LayerPlan
from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError
from tidaldecode.eval.haystack import standard_library_text
from tidaldecode.eval.methods import Method
from tidaldecode.eval.needle import Haystack
from tidaldecode.eval.needle_task import NeedleGrid, NeedleTask
from tidaldecode.eval.runner import run_task
from tidaldecode.eval.store import Row, RowStore
from tidaldecode.integrations.transformers import enable
from tidaldecode.integrations.transformers.engine import TransformersEngine
from tidaldecode.integrations.transformers.footprint import measure_footprint

DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
SMALLEST_CONTEXT = 1024
FULL = "full attention"
_RECENT = 64
_SINKS = 4
_CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer packs into a token of source code on average."""


@dataclass(frozen=True)
class MethodSummary:
    """What the demo's table shows of one method."""

    method: str
    exact: int
    questions: int
    attended_tokens: int
    """Tokens that a sparse layer attends to at the longest context."""
    kv_bytes: int
    """Bytes of K and V read per step at the longest context."""
    kv_ratio: float
    """Full attention's bytes over this method's."""
    step_ms: float
    """Median wall time of a decode step at the longest context, milliseconds."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Demo:
    """A model, what it is asked and how it answers; `run` asks."""

    model: Any
    tokenizer: Any
    methods: tuple[Method, ...]
    grid: NeedleGrid
    plan: LayerPlan
    plan_reason: str

    @classmethod
    def prepare(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        context: int,
        budgets: Sequence[int],
        samples: int,
        distractors: int,
        seed: int,
    ) -> Demo:
        """Check the request against the model before any long work.

        Errors: `TidalError` for a context beyond the model's or too short, or a bad budget.
        """
        limit = model.config.max_position_embeddings
        if not SMALLEST_CONTEXT <= context <= limit:
            raise TidalError(
                f"context: expected {SMALLEST_CONTEXT:,} to {limit:,} tokens for this model, got "
                f"{context:,}"
            )
        base = TidalConfig.load(model.name_or_path)
        sparse = [Method(f"tidal, budget {size}", base.replace(budget=size)) for size in budgets]
        streaming = TidalConfig.preset("streaming", budget=_SINKS + _RECENT)
        with enable(model) as handle:
            plan, reason = handle.plan, handle.reason
        contexts = tuple(sorted({max(context // 4, SMALLEST_CONTEXT), context // 2, context}))
        return cls(
            model=model,
            tokenizer=tokenizer,
            methods=(
                Method(FULL, None),
                *sparse,
                Method(f"{_SINKS} sinks + {_RECENT} recent", streaming),
            ),
            grid=NeedleGrid(contexts, DEPTHS, samples, distractors, seed=seed),
            plan=plan,
            plan_reason=reason,
        )

    @property
    def questions(self) -> int:
        """How many questions every method is asked."""
        return len(self.grid.contexts) * len(self.grid.depths) * self.grid.samples

    def run(self, on_rows: Callable[[int], None]) -> list[Row]:
        """Ask everything; ``on_rows`` learns how many answers came in."""

        def encode(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)

        longest = max(self.grid.contexts)
        text = standard_library_text(longest * _CHARACTERS_PER_TOKEN, self.grid.seed)
        haystack = Haystack.from_text(text, encode, self.tokenizer.decode)
        task = NeedleTask(haystack, encode, self.tokenizer.decode, self.grid)
        engine = TransformersEngine(self.model)
        return run_task(task, engine, self.methods, RowStore(None, {}), on_rows=on_rows)

    def summarise(self, rows: Sequence[Row]) -> list[MethodSummary]:
        """One line per method."""
        return [self._summarise(method, rows) for method in self.methods]

    def _summarise(self, method: Method, rows: Sequence[Row]) -> MethodSummary:
        mine = [row for row in rows if row["method"] == method.name]
        longest = max(self.grid.contexts)
        kv = measure_footprint(self.model, method.config, longest)
        times = [row["step_ms"] for row in mine if row["context"] == longest]
        return MethodSummary(
            method=method.name,
            exact=sum(row["exact"] for row in mine),
            questions=len(mine),
            attended_tokens=kv.attended_tokens,
            kv_bytes=kv.kv_bytes,
            kv_ratio=kv.full_bytes / kv.kv_bytes,
            step_ms=statistics.median(times) if times else math.nan,
        )
