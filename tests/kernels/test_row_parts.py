"""How the rows of a batch are cut into parts: by their shares of all tokens, on the device."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference_attention import assert_attends_exactly

from tidaldecode.kernels import dense_decode
from tidaldecode.kernels.partition import other_partition

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tidaldecode.kernels.triton import _cuts, _splitk  # noqa: E402
from tidaldecode.kernels.triton._cuts import Cuts  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def _parts_kernel(
    seq_lens, starts, row_cuts, out, batch, most, share, spare,
    BATCH: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    row, part, parts, first = _cuts.find_part(
        item, seq_lens, starts, row_cuts, batch, most, share, spare, item == 0, BATCH, PADDED
    )
    tl.store(out + item * 4, row)
    tl.store(out + item * 4 + 1, part)
    tl.store(out + item * 4 + 2, parts)
    tl.store(out + item * 4 + 3, first)


def items_of(lengths: list[int], cuts: Cuts, starts: list[int] | None = None):
    """``(row, part, parts, first item)`` of every item, and the noted cuts of every row."""
    padding = None if starts is None else int32(starts)
    ends = int32(lengths) if padding is None else int32(lengths) + padding
    out = torch.full((cuts.items, 4), -1, dtype=torch.int32, device=DEVICE)
    row_cuts = torch.full((len(lengths), 2), -1, dtype=torch.int32, device=DEVICE)
    _parts_kernel[(cuts.items,)](
        ends, padding, row_cuts, out, len(lengths), cuts.most, cuts.share, cuts.spare,
        BATCH=triton.next_power_of_2(len(lengths)), PADDED=padding is not None,
    )  # fmt: skip
    return out.tolist(), row_cuts.tolist()


def cuts_of(batch: int, heads: int = 8, most: int = 800, per_processor: int = 1) -> Cuts:
    """Cuts on a device of 132 multiprocessors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuts, "processors", lambda _: 132)
        return Cuts.by_length(batch, heads, most, DEVICE, per_processor)


def parts_of(lengths: list[int], **options: int) -> list[int]:
    """How many parts each row has."""
    items, row_cuts = items_of(lengths, cuts_of(len(lengths), **options))
    counted = [sum(item[0] == row for item in items) for row in range(len(lengths))]
    assert counted == [parts for _, parts in row_cuts]
    return counted


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5000), min_size=2, max_size=70),
    heads=st.sampled_from([1, 2, 8, 32, 60, 200]),
    most=st.integers(2, 32),
    per_processor=st.sampled_from([1, 4]),
    padded=st.booleans(),
)
def test_every_row_is_cut_once(lengths, heads, most, per_processor, padded):
    cuts = cuts_of(len(lengths), heads, most, per_processor)
    assume(cuts.share is not None)
    starts = [row * 37 % 101 for row in range(len(lengths))] if padded else None
    items, row_cuts = items_of(lengths, cuts, starts)
    wanted, at = [], 0
    for row, (length, (first, parts)) in enumerate(zip(lengths, row_cuts, strict=True)):
        assert (first, parts > 0) == (at, length > 0) and parts <= most
        wanted += [[row, part, parts, at] for part in range(parts)]
        at += parts
    assert items[:at] == wanted, "an item for every part"
    assert all(item[0] == len(lengths) for item in items[at:])
    # No row has a part more than a longer one.
    ordered = [parts for _, (_, parts) in sorted(zip(lengths, row_cuts, strict=True))]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("length", [16_384, 16_187])
@pytest.mark.parametrize("batch", [2, 3, 4, 6, 7, 8, 9, 15, 16, 17, 40])
def test_equal_rows_just_fill_the_device(batch, length):
    alike = [length - row for row in range(batch)]
    assert parts_of(alike) == parts_of([length] * batch) == [max(1, 16 // batch)] * batch


def test_long_rows_among_short_ones_are_cut():
    assert parts_of([102_400] + [2048] * 15) == [15] + [1] * 15
    assert parts_of([102_400, 2048, 2048, 2048]) == [13, 1, 1, 1]
    # Rows that rest leave their share to the others.
    assert parts_of([16_384] * 4 + [0] * 28) == [4] * 4 + [0] * 28
    assert parts_of([0] * 20) == [0] * 20
    # So many heads that no part is left for the long row.
    assert parts_of([5000, 10, 10, 10], heads=200, per_processor=4) == [1] * 4
    narrow = {"heads": 2, "per_processor": 4}
    assert parts_of([16_187] * 256, **narrow) == [1] * 256
    assert parts_of([16_187] * 32 + [0] * 224, **narrow) == [7] * 32 + [0] * 224


@pytest.mark.parametrize(
    ("batch", "heads", "most", "items"),
    [(1, 8, 800, 16), (4, 8, 800, 16), (12, 8, 800, 23), (256, 8, 128, 272), (4, 200, 100, 4)],
)
def test_few_programs_find_nothing_to_do(batch, heads, most, items):
    assert cuts_of(batch, heads, most).items == items


@pytest.mark.parametrize("batch", [4, 16, 40])
def test_another_partition_cuts_equal_rows_otherwise(batch):
    usual = parts_of([9000] * batch)
    with other_partition():
        other = parts_of([9000] * batch)
    assert other == [parts // 2 if parts > 1 else 2 for parts in usual]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_in_parts_whole_and_empty_ones_in_one_batch(queries, padded):
    """What one program did alone, what is merged, and what rests stand side by side in the output."""
    lengths, kv_heads, group, head_dim = [2500, 0, 700, 40, 3], 2, 2, 32
    batch, width = len(lengths), 2600
    starts = torch.tensor([5 * row if padded else 0 for row in range(batch)], dtype=torch.int32)
    ends = torch.tensor(lengths, dtype=torch.int32) + starts
    k, v = (torch.randn(batch, kv_heads, width, head_dim) for _ in range(2))
    q = torch.randn(batch, queries, kv_heads * group, head_dim)
    out, lse, _ = dense_decode(
        (q if queries > 1 else q[:, 0]).to(DEVICE),
        k.to(DEVICE),
        v.to(DEVICE),
        ends.to(DEVICE),
        scale=0.2,
        starts=starts.to(DEVICE) if padded else None,
        backend="triton",
    )
    out, lse = out.cpu().view(q.shape), lse.cpu().view(q.shape[:3])
    place = torch.arange(width)
    for query in range(queries):
        seen = ends - (queries - 1 - query)
        keep = (place < seen[:, None]) & (place >= starts[:, None])
        heads = keep[:, None].expand(-1, kv_heads * group, -1)
        assert_attends_exactly(out[:, query], lse[:, query], q[:, query], k, v, heads, 0.2)


def test_programs_that_find_nothing_write_nothing(monkeypatch):
    """Beyond the batch lie rows that could be attended to, and beyond the results a guard."""
    guards = []

    def guarded(*size, **options):
        shape = torch.Size(size[0] if isinstance(size[0], (tuple, torch.Size)) else size)
        memory = torch.full((shape.numel() + 4096,), 77, **options)
        guards.append(memory[shape.numel() :])
        return memory[: shape.numel()].view(shape)

    lengths = int32([30, 20, 0, 25, 25, 25])
    k, v = (torch.randn(6, 2, 40, 32, device=DEVICE) for _ in range(2))
    q = torch.randn(6, 4, 32, device=DEVICE)
    monkeypatch.setattr(_splitk.torch, "empty", guarded)
    dense_decode(q[:3], k[:3], v[:3], lengths[:3], scale=0.2, backend="triton")
    assert guards and all((guard == 77).all() for guard in guards)
