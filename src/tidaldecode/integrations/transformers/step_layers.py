"""The attention layers of a decode step on the device, and the one operator through which they run.

torch.compile looks into everything that a model does but this operator. What it reads and writes beside
its arguments, the cache and the selection, belongs to the step that is running in this thread: a
compiled model then serves every step. Layers run in the order of their data, and so do side effects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from tidaldecode.algorithm import (
    DecodeState,
    HeldSelections,
    LayerPlan,
    Role,
    decode_attention,
)
from tidaldecode.config import TidalConfig
from tidaldecode.errors import TidalError
from tidaldecode.integrations.transformers.static_cache import FixedCache
from tidaldecode.kernels import append_token, dense_decode, rotate_append
from tidaldecode.kernels.scratch import Scratch

_running: ContextVar[StepLayers] = ContextVar("the step that is running in this thread")


class Rotation(NamedTuple):
    """The rotary embedding of the newest queries and keys, by ``cos, sin [B, T, D]``."""

    cos: torch.Tensor
    sin: torch.Tensor
    q_gain: torch.Tensor | None
    k_gain: torch.Tensor | None
    eps: float


class StepLayers:
    """What the layers of one `DecodeStep` share from step to step.

    Args:
        seq_lens: ``[B]`` int32, the newest token included; starts: ``[B]`` int32.
    """

    def __init__(
        self,
        config: TidalConfig,
        plan: LayerPlan,
        cache: FixedCache,
        seq_lens: torch.Tensor,
        starts: torch.Tensor,
    ) -> None:
        self.config, self.plan, self.cache = config, plan, cache
        self.seq_lens, self.starts = seq_lens, starts
        self.holds: HeldSelections | None = None
        """Where a step leaves its selections for steps after it."""
        self.follows: HeldSelections | None = None
        """Selections of an earlier step, which a step attends to."""
        self._scratch = Scratch()
        self._state: DecodeState | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """While a step runs. It starts with no selection, but of a plan that needs no scores."""
        self._state = DecodeState.begin(
            self.config,
            self.plan,
            self.seq_lens,
            self.starts,
            width=self.cache.capacity,
            scratch=self._scratch,
        )
        self._state.holds, self._state.follows = self.holds, self.follows
        token = _running.set(self)
        self.cache.step(True)
        try:
            yield
        finally:
            self.cache.step(False)
            _running.reset(token)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        window: int | None,
        scale: float,
        rotation: Rotation | None,
    ) -> torch.Tensor:
        """Cache the newest ``k, v [B, Hkv, D]`` and attend with ``q [B, Hq, D]``; returns its like.

        Or the ``T`` newest: ``k, v [B, T, Hkv, D]``, ``q [B, T, Hq, D]``, by full attention. With a
        ``rotation``, ``q`` and ``k`` are still to be rotated.
        """
        assert self._state is not None
        role = self.plan[layer]
        check_window(layer, role, window)
        filled = self.cache.layers[layer]
        backend = self.config.backend
        caches = (filled.keys, filled.values)
        if rotation is None:
            append_token(*caches, k, v, self.seq_lens, backend=backend)
        else:
            angles = (*q.shape[:-2], q.shape[-1])
            cos, sin = rotation.cos.reshape(angles), rotation.sin.reshape(angles)
            q = rotate_append(
                *caches,
                q,
                k,
                v,
                cos,
                sin,
                self.seq_lens,
                q_gain=rotation.q_gain,
                k_gain=rotation.k_gain,
                eps=rotation.eps,
                backend=backend,
            )
        if q.dim() == 4:
            return self._verify(q, filled.keys, filled.values, layer, scale)
        if role is not Role.HOST:
            return decode_attention(
                q, filled.keys, filled.values, layer, self.plan, self._state, scale=scale
            )
        if window is None:
            raise TidalError(
                f"layer {layer}: expected full attention or a sliding window, found neither; this "
                "model cannot decode in a CUDA graph: set cuda_graph=False"
            )
        starts = torch.maximum(self.starts, (self.seq_lens - window).clamp(min=0))
        out, _, _ = dense_decode(
            q,
            filled.keys,
            filled.values,
            self.seq_lens,
            scale=scale,
            starts=starts,
            backend=backend,
        )
        return out

    def _verify(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int, scale: float
    ) -> torch.Tensor:
        """Full attention of the newest queries ``[B, T, Hq, D]``.

        Errors: `TidalError` for a layer that does something else.
        """
        if self.plan[layer] is not Role.DENSE:
            raise TidalError(
                f"layer {layer}: expected full attention where several tokens of a row are verified, "
                f"got plan {self.plan}; use dense_plan(plan)"
            )
        out, _, _ = dense_decode(
            q,
            keys,
            values,
            self.seq_lens,
            scale=scale,
            starts=self.starts,
            backend=self.config.backend,
        )
        return out


def check_window(layer: int, role: Role, window: int | None) -> None:
    """Errors: `TidalError` for a planned layer that the model gives a sliding window."""
    if role is not Role.HOST and window is not None:
        raise TidalError(
            f"layer {layer}: expected full attention, got sliding_window={window} from the model"
        )


@torch.library.custom_op("tidaldecode::step_attention", mutates_args=())
def step_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int,
    window: int | None,
    scale: float,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    q_gain: torch.Tensor | None = None,
    k_gain: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """`StepLayers.attend` of the step that is running; from ``cos`` on, what `Rotation` holds."""
    rotation = None if cos is None or sin is None else Rotation(cos, sin, q_gain, k_gain, eps)
    return _running.get().attend(q, k, v, layer, window, scale, rotation)


@step_attention.register_fake
def _like_q(q: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


STEP_ATTENTION = torch.ops.tidaldecode.step_attention.default
"""The operator in a graph."""
