"""One decode step of a whole model with everything on the device: one CUDA graph, whatever the length.

Lengths, positions and the next token live in tensors that the step itself moves on, so a replay needs
nothing from the host. On a CPU the same step runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tidaldecode.algorithm import HeldSelections, LayerPlan, Role
from tidaldecode.config import TidalConfig
from tidaldecode.errors import ShortOfMemoryError, TidalError
from tidaldecode.integrations.transformers import compiler
from tidaldecode.integrations.transformers.attention import KEYWORD, Forward
from tidaldecode.integrations.transformers.static_cache import FixedCache
from tidaldecode.integrations.transformers.step_layers import StepLayers
from tidaldecode.integrations.transformers.support import inspect_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARM_UPS = 2
_Result = TypeVar("_Result")


class DecodeStep:
    """Decodes one token for each of ``batch`` rows, and again, up to ``capacity`` tokens.

    Args:
        model: an enabled model; its attention function must be ours.
        config, plan: what its layers do. A plan of dense layers only is full attention.
        capacity: tokens that the cache of a row holds.

    Errors: `TidalError` for layers that cannot run from the device, and when memory is short.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TidalConfig,
        plan: LayerPlan,
        *,
        batch: int,
        capacity: int,
    ) -> None:
        device = model.device
        self.model, self.config, self.plan = model, config, plan
        self.batch, self.capacity = batch, capacity
        self.cache = FixedCache(len(plan.roles), capacity)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        """What the next step decodes; a step leaves the most likely next tokens here."""
        self.starts = torch.zeros(batch, dtype=torch.int32, device=device)
        self.seq_lens = torch.ones(batch, dtype=torch.int32, device=device)
        self.logits: torch.Tensor | None = None
        """``[B, vocabulary]``: what the last step found; overwritten by the next."""
        self.length = 0
        self._position_ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._pace = torch.ones(batch, dtype=torch.int32, device=device)
        """Tokens that a step adds to a row: one, or none where the row rests."""
        self._layers = StepLayers(config, plan, self.cache, self.seq_lens, self.starts)
        self._call = _decode
        if config.cuda_graph == "compiled":
            self._call = torch.compile(_decode, dynamic=False, fullgraph=True, **compiler.COMPILER)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._host_mask = _pass_through_mask(model, device)

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Empty the cache and prefill prompts ``[B, S]``, padded on the left where ``mask`` is 0.

        Returns the logits after the last token ``[B, vocabulary]``.

        Errors: `TidalError` for padding elsewhere, or prompts that do not fit.
        """
        length = ids.shape[1]
        if length > self.capacity:
            raise TidalError(f"prompt: expected at most {self.capacity:,} tokens, got {length:,}")
        starts = None if mask is None else _left_padding(mask, length)
        padding: dict[str, Any] = {}
        if starts is not None and bool((starts > 0).any()):
            positions = (torch.arange(length, device=ids.device)[None] - starts[:, None]).clamp(
                min=0
            )
            padding = {"attention_mask": mask, "position_ids": positions}
        self.cache.fill(0)
        output = self._with_enough_memory(
            lambda: self.model(
                ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **padding
            )
        )
        self.resume(length, starts)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def resume(self, length: int, starts: torch.Tensor | None = None) -> None:
        """Go on from ``length`` cached tokens; ``starts [B]``: where rows begin, 0 by default."""
        self.length = length
        self.cache.fill(length)
        self.seq_lens.fill_(length + 1)
        self._pace.fill_(1)
        if starts is None:
            self.starts.zero_()
        else:
            self.starts.copy_(starts)
        self._position_ids.copy_((length - self.starts)[:, None])

    @torch.inference_mode()
    def run(self) -> torch.Tensor:
        """Decode ``tokens``; returns the logits ``[B, vocabulary]``, valid until the next step.

        Errors: `TidalError` when the cache is full.
        """
        if self.length >= self.capacity:
            raise TidalError(
                f"cache: expected room for another token, found all {self.capacity:,} taken; make a "
                "step of larger capacity"
            )
        self.replay()
        self.length += 1
        assert self.logits is not None
        return self.logits

    def place(self, tokens: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Go on from rows of different lengths: ``tokens [B, 1]`` are the last of ``seq_lens [B]``.

        A row that ends where it starts rests: it reads and writes no keys and values.
        """
        self.tokens.copy_(tokens)
        self.seq_lens.copy_(seq_lens)
        self._pace.copy_(seq_lens > self.starts)
        self._position_ids.copy_((seq_lens - 1 - self.starts).clamp(min=0)[:, None])

    def rest(self, rows: torch.Tensor) -> None:
        """Let ``rows [B]``, booleans on the device, read and write nothing until the next rows come.

        Their logits are void from then on.
        """
        self.seq_lens.copy_(torch.where(rows, self.starts, self.seq_lens))
        self._pace.masked_fill_(rows, 0)

    def prepare(self) -> None:
        """Capture the step if that is still to be done; needs a prefilled cache."""
        if self.tokens.is_cuda and self._graph is None:
            self._capture()

    def replay(self) -> None:
        """Run once from what the device holds; the caller sees to it that the cache has room."""
        self.prepare()
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def use_cache(self, cache: FixedCache) -> None:
        """Decode on a cache that another step of the same shape has filled.

        Errors: `TidalError` for a cache of another capacity, or after the first step.
        """
        if cache.capacity != self.capacity or self._graph is not None:
            raise TidalError(
                f"cache: expected one of {self.capacity:,} tokens before the first step, got one of "
                f"{cache.capacity:,} tokens"
            )
        self.cache = self._layers.cache = cache

    def share_rows(self, other: DecodeStep) -> None:
        """Decode the rows of ``other`` from now on, on its cache and from where it stands."""
        self.tokens, self.seq_lens, self.starts = other.tokens, other.seq_lens, other.starts
        self._position_ids, self._pace = other._position_ids, other._pace
        self._layers = StepLayers(self.config, self.plan, other.cache, self.seq_lens, self.starts)
        self.use_cache(other.cache)

    def hold_selections(self, held: HeldSelections) -> None:
        """Leave the selections of every step in ``held``, for steps after it."""
        self._layers.holds = held

    def close(self) -> None:
        """Give the memory of the graph and the cache back."""
        self._graph = self.logits = None
        self.cache = self._layers.cache = FixedCache(len(self.plan.roles), self.capacity)

    def _step(self) -> None:
        """What is captured: decode, choose, move on."""
        with self._layers.running():
            forward = Forward(self.config, self.plan, on_device=True)
            self.logits, likeliest = self._call(
                self.model, self.tokens, self._position_ids, self.cache, self._host_mask, forward
            )
        self.tokens.copy_(likeliest)
        self.seq_lens.add_(self._pace)
        self._position_ids.add_(1)

    def _moving(self) -> tuple[torch.Tensor, ...]:
        """What a step leaves different from what it found, beside the cache and the logits."""
        return (self.tokens, self.seq_lens, self._position_ids)

    def _capture(self) -> None:
        """Compile and allocate on a side stream, then record the step once."""
        moving = self._moving()
        kept = [tensor.clone() for tensor in moving]

        def restore() -> None:
            for tensor, before in zip(moving, kept, strict=True):
                tensor.copy_(before)

        try:
            self._graph = self._with_enough_memory(lambda: self._record(restore))
        except RuntimeError as error:
            raise TidalError(
                f"model: expected a decode step of {type(self.model).__name__} that a CUDA graph can "
                f"hold, got: {str(error).splitlines()[0]}; set cuda_graph=False"
            ) from error
        finally:
            restore()

    def _record(self, restore: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The step as a graph; ``restore`` undoes what a step has moved."""
        stream = torch.cuda.Stream(self.tokens.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step()
                restore()
        torch.cuda.current_stream().wait_stream(stream)
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        return graph

    def _with_enough_memory(self, call: Callable[[], _Result]) -> _Result:
        """``call()``, or an error that says what was needed; the cache is given back then."""
        try:
            return call()
        except torch.cuda.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
        # Outside the except clause and outside any with: their errors keep what the call allocated.
        self.close()
        _, shape = inspect_model(self.model)
        token = 2 * shape.num_layers * shape.kv_heads * shape.head_dim * self.model.dtype.itemsize
        raise ShortOfMemoryError(
            f"memory: expected room for a cache of {self.batch} x {self.capacity:,} tokens "
            f"({self.batch * self.capacity * token / 2**30:.1f} GiB) and the step that uses it, found "
            f"too little on {self.tokens.device} ({reason}); use fewer rows or tokens"
        )


def _decode(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    position_ids: torch.Tensor,
    cache: FixedCache,
    mask: Any,
    forward: Forward,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[B, vocabulary]`` of ``tokens [B, 1]``, and the most likely next tokens ``[B, 1]``.

    A function, not a method, so that all steps of a model share what is compiled.
    """
    output = model(
        tokens,
        past_key_values=cache,
        position_ids=position_ids,
        attention_mask=mask,
        use_cache=True,
        **{KEYWORD: forward},
    )
    logits: torch.Tensor = output.logits[:, -1]
    return logits, logits.argmax(-1, keepdim=True)


def dense_plan(plan: LayerPlan) -> LayerPlan:
    """The same model with full attention in every planned layer."""
    return LayerPlan(tuple(Role.HOST if r is Role.HOST else Role.DENSE for r in plan.roles))


def _left_padding(mask: torch.Tensor, length: int) -> torch.Tensor:
    """``[B]`` int32: the first token of every row. Errors: `TidalError` for padding elsewhere."""
    if mask.dim() != 2 or mask.shape[1] != length:
        raise TidalError(f"attention_mask: expected shape [B, {length}], got {list(mask.shape)}")
    valid = mask.bool()
    starts = valid.int().argmax(-1).int()
    if not torch.equal(valid.sum(-1), length - starts):
        raise TidalError(
            "attention_mask: expected padding on the left only, found it elsewhere; set the "
            "tokenizer's padding_side to 'left'"
        )
    return starts


def _pass_through_mask(model: PreTrainedModel, device: torch.device) -> Any:
    """A mask that transformers hands down as it is; no layer of a step looks at it."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    kinds = set(getattr(model.get_decoder().config, "layer_types", None) or ())
    return {kind: mask for kind in kinds} if kinds else mask
