"""One evaluation from the command line: model, methods, rows on disk, tables, plots."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tidaldecode.cli.common import load, rows_progress
from tidaldecode.errors import TidalError
from tidaldecode.eval.haystack import source_text
from tidaldecode.eval.methods import Method, parse_methods
from tidaldecode.eval.needle import Haystack
from tidaldecode.eval.report import MethodCost, Report
from tidaldecode.eval.runner import Task, run_task
from tidaldecode.eval.store import RowStore
from tidaldecode.figure import require_matplotlib
from tidaldecode.record import run_record, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer packs into a token of text on average."""
_SPARE_TEXT = 4
"""How many times the longest context is read, so that samples come from different places."""


@dataclass
class Study:
    """What all evaluations need; made by `open`."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    methods: list[Method]
    folder: Path
    plot: bool
    overwrite: bool
    console: Console = field(default_factory=Console)
    store: RowStore | None = None
    text_sha256: str = ""
    """Digest of the text, so that a changed file is not taken for the same run."""

    @classmethod
    def open(
        cls,
        name: str,
        directory: Path | None,
        methods: Sequence[str] | None,
        budgets: Sequence[int] | None,
        *,
        device: str,
        dtype: str,
        output_dir: Path | None,
        plot: bool,
        overwrite: bool,
        usual: Sequence[str] = ("dense", "tidal", "streaming", "quest"),
    ) -> Study:
        """Load the model and read the methods; ``usual`` ones if none are named.

        Errors: `TidalError` for whatever cannot work, before any long work.
        """
        from tidaldecode.integrations.transformers import enable

        if plot:
            require_matplotlib()
        model, tokenizer = load(directory, device, dtype)
        with enable(model) as handle:
            base = handle.config
        chosen = parse_methods(methods or usual, base, sorted(set(budgets or [])))
        for method in chosen:
            if method.config is not None:
                enable(model, method.config).disable()
        folder = output_dir or Path("eval-results") / name
        return cls(name, model, tokenizer, chosen, folder, plot, overwrite)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return str(self.tokenizer.decode(ids))

    def check_context(self, tokens: int) -> None:
        """Refuse what the model was not made for. Errors: `TidalError`."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise TidalError(
                f"context: expected at most {limit:,} tokens for this model, got {tokens:,}; ask for "
                "a shorter context"
            )

    def haystack(self, path: Path | None, tokens: int, seed: int) -> Haystack:
        """The tokenised text of ``path``, or enough of the standard library."""
        characters = tokens * _CHARACTERS_PER_TOKEN * _SPARE_TEXT
        text = source_text(path, min(characters, 8_000_000), seed)
        self.text_sha256 = hashlib.sha256(text.encode()).hexdigest()[:16]
        haystack = Haystack.from_text(text, self.encode, self.decode)
        if len(haystack.ids) <= tokens:
            raise TidalError(
                f"text: expected more than {tokens:,} tokens, found {len(haystack.ids):,}; use a "
                "longer text or a shorter context"
            )
        return haystack

    def run(self, task: Task, batch_size: int, details: dict[str, Any]) -> None:
        """Run what is not on disk yet, with progress. Errors: `TidalError`."""
        keys = task.keys()
        for key in keys:  # what cannot be built is refused before a file is touched
            task.build(key)
        record = run_record(
            task=self.name,
            model=_fingerprint(self.model),
            methods={m.name: m.config.to_dict() if m.config else None for m in self.methods},
            batch_size=batch_size,
            text_sha256=self.text_sha256,
            **details,
        )
        path = self.folder / f"{self.name}.jsonl"
        self.store = store = RowStore(path, record, overwrite=self.overwrite)
        if store.rows:
            self.console.print(f"continuing {path}: {len(store.rows):,} rows are there")
        from tidaldecode.integrations.transformers.engine import TransformersEngine

        engine = TransformersEngine(self.model)
        with rows_progress(self.console) as progress:
            bar = progress.add_task("rows", total=len(keys) * len(self.methods))
            run_task(
                task,
                engine,
                self.methods,
                store,
                batch_size=batch_size,
                on_rows=lambda count: progress.update(bar, advance=count),
            )

    def finish(
        self,
        make: Callable[[Report], list[dict[str, Any]]],
        json_file: Path | None,
        *,
        context: int,
    ) -> None:
        """Print the table, write the summary and the plots."""
        assert self.store is not None
        report = Report(
            rows=self.store.rows,
            record=self.store.record,
            methods=self.methods,
            costs={m.name: self._cost(m, context) for m in self.methods},
            context=context,
            folder=self.folder if self.plot else None,
            console=self.console,
        )
        result = {"record": report.record, "summary": make(report)}
        for path in filter(None, [self.folder / f"{self.name}.json", json_file]):
            report.written.append(write_json(path, result))
        for path in report.written:
            self.console.print(f"wrote {path}", soft_wrap=True)

    def _cost(self, method: Method, context: int) -> MethodCost:
        from tidaldecode.integrations.transformers.footprint import measure_footprint

        kv = measure_footprint(self.model, method.config, context)
        plan = "" if kv.plan is None else str(kv.plan)
        return MethodCost(plan, kv.attended_tokens, kv.kv_bytes, kv.full_bytes)


def _fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What tells a model from another, as far as a record needs it."""
    settings = model.config.to_json_string(use_diff=True)
    return {
        "directory": str(model.name_or_path),
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config_sha256": hashlib.sha256(settings.encode()).hexdigest()[:16],
    }
