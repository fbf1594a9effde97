"""What a decode step has to read: the bytes model behind every "KV read" figure."""

from __future__ import annotations

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
