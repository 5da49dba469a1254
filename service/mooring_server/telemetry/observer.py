"""Numbers of engine, tiers and job runner as metrics. Called on their threads; only counts, never blocks."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from mooring_server.telemetry.metrics import Metrics


class MetricsObserver:
    """Implements the engine's `EngineObserver`, the tiers' `TierObserver` and the runner's `RunnerObserver`.

    Args:
        metrics: where to count.
        account: takes a tenant and the seconds that it used the device.
    """

    def __init__(self, metrics: Metrics, account: Callable[[str, float], None] | None = None) -> None:
        self._metrics = metrics
        self._account = account
        self._prompts = 0, 0

    def tick(self, klass: IntEnum, seconds: float) -> None:
        """A tick of a class took so long."""
        self._metrics.tick_seconds.labels(klass.name.lower()).observe(seconds)

    def stage(self, name: str, seconds: float) -> None:
        """A stage took so long."""
        self._metrics.stage_seconds.labels(name).observe(seconds)

    def batch(self, size: int, adapters: int) -> None:
        """A UNet batch of so many rows with so many different adapters ran."""
        self._metrics.batch_size.observe(size)
        self._metrics.batch_adapters.observe(adapters)

    def queue(self, klass: IntEnum, waiting: int, running: int) -> None:
        """A class's queue changed."""
        self._metrics.queue_depth.labels(klass.name.lower(), "waiting").set(waiting)
        self._metrics.queue_depth.labels(klass.name.lower(), "running").set(running)

    def used(self, klass: IntEnum, tenant: str, seconds: float) -> None:
        """A tenant's task used the device for so long; tenants are no labels, so only classes are counted."""
        if self._account is not None:
            self._account(tenant, seconds)
        self._metrics.device_seconds.labels(klass.name.lower()).inc(seconds)

    def prompts(self, queries: int, hits: int, kept: int) -> None:
        """Look-ups of encoded prompts and hits so far, and the bytes kept."""
        self._metrics.prompt_queries.inc(queries - self._prompts[0])
        self._metrics.prompt_hits.inc(hits - self._prompts[1])
        self._prompts = queries, hits
        self._metrics.device_bytes.labels("prompts").set(kept)

    def tier_lookup(self, tier: str, *, hit: bool) -> None:
        """A tier was asked for an adapter."""
        self._metrics.cache_queries.labels(tier).inc()
        self._metrics.cache_hits.labels(tier).inc(int(hit))

    def tier_loaded(self, tier: str, seconds: float) -> None:
        """A tier did its part of a load."""
        self._metrics.load_seconds.labels(tier).observe(seconds)

    def tier_evicted(self, tier: str, count: int) -> None:
        """A tier dropped adapters to make room."""
        self._metrics.cache_evictions.labels(tier).inc(count)

    def tier_bytes(self, tier: str, size: int) -> None:
        """A tier now holds so many bytes."""
        self._metrics.cache_bytes.labels(tier).set(size)

    def tier_failed(self, reason: str) -> None:
        """A load failed."""
        self._metrics.load_failures.labels(reason).inc()

    def job_claimed(self, kind: str, *, resumed: bool) -> None:
        """A job was claimed, for the first time or again."""
        self._metrics.jobs_claimed.labels(kind, "resumed" if resumed else "first").inc()

    def job_ended(self, kind: str, outcome: str, seconds: float) -> None:
        """The runner is done with a job."""
        self._metrics.jobs_ended.labels(kind, outcome.lower()).inc()
        self._metrics.job_seconds.labels(kind).observe(seconds)

    def job_step(self, kind: str, seconds: float) -> None:
        """A step of a training took so long."""
        self._metrics.step_seconds.labels(kind).observe(seconds)

    def drew(self, steps: int) -> None:
        """A row of a batch job gave its image."""
        self._metrics.images.inc()
        self._metrics.steps.inc(steps)

    def trained(self, drift: float, budget: float) -> None:
        """A training ended with that drift."""
        self._metrics.trained_drift.observe(drift / budget)
