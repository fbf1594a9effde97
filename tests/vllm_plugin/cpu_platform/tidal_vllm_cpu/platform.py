"""A platform that honours the chosen attention backend, and the operators that the wheel lacks on a CPU.

vLLM's own CPU platform knows one attention backend only, and its operators are in another build.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

PLUGIN = "tidaldecode.integrations.vllm.backend.TidalBackend"
STOCK = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
# FlashAttention has no CPU kernels: a base that has, and the same mixins on it.
ON_CPU = {
    PLUGIN: "tidal_vllm_cpu.backend.TidalTorchBackend",
    STOCK: "tidal_vllm_cpu.backend.DenseBackend",
}


def activate() -> str | None:
    """Entry point of the group vllm.platform_plugins: the platform's path, where a test asks for it."""
    if os.environ.get("TIDAL_VLLM_CPU") != "1":
        return None
    define_operators()
    return "tidal_vllm_cpu.platform.TestPlatform"


def __getattr__(name: str) -> Any:
    # Made on demand: vLLM must have chosen its platform's module before that of CPUs can be imported.
    if name != "TestPlatform":
        raise AttributeError(name)
    from vllm.platforms.cpu import CpuPlatform

    class TestPlatform(CpuPlatform):
        """CPU, with the attention backend that was asked for."""

        @classmethod
        def get_attn_backend_cls(
            cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
        ) -> str:
            path: str = selected_backend.get_path()
            return ON_CPU.get(path, path)

    globals()[name] = TestPlatform
    return TestPlatform


_LIBRARIES: list[Any] = []


def define_operators() -> None:
    """Python twins of the C++ operators that a small Llama needs. Idempotent."""
    if _LIBRARIES:
        return
    import torch

    library = torch.library.Library("_C", "FRAGMENT")
    _LIBRARIES.append(library)

    def define(signature: str, function: Any) -> None:
        name = signature.split("(")[0]
        if not hasattr(torch.ops._C, name):
            library.define(signature)
            library.impl(name, function, "CompositeExplicitAutograd")

    define("init_cpu_memory_env(int[] nodes) -> ()", lambda nodes: None)
    define("init_cpu_threads_env(str cpus) -> str", lambda cpus: "")
    define("rms_norm(Tensor! out, Tensor x, Tensor? weight, float epsilon) -> ()", rms_norm)
    define(
        "fused_add_rms_norm(Tensor! x, Tensor! residual, Tensor? weight, float epsilon) -> ()",
        fused_add_rms_norm,
    )
    define("silu_and_mul(Tensor! out, Tensor x) -> ()", silu_and_mul)
    define(
        "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, "
        "Tensor cos_sin_cache, bool is_neox) -> ()",
        rotary_embedding,
    )
    define(
        "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, "
        "Tensor block_table, Tensor! slot_mapping, int block_size) -> ()",
        compute_slot_mapping,
    )
    define("greedy_argmax(Tensor logits) -> Tensor", lambda logits: logits.argmax(-1))


def rms_norm(out: Any, x: Any, weight: Any, epsilon: float) -> None:
    normed = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    out.copy_(normed.to(x.dtype) if weight is None else normed.to(x.dtype) * weight)


def fused_add_rms_norm(x: Any, residual: Any, weight: Any, epsilon: float) -> None:
    residual.add_(x)
    rms_norm(x, residual, weight, epsilon)


def silu_and_mul(out: Any, x: Any) -> None:
    import torch

    gate, up = x.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def rotary_embedding(
    positions: Any, query: Any, key: Any, head_size: int, cos_sin_cache: Any, is_neox: bool
) -> None:
    import torch

    assert is_neox and cos_sin_cache.shape[-1] == head_size
    cos, sin = cos_sin_cache[positions.flatten()].unsqueeze(1).chunk(2, dim=-1)
    for states in (query, key):
        if states is None:
            continue
        heads = states.view(positions.numel(), -1, head_size)
        first, second = heads.float().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        heads.copy_(turned)


def compute_slot_mapping(
    query_start_loc: Any, positions: Any, block_table: Any, slot_mapping: Any, block_size: int
) -> None:
    starts = query_start_loc.tolist()
    for row, (start, end) in enumerate(pairwise(starts)):
        place = positions[start:end]
        blocks = block_table[row].long()[place // block_size]
        slot_mapping[start:end] = blocks * block_size + place % block_size
    slot_mapping[starts[-1] :].fill_(-1)
