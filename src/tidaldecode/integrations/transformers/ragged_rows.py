"""The rows of a generation that run ahead of each other, shown to the outside as if they did not.

generate's streamers and stopping criteria see one new token of every row at a time. Rows that accept
more tokens run ahead; a column is *settled*, which is when the outside sees it, once all rows have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer


class RaggedRows:
    """Tokens of ``B`` rows, each with a length of its own, and what generate makes of them.

    Args:
        ids: ``[B, W]`` the prompts.
        config, criteria, streamer: generate's own.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        config: GenerationConfig,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
    ) -> None:
        self.device, self.prompt = ids.device, ids.shape[1]
        ends = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
        # Where a limit is passed already, generate still gives one token.
        self.capacity = max(min([int(config.max_length), *ends]), self.prompt + 1)
        """Tokens that a row has at most."""
        eos = next((c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")), None)
        self._eos = set() if eos is None else set(eos.flatten().tolist())
        # Without such a criterion generate pads nothing: ended rows go on until all have ended.
        self._pads = eos is not None
        pad = config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad.flatten()[0])
        self.ids = torch.full((len(ids), self.capacity), self.pad, dtype=torch.long)
        """``[B, capacity]`` on the CPU."""
        self.ids[:, : self.prompt] = ids.cpu()
        self.lengths = [self.prompt] * len(ids)
        """Known tokens of every row."""
        self.ended = [False] * len(ids)
        """Rows that only padding follows."""
        self.settled = self.prompt
        """Columns that the outside has seen."""
        self.streamer = streamer
        self._criteria = criteria
        self._plain = all(type(c) in (EosTokenCriteria, MaxLengthCriteria) for c in criteria)
        self._unfinished = [True] * len(ids)
        output = bool(config.return_dict_in_generate)
        self.scores: tuple[torch.Tensor, ...] | None = (
            () if output and config.output_scores else None
        )
        self.logits: tuple[torch.Tensor, ...] | None = (
            () if output and config.output_logits else None
        )
        self.records = self.scores is not None or self.logits is not None
        """Whether what tokens were chosen from is kept."""
        self._kept: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}

    def room(self) -> int:
        """Most tokens that a row which has not ended can still take."""
        return max(
            (
                self.capacity - length
                for length, ended in zip(self.lengths, self.ended, strict=True)
                if not ended
            ),
            default=1,
        )

    def extend(
        self,
        tokens: Sequence[Sequence[int]],
        counts: Sequence[int],
        logits: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
    ) -> list[int]:
        """Give row ``b`` the first ``counts[b]`` of ``tokens[b]``, up to its end; how many it took.

        ``logits, scores [B, n, V]``: what the tokens were chosen from, raw and processed; only wanted
        where they are recorded.
        """
        lengths, ended, taken = list(self.lengths), list(self.ended), []
        places: list[int] = []
        values: list[int] = []
        for row, (new, count) in enumerate(zip(tokens, counts, strict=True)):
            begin = lengths[row]
            room = min(count, self.capacity - begin)
            chosen = list(new[:room])
            if not ended[row]:
                stop = next((at for at, token in enumerate(chosen) if token in self._eos), None)
                if stop is not None:
                    chosen, ended[row] = chosen[: stop + 1], True
            places += range(row * self.capacity + begin, row * self.capacity + begin + len(chosen))
            values += chosen
            if logits is not None and scores is not None and self.records:
                for at in range(len(chosen)):
                    kept = self._kept.setdefault(begin + at, {})
                    kept[row] = (logits[row, at].clone(), scores[row, at].clone())
            lengths[row] = begin + len(chosen)
            taken.append(len(chosen))
        self.ids.view(-1)[torch.tensor(places, dtype=torch.long)] = torch.tensor(
            values, dtype=torch.long
        )
        # Together, and last: an interruption leaves the rows as they were before.
        self.lengths, self.ended = lengths, ended
        return taken

    def settle(self) -> bool:
        """Show every column that all rows have; whether generation goes on."""
        while self.settled < min(self.lengths):
            column = self.settled
            self.settled += 1
            self._record(column)
            if self.streamer is not None:
                self.streamer.put(self.ids[:, column].clone())
            for row, stops in enumerate(self._stops(column)):
                if stops and self._unfinished[row]:
                    self._unfinished[row] = False
                    if self._pads:
                        # What it drew behind its end was never part of it.
                        self.lengths[row], self.ended[row] = column + 1, True
            if not any(self._unfinished):
                return False
        return True

    def sequences(self) -> torch.Tensor:
        """``[B, settled]``: the tokens that the outside has seen, on the prompt's device."""
        return self.ids[:, : self.settled].to(self.device)

    def newest(self) -> torch.Tensor:
        """``[B, 1]``: the last token of every row, which is not cached yet."""
        last = torch.tensor(self.lengths)[:, None] - 1
        return self.ids.gather(1, last).to(self.device)

    def _record(self, column: int) -> None:
        kept = self._kept.pop(column, None)
        if kept is None:
            return
        raw, processed = zip(*(kept[row] for row in range(len(self.lengths))), strict=True)
        if self.scores is not None:
            self.scores += (torch.stack(processed),)
        if self.logits is not None:
            self.logits += (torch.stack(raw),)

    def _stops(self, column: int) -> list[bool]:
        """For every row, whether generate's criteria end it with ``column``."""
        if self._plain:
            full = column + 1 >= self.capacity
            return [full or token in self._eos for token in self.ids[:, column].tolist()]
        done: list[bool] = self._criteria(
            self.ids[:, : column + 1].to(self.device), self.scores
        ).tolist()
        return done
