"""What select_tokens promises, as properties, and calls made to tie, to be absent and to be NaN."""

import math
from itertools import pairwise

import torch
from hypothesis import strategies as st

from tidaldecode.kernels import Selection

NAN, INF = float("nan"), float("inf")
FEW_VALUES = st.sampled_from((0.0, 0.25, -1.0, 2.0))
ANY_VALUES = st.floats(width=32, allow_nan=True, allow_infinity=True)
SPECIAL = st.sampled_from((NAN, INF, -INF, 0.0, 1.0))


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """Scores wider than their rows, rows that start late or are empty, any budget and forced tokens."""
    batch, sets, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 24))
    values = draw(st.sampled_from((FEW_VALUES, ANY_VALUES, SPECIAL)))
    count = batch * sets * width
    flat = draw(st.lists(values, min_size=count, max_size=count))
    ends = draw(st.lists(st.integers(0, width), min_size=batch, max_size=batch))
    begins = [draw(st.integers(0, end)) for end in ends]
    sinks, recents = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    return {
        "scores": torch.tensor(flat, dtype=torch.float32).view(batch, sets, width),
        "seq_lens": int32(ends),
        "starts": int32(begins) if draw(st.booleans()) else None,
        "sink_tokens": sinks,
        "recent_tokens": recents,
        "budget": sinks + recents + 1 + draw(st.one_of(st.integers(0, 4), st.integers(0, 30))),
    }


def rank(score: float) -> float:
    """NaN ranks with -inf: below every number."""
    return -INF if math.isnan(score) else score


def check_set(kept, scores, begin, end, budget, sinks, recents) -> None:
    """All that is promised of one set; together the properties allow one answer only."""
    valid = range(begin, end)
    assert len(kept) == min(budget, len(valid))
    assert all(position in valid for position in kept)
    assert all(left < right for left, right in pairwise(kept)), "ascending, none twice"
    forced = {p for p in valid if p < begin + sinks or p >= end - 1 - recents}
    assert forced <= set(kept)
    chosen = [p for p in kept if p not in forced]
    dropped = [p for p in valid if p not in kept]
    for position in chosen:
        for other in dropped:
            ours, theirs = rank(scores[position]), rank(scores[other])
            assert ours > theirs or (ours == theirs and position < other)


def assert_selection_is_exact(selection: Selection, call: dict) -> None:
    """Hold a selection against what `select_tokens` promises for the arguments ``call``."""
    scores, starts = call["scores"], call["starts"]
    batch, sets, _ = scores.shape
    assert selection.positions.shape == (batch, sets, call["budget"])
    assert selection.counts.shape == (batch, sets)
    assert selection.positions.dtype == selection.counts.dtype == torch.int32
    for row, end in enumerate(call["seq_lens"].tolist()):
        for index in range(sets):
            positions = selection.positions[row, index].tolist()
            count = int(selection.counts[row, index])
            assert positions[count:] == [-1] * (call["budget"] - count)
            check_set(
                positions[:count],
                scores[row, index].tolist(),
                0 if starts is None else int(starts[row]),
                end,
                call["budget"],
                call["sink_tokens"],
                call["recent_tokens"],
            )
