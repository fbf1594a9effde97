"""Times the kernels of one layer: full attention, selection layers, sparse layers, and their peers.

Every case walks through several layers with K and V of their own, more than the processor's cache
holds. On a GPU they are recorded in one CUDA graph, and what is timed is its replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tidaldecode.bench.peers import peers
from tidaldecode.bench.shapes import KEY_SPREAD
from tidaldecode.bench.timing import Timing, now, summarise
from tidaldecode.errors import TidalError
from tidaldecode.kernels import Selection, dense_decode, dense_select, sparse_decode
from tidaldecode.kernels.scratch import Scratch

_MOST_LAYERS = 16
_ENOUGH_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
"""Bytes of K and V beyond which no further layer is made."""


@dataclass(frozen=True)
class Case:
    """One attention layer: its shape, and what sparse layers read of it."""

    batch: int
    kv_heads: int
    group: int
    head_dim: int
    context: int
    budget: int

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """K and V of all rows."""
        values = 2 * self.batch * self.kv_heads * self.context * self.head_dim
        return values * dtype.itemsize


@dataclass(frozen=True)
class KernelTime:
    """One kernel in one case."""

    case: Case
    kernel: str
    microseconds: float
    """Median over replays, for one layer."""
    low_us: float
    high_us: float
    """10th and 90th percentile."""
    kv_bytes: int
    """K and V that it has to read."""

    @property
    def terabytes_per_second(self) -> float:
        """K and V read over time."""
        return self.kv_bytes / self.microseconds / 1e6


class Layers:
    """K, V, a query and a selection for every layer of a case."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case = case
        shape = (case.batch, case.kv_heads, case.context, case.head_dim)
        layer_bytes = case.kv_bytes(dtype)
        count = max(2, min(_MOST_LAYERS, _ENOUGH_BYTES[device.type] // max(layer_bytes, 1)))

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, device=device, dtype=dtype)

        try:
            self.kv = [(KEY_SPREAD * random(*shape), random(*shape)) for _ in range(count)]
        except torch.cuda.OutOfMemoryError as error:
            raise TidalError(
                f"memory: expected room for {count} layers of {layer_bytes / 2**30:.1f} GiB, found too "
                "little; use a smaller batch or context"
            ) from error
        self.q = random(case.batch, case.kv_heads * case.group, case.head_dim)
        self.seq_lens = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
        self.scale = case.head_dim**-0.5
        self.scratch = Scratch()
        self.selections: list[Selection] = [self._select(k, v) for k, v in self.kv]

    def kernels(self) -> dict[str, Callable[[int], Any]]:
        """What is timed, each for the layer of a number."""
        found: dict[str, Callable[[int], Any]] = {
            "plain sum of K and V": lambda i: [x.sum(dtype=torch.float32) for x in self.kv[i]],
            "torch SDPA": self._sdpa,
            "dense_decode": lambda i: dense_decode(
                self.q, *self.kv[i], self.seq_lens, scale=self.scale
            ),
            f"dense_select {self.case.budget}": lambda i: self._select(*self.kv[i]),
            f"sparse_decode {self.case.budget}": lambda i: sparse_decode(
                self.q, *self.kv[i], self.selections[i], scale=self.scale
            ),
        }
        return {**found, **peers(self.q, self.kv, self.scale)}

    def _select(self, k: torch.Tensor, v: torch.Tensor) -> Selection:
        _, _, selection = dense_select(
            self.q,
            k,
            v,
            self.seq_lens,
            scale=self.scale,
            scores="shared",
            budget=self.case.budget,
            sink_tokens=4,
            recent_tokens=15,
            scratch=self.scratch,
        )
        return selection

    def _sdpa(self, layer: int) -> torch.Tensor:
        k, v = self.kv[layer]
        return torch.nn.functional.scaled_dot_product_attention(
            self.q[:, :, None], k, v, scale=self.scale, enable_gqa=True
        )


def time_case(
    case: Case, device: torch.device, dtype: torch.dtype, repetitions: int
) -> list[KernelTime]:
    """Time every kernel of a case. Errors: `TidalError` where memory is short."""
    layers = Layers(case, device, dtype)
    cached = case.kv_bytes(dtype)
    selected = cached * min(case.budget, case.context) // case.context
    results = []
    for name, kernel in layers.kernels().items():
        timing = _time(kernel, len(layers.kv), device, repetitions)
        results.append(
            KernelTime(
                case,
                name,
                1e3 * timing.median_ms,
                1e3 * timing.low_ms,
                1e3 * timing.high_ms,
                selected if name.startswith("sparse") else cached,
            )
        )
    return results


def _time(
    kernel: Callable[[int], Any], layers: int, device: torch.device, repetitions: int
) -> Timing:
    """Milliseconds a layer, over ``repetitions`` walks through all layers."""

    def walk() -> None:
        for layer in range(layers):
            kernel(layer)

    walk()
    replay: Callable[[], None] = walk
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            walk()
        replay = graph.replay
        for _ in range(3):
            replay()
    times = []
    for _ in range(repetitions):
        begin = now(device)
        replay()
        times.append(1e3 * (now(device) - begin) / layers)
    return summarise(times)


def cases_of(
    config: Any, contexts: Sequence[int], batches: Sequence[int], budgets: Sequence[int]
) -> list[Case]:
    """The attention layers of a model's configuration at all sizes.

    Errors: `TidalError` for a budget that is not smaller than a context.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if max(budgets) >= min(contexts):
        raise TidalError(
            f"budget: expected fewer tokens than every context (at least {min(contexts):,}), got "
            f"{max(budgets):,}"
        )
    return [
        Case(batch, kv_heads, heads // kv_heads, head_dim, context, budget)
        for context in contexts
        for batch in batches
        for budget in budgets
    ]
