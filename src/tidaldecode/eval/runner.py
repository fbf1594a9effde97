"""Runs a task by every method: each batch is prefilled once, and every row is stored as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tidaldecode.engine import Engine
from tidaldecode.eval.methods import Method
from tidaldecode.eval.store import Row, RowStore


class Sample(Protocol):
    """What every task's samples have."""

    context_ids: list[int]
    """Tokens to be prefilled densely."""


class Task(Protocol):
    """Samples, and what is measured on them."""

    def keys(self) -> list[str]:
        """Names of all samples, in the order in which they are run."""
        ...

    def build(self, key: str) -> Any:
        """The `Sample` of that name, the same each time."""
        ...

    def measure(
        self, engine: Engine, samples: dict[str, Any], methods: Sequence[Method]
    ) -> Iterator[list[Row]]:
        """Rows of one method after another, for samples that the engine has just prefilled."""
        ...


def run_task(
    task: Task,
    engine: Engine,
    methods: Sequence[Method],
    store: RowStore,
    *,
    batch_size: int = 1,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> list[Row]:
    """All rows of ``task`` by ``methods``; what ``store`` holds already is not run again.

    ``on_rows`` learns how many rows came in, those of an earlier run first.
    """
    on_rows(len(store.rows))
    keys = task.keys()
    for first in range(0, len(keys), batch_size):
        batch = keys[first : first + batch_size]
        missing = [
            method for method in methods if not all(store.has(key, method.name) for key in batch)
        ]
        if not missing:
            continue
        samples = {key: task.build(key) for key in batch}
        engine.prefill([sample.context_ids for sample in samples.values()])
        for rows in task.measure(engine, samples, missing):
            before = len(store.rows)
            store.append(rows)
            on_rows(len(store.rows) - before)
    return store.rows
