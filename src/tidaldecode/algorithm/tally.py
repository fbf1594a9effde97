"""What lossless decoding did: drafts, acceptance, and the bytes of K and V it read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tally:
    """Counts over all rows; rows that have ended are left out."""

    rounds: int = 0
    """Verifications of a batch."""
    verified: int = 0
    """Verifications of a row."""
    drafted: int = 0
    """Drafted tokens."""
    accepted: int = 0
    """Drafted tokens that were kept."""
    tokens: int = 0
    """Tokens that verifications gave: accepted ones, and one of full attention for each row."""
    kv_bytes: int = 0
    """Bytes of K and V that drafts and verifications read; a verification reads them once."""
    dense_kv_bytes: int = 0
    """Bytes of K and V that full attention would have read for the same tokens."""

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that were kept; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_verify(self) -> float | None:
        """New tokens of a row for each verification; full attention has 1."""
        return self.tokens / self.verified if self.verified else None

    @property
    def kv_share(self) -> float | None:
        """Bytes of K and V read per token, as a share of full attention's."""
        return self.kv_bytes / self.dense_kv_bytes if self.dense_kv_bytes else None

    def add(self, other: Tally) -> None:
        """Count what ``other`` counted, too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
