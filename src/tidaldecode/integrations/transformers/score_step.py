"""The dense step of lossless decoding on the device: full attention's logits for a draft.

One CUDA graph on a GPU. It reads keys and values once for all tokens of the draft, and overwrites those
that the draft wrote.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from tidaldecode.algorithm import LayerPlan
from tidaldecode.algorithm.speculation import Verdict
from tidaldecode.config import TidalConfig
from tidaldecode.integrations.transformers import compiler
from tidaldecode.integrations.transformers.attention import KEYWORD, Forward
from tidaldecode.integrations.transformers.decode_step import DecodeStep, dense_plan
from tidaldecode.integrations.transformers.row_ends import RowEnds
from tidaldecode.integrations.transformers.static_cache import FixedCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ScoreStep(DecodeStep):
    """Scores ``length`` drafted tokens of every row; with none, it is a dense decode step.

    It leaves ``logits [B, length + 1, vocabulary]``, and the rows where they are: `settle` moves them.

    Args:
        ends: the rows.
        length: drafted tokens.

    Others and errors: as a `DecodeStep`. The plan's layers all do full attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TidalConfig,
        plan: LayerPlan,
        ends: RowEnds,
        *,
        length: int,
        batch: int,
        capacity: int,
    ) -> None:
        super().__init__(model, config, dense_plan(plan), batch=batch, capacity=capacity)
        device = model.device
        self.ends = ends
        self.tokens = torch.zeros(batch, length + 1, dtype=torch.int64, device=device)
        """The newest token of every row, and its draft."""
        self.verdict = torch.zeros(batch, length + 2, dtype=torch.int64, device=device)
        """Full attention's tokens, and in the last column how many of them the draft lets a row take."""
        self._offsets = torch.arange(length + 1, device=device)
        self._call = _decode_all
        if config.cuda_graph == "compiled":
            self._call = torch.compile(
                _decode_of(length), dynamic=False, fullgraph=True, **compiler.COMPILER
            )

    def settle(self, verdict: Verdict) -> None:
        """Leave ``verdict`` for the host, and give the rows what it lets them take."""
        self.verdict[:, :-1] = verdict.tokens
        self.verdict[:, -1] = verdict.counts
        self.ends.advance(verdict.tokens, verdict.counts)

    def _step(self) -> None:
        """What is captured: decode newest token and draft densely."""
        # The likeliest tokens come along, so that compiled steps of both kinds are one compilation.
        self._score()

    def _score(self) -> torch.Tensor:
        """Decode newest token and draft; the likeliest token after each ``[B, length + 1]``."""
        self.seq_lens.copy_(self.ends.lengths(self.starts, self.tokens.shape[1] - 1))
        first = self.ends.known - 1 - self.starts
        positions = first[:, None] + self._offsets
        with self._layers.running():
            forward = Forward(self.config, self.plan, on_device=True)
            self.logits, likeliest = self._call(
                self.model, self.tokens, positions, self.cache, self._host_mask, forward
            )
        return likeliest

    def _moving(self) -> tuple[torch.Tensor, ...]:
        return ()


def _decode_all(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    position_ids: torch.Tensor,
    cache: FixedCache,
    mask: Any,
    forward: Forward,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[B, T, vocabulary]`` after each of ``tokens [B, T]``, and the likeliest ``[B, T]``."""
    output = model(
        tokens,
        past_key_values=cache,
        position_ids=position_ids,
        attention_mask=mask,
        use_cache=True,
        **{KEYWORD: forward},
    )
    logits: torch.Tensor = output.logits
    return logits, logits.argmax(-1)


@functools.cache
def _decode_of(length: int) -> FunctionType:
    """`_decode_all` for drafts of one length; all steps of a model share what is compiled of it.

    torch counts the versions that it compiles by a function's code, and takes only a few: batch sizes
    are versions of a length, and lengths have code of their own.
    """
    code = _decode_all.__code__.replace(co_name=f"{_decode_all.__name__}_{length}")
    return FunctionType(code, _decode_all.__globals__)
