"""Random caches in every layout the contract allows, with poison wherever a kernel must not look."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

LAYOUTS = (
    "contiguous",
    "transposed",
    "sliced",
    "roomy",
    "uneven",
    "paged 1",
    "paged 3",
    "paged 16",
)
NO_BLOCK = 1 << 30
"""In a block table where no block is needed: reading it fails."""


@dataclass
class Case:
    """One call: clean tensors for the reference, laid out and poisoned ones for the kernel."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor | None
    scale: float
    layout: str = "contiguous"
    poison: float = float("nan")

    @property
    def valid(self) -> torch.Tensor:
        """``[B, S]``: which positions belong to their row."""
        positions = torch.arange(self.k.shape[2])
        valid = positions < self.seq_lens[:, None]
        return valid if self.starts is None else valid & (positions >= self.starts[:, None])

    @property
    def keep(self) -> torch.Tensor:
        """``[B, Hq, S]``: `valid` for every query head."""
        return self.valid[:, None].expand(-1, self.q.shape[1], -1)

    def cache(self, readable: torch.Tensor | None = None) -> dict[str, torch.Tensor | None]:
        """``k``, ``v``, ``block_table`` as the kernel gets them.

        All that is outside ``readable`` (``[B, S]`` or ``[B, Hkv, S]``; `valid` by default) is poison.
        """
        readable = self.valid if readable is None else readable
        if readable.dim() == 2:
            readable = readable[:, None]
        k, v = (
            torch.where(readable[..., None], cache, self.poison).to(cache.dtype)
            for cache in (self.k, self.v)
        )
        return lay_out(k, v, self.layout, self.poison, self.valid)


def lay_out(
    k: torch.Tensor, v: torch.Tensor, layout: str, poison: float, valid: torch.Tensor
) -> dict[str, torch.Tensor | None]:
    """``k, v [B, Hkv, S, D]`` in the given layout, surrounded by poison."""
    if layout.startswith("paged"):
        return paged(k, v, int(layout.split()[1]), poison, valid)
    arrange = _ARRANGED[layout]
    return {"k": arrange(k, poison), "v": arrange(v, poison), "block_table": None}


def paged(
    k: torch.Tensor, v: torch.Tensor, block_size: int, poison: float, valid: torch.Tensor
) -> dict[str, torch.Tensor | None]:
    """Scatter rows over shuffled blocks; blocks of nobody are poison, unneeded table entries fail."""
    batch, kv_heads, tokens, head_dim = k.shape
    blocks = max(-(-tokens // block_size), 1)
    spare = 2
    order = torch.randperm(batch * blocks + spare)
    table = order[: batch * blocks].view(batch, blocks)
    caches = []
    for clean in (k, v):
        pool = clean.new_full((len(order), block_size, kv_heads, head_dim), poison)
        padded = clean.new_full((batch, blocks * block_size, kv_heads, head_dim), poison)
        padded[:, :tokens] = clean.transpose(1, 2)
        pool[table.flatten()] = padded.view(-1, block_size, kv_heads, head_dim)
        caches.append(pool)
    needed = torch.zeros(batch, blocks * block_size, dtype=torch.bool)
    needed[:, :tokens] = valid
    used = needed.view(batch, blocks, block_size).any(-1)
    table = torch.where(used, table, NO_BLOCK).to(torch.int32)
    return {"k": caches[0], "v": caches[1], "block_table": table}


def _contiguous(cache: torch.Tensor, _: float) -> torch.Tensor:
    return cache.clone()


def _transposed(cache: torch.Tensor, _: float) -> torch.Tensor:
    """Stored as ``[B, S, Hkv, D]``."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def _sliced(cache: torch.Tensor, poison: float) -> torch.Tensor:
    """A window of a larger tensor, with a stride in every dimension but the last."""
    batch, kv_heads, tokens, head_dim = cache.shape
    store = cache.new_full((batch + 1, 2 * kv_heads + 1, tokens + 5, head_dim + 3), poison)
    window = store[1:, 1::2, 2 : tokens + 2, 1 : head_dim + 1]
    window.copy_(cache)
    return window


def _roomy(cache: torch.Tensor, poison: float) -> torch.Tensor:
    """With room for more tokens behind those of every head."""
    batch, kv_heads, tokens, head_dim = cache.shape
    store = cache.new_full((batch, kv_heads, tokens + 7, head_dim), poison)
    store[:, :, :tokens] = cache
    return store[:, :, :tokens]


def _uneven(cache: torch.Tensor, poison: float) -> torch.Tensor:
    """With room between heads that no whole number of tokens fills."""
    batch, kv_heads, tokens, head_dim = cache.shape
    store = cache.new_full((batch, kv_heads, tokens * head_dim + 3), poison)
    window = store[:, :, 3:].unflatten(2, (tokens, head_dim))
    window.copy_(cache)
    return window


_ARRANGED = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "sliced": _sliced,
    "roomy": _roomy,
    "uneven": _uneven,
}


def make_case(
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    tokens: int = 24,
    *,
    ends: list[int] | None = None,
    starts: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 1.0,
    layout: str = "contiguous",
    poison: float = float("nan"),
) -> Case:
    """A random case; ``sharpness`` is about the standard deviation of its logits."""
    q = torch.randn(batch, kv_heads * group, head_dim).to(dtype)
    k, v = (torch.randn(batch, kv_heads, tokens, head_dim).to(dtype) for _ in "kv")
    return Case(
        q,
        k,
        v,
        torch.tensor([tokens] * batch if ends is None else ends, dtype=torch.int32),
        None if starts is None else torch.tensor(starts, dtype=torch.int32),
        sharpness * head_dim**-0.5,
        layout,
        poison,
    )


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Case:
    """Any shape, row range, layout, poison and sharpness that the contract allows."""
    batch = draw(st.integers(1, 4), label="B")
    tokens = draw(st.one_of(st.integers(1, 40), st.integers(41, 300)), label="S")
    ends = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch), label="ends")
    starts = None
    if draw(st.booleans(), label="padded"):
        starts = [draw(st.integers(0, end), label="start") for end in ends]
    torch.manual_seed(draw(st.integers(0, 1 << 30), label="seed"))
    return make_case(
        batch,
        draw(st.integers(1, 4), label="Hkv"),
        draw(st.sampled_from((1, 2, 3, 4, 5, 7)), label="G"),
        draw(st.sampled_from((16, 32, 64, 80)), label="D"),
        tokens,
        ends=ends,
        starts=starts,
        dtype=draw(st.sampled_from(dtypes), label="dtype"),
        sharpness=draw(st.sampled_from((0.1, 1.0, 5.0)), label="sharpness"),
        layout=draw(st.sampled_from(LAYOUTS), label="layout"),
        poison=draw(st.sampled_from((float("nan"), float("inf"), -float("inf"))), label="poison"),
    )
