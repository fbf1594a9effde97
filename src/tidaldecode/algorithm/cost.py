"""What a decode step has to read: the bytes model behind every "KV read" figure."""

from __future__ import annotations

from dataclasses import dataclass

from tidaldecode.algorithm.held import HeldSelections
from tidaldecode.algorithm.plan import LayerPlan, Role
from tidaldecode.config import TidalConfig


def kv_bytes_per_step(
    plan: LayerPlan,
    config: TidalConfig,
    *,
    context: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    element_bytes: int,
) -> int:
    """Bytes of K and V that the planned layers read for one token of one sequence.

    DENSE and SELECT layers read ``context`` rows of every KV head once; a SPARSE layer reads its
    selected rows, once per set, and an ESTIMATE layer the two bounds of every page as well. Layers of
    the host (sliding windows) are left out.
    """
    sets = {"shared": kv_heads, "kv_head": kv_heads, "query_head": query_heads}[config.granularity]
    sparse_rows = min(context, config.budget) * sets
    # The two bounds of a page are as large as one token's K and V.
    bound_rows = -(-context // config.page_tokens) * kv_heads
    rows = {
        Role.DENSE: context * kv_heads,
        Role.SELECT: context * kv_heads,
        Role.SPARSE: sparse_rows,
        Role.ESTIMATE: sparse_rows + bound_rows,
        Role.HOST: 0,
    }
    return sum(rows[role] for role in plan) * 2 * head_dim * element_bytes


def full_kv_bytes_per_step(
    plan: LayerPlan, *, context: int, kv_heads: int, head_dim: int, element_bytes: int
) -> int:
    """The same for full attention in every planned layer."""
    layers = len(plan) - len(plan.layers(Role.HOST))
    return layers * context * kv_heads * 2 * head_dim * element_bytes


@dataclass(frozen=True)
class KVReads:
    """Both figures for one model, plan and configuration, as functions of the context alone."""

    plan: LayerPlan
    config: TidalConfig
    query_heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int

    def sparse(self, context: int) -> int:
        """Bytes of K and V that a sparse step reads for one row of ``context`` tokens."""
        return kv_bytes_per_step(
            self.plan, self.config, query_heads=self.query_heads, **self._sizes(context)
        )

    def draft(self, context: int, index: int) -> int:
        """The same for token number ``index`` of a draft."""
        if index == 0 or not HeldSelections.wanted(self.config, self.plan):
            return self.sparse(context)
        roles = tuple(Role.HOST if role is Role.HOST else Role.SPARSE for role in self.plan)
        return kv_bytes_per_step(
            LayerPlan(roles, preselected=True),
            self.config.replace(budget=self.config.budget + index),
            query_heads=self.query_heads,
            **self._sizes(context),
        )

    def full(self, context: int) -> int:
        """The same for full attention."""
        return full_kv_bytes_per_step(self.plan, **self._sizes(context))

    def _sizes(self, context: int) -> dict[str, int]:
        return {
            "context": context,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "element_bytes": self.element_bytes,
        }
