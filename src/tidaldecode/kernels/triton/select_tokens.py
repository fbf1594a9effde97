"""select_tokens in Triton: an exact radix selection, several programs to a set, three phases.

1. *count*: histogram of the keys' bins (`_radix`), over all programs of a set; finer where there are
   few sets, since programs that add to one bin wait for each other, and candidates are fewer. If the
   scores come from logits, they are made here.
2. *list*: every program finds the bin in which the last selected token lies, counts its own tokens
   above that bin, and lists those in it.
3. *emit*: every program sorts out the candidates (a few: at once; many: digit by digit) and writes
   the selected positions of its stretch, behind those of the stretches before.

Where the GPU has room for all programs at once, one launch does it all, with barriers between the
phases; otherwise every phase is a launch. Rows are cut by their lengths, which are read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from tidaldecode.errors import TidalError
from tidaldecode.kernels.scratch import CANDIDATES, Scratch, bin_bits
from tidaldecode.kernels.select_tokens import Selection
from tidaldecode.kernels.triton._device import processors
from tidaldecode.kernels.triton._logits import HEADS_AT_ONCE, KeptLogits, tokens_a_thread
from tidaldecode.kernels.triton._overlap import overlap
from tidaldecode.kernels.triton._radix import OCTAVES, POSITION_BITS
from tidaldecode.kernels.triton._selection import select_kernel
from tidaldecode.kernels.triton._splitk import Mergers, SplitOutputs

_LISTED = CANDIDATES
"""Candidates of a set that are listed; if there are more, the scores are read again."""
_FEW = 128
"""Candidates that are compared each with each; no more than are listed."""
_TILE = 512
"""Candidates that are read at a time if there are more."""
_WARPS = 8
"""Of a program that goes through all phases."""


@dataclass(frozen=True)
class _Buffers:
    """What the phases hand on, for ``sets`` sets of up to ``width`` tokens."""

    histograms: torch.Tensor
    """``[sets * OCTAVES << FINE]``, zero before the first phase and after the last."""
    octaves: torch.Tensor
    """``[sets * OCTAVES]``, as well."""
    arrived: torch.Tensor
    """``[sets]``, as well."""
    listed: torch.Tensor
    """``[sets]``, cleared by the first phase."""
    candidates: torch.Tensor
    above: torch.Tensor
    found: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def make(
        cls,
        sets: int,
        programs: int,
        fine: int,
        budget: int,
        scratch: Scratch,
        device: torch.device,
    ) -> _Buffers:
        """Memory for ``programs`` programs a set."""
        sizes = [sets, sets * programs, sets * 2, sets * budget, sets]
        # Each from a multiple of 16 bytes: Triton compiles a kernel anew for another alignment.
        places = [size + -size % 4 for size in sizes]
        ints = torch.empty(sum(places), dtype=torch.int32, device=device)
        pieces = zip(torch.split(ints, places), sizes, strict=True)
        listed, above, found, positions, counts = (piece[:size] for piece, size in pieces)
        bins = sets * OCTAVES.value << fine
        octaves = sets * OCTAVES.value
        zeros = scratch.zeros(bins + octaves + sets, device)
        return cls(
            histograms=zeros[:bins],
            octaves=zeros[bins : bins + octaves],
            arrived=zeros[bins + octaves : bins + octaves + sets],
            listed=listed,
            candidates=torch.empty(sets * _LISTED, dtype=torch.int64, device=device),
            above=above,
            found=found,
            positions=positions,
            counts=counts,
        )


def select_tokens(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    budget: int,
    sink_tokens: int,
    recent_tokens: int,
    starts: torch.Tensor | None,
    scratch: Scratch,
    attended: tuple[SplitOutputs, KeptLogits] | None = None,
    softmax: bool = True,
) -> Selection:
    """Twin of `tidaldecode.kernels.select_tokens`.

    With what `attend` returns, ``scores`` are written first, as `score_tokens` makes them, and counted
    on the way; the attention's parts are merged beside it.
    """
    batch, sets, width = scores.shape
    if width > 1 << POSITION_BITS.value:
        raise TidalError(
            f"scores: expected at most {1 << POSITION_BITS.value:,} tokens, got {width:,}"
        )
    results, logits = attended or (None, None)
    heads = 0 if logits is None else logits.distances.shape[1] // sets
    mergers = Mergers.of(results, heads)
    launches = _launches(width, batch * sets, scores.device, mergers.programs)
    fine = bin_bits(batch * sets)
    buffers = _Buffers.make(
        batch * sets, launches[-1].programs, fine, budget, scratch, scores.device
    )
    selection = Selection(
        buffers.positions.view(batch, sets, budget), buffers.counts.view(batch, sets)
    )
    if batch == 0:
        return selection
    for launch in launches:
        options = overlap(scores.device)
        if launch.first < launch.last:
            options = {**options, "launch_cooperative_grid": True}
        merging = mergers.programs if launch.first == 1 else 0
        select_kernel[(merging + launch.programs, batch * sets)](
            scores,
            None if logits is None else logits.distances,
            None if logits is None else logits.origins,
            *mergers.pieces, seq_lens, starts,
            buffers.histograms, buffers.octaves, buffers.arrived, buffers.listed,
            buffers.candidates, buffers.above, buffers.found, buffers.positions, buffers.counts,
            sets,
            0 if logits is None else logits.distances.stride(1),
            *scores.stride(),
            budget, sink_tokens, recent_tokens, mergers.splits,
            FIRST=launch.first,
            LAST=launch.last,
            HEADS=heads,
            ROWS=min(HEADS_AT_ONCE, triton.next_power_of_2(max(heads, 1))),
            SOFTMAX=softmax,
            MERGERS=merging,
            **mergers.constants(launch.warps),
            PADDED=starts is not None,
            CHUNK=launch.chunk,
            VECTOR=tokens_a_thread(launch.chunk, launch.warps),
            LISTED=_LISTED,
            FEW=_FEW,
            TILE=_TILE,
            FINE=fine,
            num_warps=launch.warps,
            **options,
        )  # fmt: skip
    return selection


@dataclass(frozen=True)
class _Launch:
    """Some phases in one launch."""

    first: int
    last: int
    programs: int
    """Of every set."""
    chunk: int
    warps: int


def _launches(width: int, sets: int, device: torch.device, mergers: int = 0) -> list[_Launch]:
    """How the phases of ``sets`` sets of up to ``width`` tokens are launched; measured on an H200.

    ``mergers`` more programs of every set run beside those of the first phase.
    """
    most = processors(device) // max(sets, 1) - mergers
    if device.type == "cuda" and sets <= _SETS_AT_ONCE and most > 0:
        chunk = SHORT_CHUNK if _chunks(width, SHORT_CHUNK) <= most else CHUNK
        programs = min(most, _chunks(width, chunk))
        return [_Launch(1, 3, programs, chunk, _WARPS)]
    tokens = SHORT_STRETCH if sets <= _FEW_SETS else STRETCH
    return [
        _Launch(1, 1, _chunks(width, COUNTED), COUNTED, 2),
        _Launch(2, 2, _chunks(width, tokens), tokens, 16),
        _Launch(3, 3, _chunks(width, tokens), tokens, 16),
    ]


def _chunks(width: int, tokens: int) -> int:
    return max(1, -(-width // tokens))


_SETS_AT_ONCE, _FEW_SETS = 4, 8
"""Sets whose phases are one launch, and sets whose programs are few otherwise."""
SHORT_CHUNK, CHUNK = 512, 1024
"""Tokens that a program takes at a time in one launch for all phases."""
COUNTED = 256
"""Tokens of a program where the first phase is a launch of its own."""
SHORT_STRETCH, STRETCH = 2048, 4096
"""Tokens of a program where the others are: of few sets, and of more."""
