"""The numbers of the tiers."""

from __future__ import annotations

from typing import Literal, Protocol

Tier = Literal["device", "host", "disk", "object"]


class TierObserver(Protocol):
    """Receives the numbers of every tier, on any thread; must not block. Telemetry implements it."""

    def tier_lookup(self, tier: Tier, *, hit: bool) -> None:
        """A tier was asked for an adapter."""

    def tier_loaded(self, tier: Tier, seconds: float) -> None:
        """A tier did its part of a load.

        object: fetched the file; disk: read and verified it; host: decoded, checked and packed it; device:
        copied the row into a slot (on CUDA: started the copy).
        """

    def tier_failed(self, reason: str) -> None:
        """A load failed: the reason of its error, or UNEXPECTED where it had none."""

    def tier_evicted(self, tier: Tier, count: int) -> None:
        """A tier dropped adapters to make room."""

    def tier_bytes(self, tier: Tier, size: int) -> None:
        """A tier now holds so many bytes of adapters."""


class Unobserved:
    """A `TierObserver` that counts nothing."""

    def tier_lookup(self, tier: Tier, *, hit: bool) -> None:
        """As `TierObserver`."""

    def tier_loaded(self, tier: Tier, seconds: float) -> None:
        """As `TierObserver`."""

    def tier_failed(self, reason: str) -> None:
        """As `TierObserver`."""

    def tier_evicted(self, tier: Tier, count: int) -> None:
        """As `TierObserver`."""

    def tier_bytes(self, tier: Tier, size: int) -> None:
        """As `TierObserver`."""
