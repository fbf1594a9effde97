"""Which layers should select: a greedy search with exchanges, whatever is to be made small.

One wrong layer is fatal and the right ones differ from model to model (paper, section 4.4), so the
search asks for what the model says, through ``measure``, and for nothing cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Layers = tuple[int, ...]


@dataclass
class LayerSearch:
    """A search and all that it measured."""

    measure: Callable[[Layers], float]
    """Loss of a set of selection layers; called once for each."""
    candidates: Sequence[int]
    """Layers that may select; the first of them always does."""
    losses: dict[Layers, float] = field(default_factory=dict)
    """Everything measured, in the order of measuring."""
    best: dict[int, Layers] = field(default_factory=dict)
    """The best set of each size."""
    passes: dict[int, int] = field(default_factory=dict)
    """Measurements that each size took beyond those before."""

    def run(self, count: int, target: float = -math.inf) -> Layers:
        """The best set found with up to ``count`` layers; stops growing at ``target`` or below.

        Every size starts from the best smaller set, adds the layer that helps most, and then tries to
        exchange each earlier one but the first. With L candidates a size n takes at most
        ``(L - n + 1) * (n - 1)`` measurements: 84 for 4 layers out of 31.
        """
        best: Layers = (self.candidates[0],)
        for size in range(1, count + 1):
            before = len(self.losses)
            if size > 1:
                best = self._grow(best)
            for layer in best[1:] if size > 2 else ():
                best = self._exchange(best, layer)
            self.loss(best)
            self.best[size] = best
            self.passes[size] = len(self.losses) - before
            if self.loss(best) <= target:
                break
        return min(self.best.values(), key=self.loss)

    def loss(self, layers: Layers) -> float:
        """The loss of ``layers``, measured at most once."""
        if layers not in self.losses:
            self.losses[layers] = self.measure(layers)
        return self.losses[layers]

    def _grow(self, layers: Layers) -> Layers:
        rest = [layer for layer in self.candidates if layer not in layers]
        return min((tuple(sorted((*layers, layer))) for layer in rest), key=self.loss)

    def _exchange(self, layers: Layers, old: int) -> Layers:
        kept = tuple(layer for layer in layers if layer != old)
        return min(layers, self._grow(kept), key=self.loss)


def predicted_share(shared_mass: Sequence[Sequence[float]], layers: Layers) -> float:
    """What the cheap signal says of ``layers``: the mean mass that sparse layers would keep.

    ``shared_mass[i][j]``: share of its own best tokens' softmax mass that layer j finds in those of
    layer i (the similarity of Kascade, arXiv 2512.16391). Rows and columns as in the model.
    """
    kept = []
    for layer in range(layers[0] + 1, len(shared_mass)):
        if layer not in layers:
            selector = max(chosen for chosen in layers if chosen < layer)
            kept.append(shared_mass[selector][layer])
    return sum(kept) / len(kept) if kept else 1.0


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation of two lists without regard to ties; 1 means equal order."""
    n = len(first)
    if n < 2:
        return 1.0
    ranks = [
        {index: rank for rank, index in enumerate(sorted(range(n), key=values.__getitem__))}
        for values in (first, second)
    ]
    squares = sum((ranks[0][index] - ranks[1][index]) ** 2 for index in range(n))
    return 1 - 6 * squares / (n * (n**2 - 1))
