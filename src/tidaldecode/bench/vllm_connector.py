"""Contexts that nobody has to compute: vLLM's own benchmark connector, for the requests that ask for it.

``DecodeBenchConnector`` plays a prefill on another machine: it fills the blocks of a request with random
keys and values, each request its own, and vLLM decodes from there. Here only requests with
``kv_transfer_params`` are treated so; other prompts are computed, as in a server.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector

from tidaldecode.bench.vllm_job import RANDOM_CONTEXT


class RandomContext(DecodeBenchConnector):  # type: ignore[misc]
    """Fills the contexts of requests that say so."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """All tokens but the last of such a request, none of another."""
        if request.kv_transfer_params != RANDOM_CONTEXT:
            return 0, False
        matched: tuple[int | None, bool] = super().get_num_new_matched_tokens(
            request, num_computed_tokens
        )
        return matched
